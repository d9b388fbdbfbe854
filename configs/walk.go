// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/fault"
)

// problem is one thing that is wrong: the key, and a sentence.
type problem struct{ key, text string }

// report makes one error of all that is wrong, a line each, each with its place.
func report(op, name string, places map[string]string, found []problem) error {
	const most = 20
	var lines []string
	for i, p := range found {
		if i == most {
			lines = append(lines, fmt.Sprintf("%s: and %d more", name, len(found)-most))
			break
		}
		at := places[p.key]
		for up := p.key; at == "" && up != ""; at = places[up] { // a missing key has the place of its section
			up = up[:max(0, strings.LastIndexAny(up, ".["))]
		}
		if at == "" {
			at = name
		}
		lines = append(lines, at+": "+p.key+": "+p.text)
	}
	return fault.At(op, fault.Invalid, fmt.Errorf("%s", strings.Join(lines, "\n")))
}

// walker compares the nodes of the file with the type that they are for.
type walker struct {
	name   string
	places map[string]string // key -> file:line
	found  []problem
}

func (w *walker) bad(n *yaml.Node, key, format string, args ...any) {
	w.places[key] = fmt.Sprintf("%s:%d", w.name, n.Line)
	w.found = append(w.found, problem{key, fmt.Sprintf(format, args...)})
}

func (w *walker) walk(n *yaml.Node, t reflect.Type, key string) {
	if _, told := w.places[key]; !told {
		w.places[key] = fmt.Sprintf("%s:%d", w.name, n.Line)
	}
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		w.bad(n, key, "anchors and aliases are not read: write the value out")
		return
	}
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t.Kind() == reflect.Struct || t.Kind() == reflect.Map:
		w.mapping(n, t, key)
	case t.Kind() == reflect.Slice:
		if n.Kind != yaml.SequenceNode || n.ShortTag() != "!!seq" || len(n.Content) == 0 {
			w.bad(n, key, "a list with at least one entry is needed here; leave the key out for none")
			return
		}
		for i, c := range n.Content {
			w.walk(c, t.Elem(), fmt.Sprintf("%s[%d]", key, i))
		}
	case n.Kind != yaml.ScalarNode:
		w.bad(n, key, "a single value is needed here")
	case t.Kind() == reflect.Bool:
		if n.ShortTag() != "!!bool" {
			w.bad(n, key, "%q is neither true nor false", fault.Clip(n.Value))
		}
	case t.Kind() == reflect.Int:
		if v, err := strconv.ParseInt(n.Value, 10, 32); n.ShortTag() != "!!int" || err != nil || v < 1 {
			w.bad(n, key, "%q is not a whole number above zero; leave the key out for the default", fault.Clip(n.Value))
		}
	case n.ShortTag() != "!!str":
		w.bad(n, key, "%q is not text: put it in quotes, or leave the key out", fault.Clip(n.Value))
	case t == reflect.TypeFor[time.Duration]():
		d, err := time.ParseDuration(n.Value)
		switch {
		case err != nil:
			w.bad(n, key, "%q is not a duration: write it as 720h or 90m", fault.Clip(n.Value))
		case d <= 0 && strings.HasSuffix(key, "life"): // what is left out has a default; what is written must not become it
			w.bad(n, key, "%q: use more than 0s, or leave the key out", fault.Clip(n.Value))
		}
	}
}

func (w *walker) mapping(n *yaml.Node, t reflect.Type, key string) {
	if n.Kind != yaml.MappingNode || n.ShortTag() != "!!map" || len(n.Content) == 0 {
		w.bad(n, key, "a section with keys is needed here; leave it out for none")
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, val := n.Content[i], n.Content[i+1]
		sub := strings.TrimPrefix(key+"."+fault.Clip(k.Value), ".")
		var to reflect.Type
		switch {
		case k.Kind != yaml.ScalarNode || k.ShortTag() != "!!str":
			w.bad(k, sub, "this is no key of the file: a key is plain text")
		case seen[k.Value]:
			w.bad(k, sub, "the key is written twice")
		case t.Kind() == reflect.Map:
			if to = t.Elem(); !label.MatchString(k.Value) {
				w.bad(k, sub, "use lower-case letters, digits and inner hyphens for a name")
				to = nil
			}
		default:
			if to = fieldType(t, k.Value); to == nil {
				w.bad(k, sub, "unknown key; known here: %s", strings.Join(keys(t), ", "))
			}
		}
		seen[k.Value] = true
		if to != nil {
			w.walk(val, to, sub)
		}
	}
}

func fieldType(t reflect.Type, key string) reflect.Type {
	for i := range t.NumField() {
		if keyOf(t.Field(i)) == key {
			return t.Field(i).Type
		}
	}
	return nil
}

func keys(t reflect.Type) (out []string) {
	for i := range t.NumField() {
		out = append(out, keyOf(t.Field(i)))
	}
	return out
}

func tagged(c *mapstructure.DecoderConfig) { c.TagName = "yaml" }

// complete makes paths absolute, in every field tagged is:"path".
func complete(v reflect.Value, dir string) {
	fields(v, "", func(_, is string, _ bool, f reflect.Value) {
		if is == "path" && f.Kind() == reflect.String && f.String() != "" && !filepath.IsAbs(f.String()) {
			f.SetString(filepath.Join(dir, f.String()))
		}
	})
}

// checkFields holds each field against its tags: need:"yes", and is:"name|domain|path|listen|addr|host|url|wss".
func checkFields(v reflect.Value) (out []problem) {
	fields(v, "", func(key, is string, need bool, f reflect.Value) {
		if f.Kind() == reflect.Slice {
			if need && f.Len() == 0 {
				out = append(out, problem{key, "missing: name at least one"})
			}
			return
		}
		s := f.String()
		switch {
		case s != "":
			if why := wrong(is, s); why != "" && is == "url" { // not repeated: it may hold a password
				out = append(out, problem{key, why})
			} else if why != "" {
				out = append(out, problem{key, fmt.Sprintf("%q: %s", fault.Clip(s), why)})
			}
		case need:
			out = append(out, problem{key, "missing"})
		}
	})
	return out
}

// fields visits every text and every list of what is there, lists' entries included.
func fields(v reflect.Value, prefix string, visit func(key, is string, need bool, f reflect.Value)) {
	for i := range v.NumField() {
		f, val := v.Type().Field(i), v.Field(i)
		key, is, need := prefix+keyOf(f), f.Tag.Get("is"), f.Tag.Get("need") == "yes"
		if val.Kind() == reflect.Pointer {
			if val.IsNil() {
				if need {
					visit(key, "", true, reflect.ValueOf(""))
				}
				continue
			}
			val = val.Elem()
		}
		switch val.Kind() {
		case reflect.Struct:
			fields(val, key+".", visit)
		case reflect.String:
			visit(key, is, need, val)
		case reflect.Slice:
			visit(key, is, need, val)
			for j := range val.Len() {
				if at := fmt.Sprintf("%s[%d]", key, j); val.Index(j).Kind() == reflect.Struct {
					fields(val.Index(j), at+".", visit)
				} else {
					visit(at, is, true, val.Index(j))
				}
			}
		}
	}
}

// NamePattern is what a name may look like: the same DNS label as in the rest of the fleet.
const NamePattern = `^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`

var label = regexp.MustCompile(NamePattern)

// wrong says what is wrong with a value, "" for nothing.
func wrong(is, s string) string {
	switch is {
	case "name":
		if !label.MatchString(s) {
			return "use 1 to 63 lower-case letters, digits and inner hyphens"
		}
	case "domain":
		if len(s) > 253 || net.ParseIP(s) != nil ||
			slices.ContainsFunc(strings.Split(s, "."), func(l string) bool { return !label.MatchString(l) }) {
			return "use a DNS name in lower case, for instance acme.example"
		}
	case "listen", "addr":
		host, port, err := net.SplitHostPort(s)
		if err != nil {
			return "use host:port"
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || (is == "addr" && n == 0) {
			return "the port must be a number from 1 to 65535"
		}
		if is == "addr" && wild(host) {
			return "others must be able to reach it: name a host or an address"
		}
		if is == "listen" && host != "" && net.ParseIP(host) == nil && host != "localhost" {
			return "listen on an address of this host, not on a name"
		}
	case "host":
		if net.ParseIP(s) == nil {
			return "use an address of this host"
		}
	case "socket":
		if len(s) > 107 {
			return "the path of a socket has at most 107 bytes"
		}
	case "wss":
		at := s
		if !strings.Contains(s, "://") {
			at = "wss://" + s
		}
		u, err := url.Parse(at)
		if err != nil || u.Scheme != "wss" || u.Hostname() == "" || (at != s && (u.Port() == "" || u.Path != "")) {
			return "use wss://host[:port][/path] or host:port"
		}
		if n, err := strconv.ParseUint(u.Port(), 10, 16); u.Port() != "" && (err != nil || n == 0) {
			return "the port must be a number from 1 to 65535"
		}
		if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return "a URL in the file carries no credentials, query or fragment"
		}
	case "url":
		u, err := url.Parse(s)
		if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" {
			return "use https://host[:port]"
		}
		if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return "a URL in the file carries no credentials, query or fragment: name a file that holds the secret"
		}
	}
	return ""
}

func wild(host string) bool {
	ip := net.ParseIP(host)
	return host == "" || ip != nil && ip.IsUnspecified()
}
