// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/fault"
)

// misplaced is an error and the keys under which what it is about stands in the Compose file: services, web, command.
type misplaced struct {
	error
	path []string
}

// Unwrap returns the error itself.
func (m misplaced) Unwrap() error { return m.error }

// below says where in the file an error belongs. An error that knows it already keeps its own place, below this one.
func below(err error, path ...string) error {
	if err == nil {
		return nil
	}
	var m misplaced
	if errors.As(err, &m) {
		return misplaced{m.error, append(path, m.path...)}
	}
	return misplaced{err, path}
}

// lined puts the line before the sentence of an error that says where it belongs.
func lined(root *yaml.Node, err error) error {
	var m misplaced
	if !errors.As(err, &m) {
		return err
	}
	text := fault.Text(m.error)
	if strings.HasPrefix(text, "line ") {
		return m.error
	}
	return fault.Because(m.error, "manifest.ParseCompose", fault.Invalid, "line %d: %s", find(root, m.path).Line, text)
}

// find returns the deepest node of a path that is there.
func find(n *yaml.Node, path []string) *yaml.Node {
	for _, key := range path {
		next := under(n, key)
		if next == nil {
			break
		}
		n = next
	}
	return n
}

// under returns the entry of a mapping, or of a list of KEY=VALUE or of names.
func under(n *yaml.Node, key string) *yaml.Node {
	switch n.Kind {
	case yaml.MappingNode:
		return child(n, key)
	case yaml.SequenceNode:
		for i, c := range n.Content {
			if c.Kind == yaml.ScalarNode && (c.Value == key || strings.HasPrefix(c.Value, key+"=")) || key == fmt.Sprint(i) {
				return c
			}
			if c.Kind == yaml.MappingNode { // a secret's use
				if x := child(c, "target"); x != nil && x.Value == key {
					return x
				}
				if x := child(c, "source"); x != nil && x.Value == key {
					return x
				}
			}
		}
	}
	return nil
}

// dotted finds the place that an error of compose-go names: services.web.command.1 must be a string.
var dotted = regexp.MustCompile(`\b(services|secrets|name|version)([.\[][A-Za-z0-9_-]+\]?)*`)

// loaderError turns an error of compose-go into one with its line.
func loaderError(root *yaml.Node, err error) error {
	text := err.Error()
	for _, head := range []string{"validating compose.yaml: ", "decoding failed due to the following error(s):"} {
		text = strings.TrimSpace(strings.TrimPrefix(text, head))
	}
	text, _, _ = strings.Cut(text, "\n")
	at := dotted.FindString(text)
	path := strings.FieldsFunc(at, func(r rune) bool { return r == '.' || r == '[' || r == ']' })
	return fault.Because(err, "manifest.load", fault.Invalid, "line %d: not a Compose file: %s", find(root, path).Line,
		fault.ClipTo(text, 300))
}

// decode reads a value that must be of its kind. An error of the decoder names the line.
func decode(n *yaml.Node, what string, v any) error {
	err := n.Decode(v)
	if err == nil {
		return nil
	}
	text := err.Error()
	var wrong *yaml.TypeError
	if errors.As(err, &wrong) && len(wrong.Errors) > 0 {
		text = wrong.Errors[0] // line 3: cannot unmarshal !!str `yes please` into bool
	}
	if !strings.HasPrefix(text, "line ") {
		text = fmt.Sprintf("line %d: %s", n.Line, strings.TrimPrefix(text, "yaml: "))
	}
	line, rest, _ := strings.Cut(text, ": ")
	return fault.Because(err, "manifest.decode", fault.Invalid, "%s: %s: %s", line, what, kinds.Replace(rest))
}

// kinds says in YAML's words what Go's names mean.
var kinds = strings.NewReplacer("cannot unmarshal", "wrong kind of value:", "!!str", "text", "!!int", "number", "!!float", "number",
	"!!bool", "true or false",
	"!!seq", "list", "!!map", "mapping", "!!null", "nothing", "into bool", "where true or false is wanted", "into int",
	"where a whole number is wanted",
	"into string", "where text is wanted", "into []string", "where a list of texts is wanted", "into map[string]string",
	"where a mapping of texts is wanted",
	"into map[string]int", "where a mapping of whole numbers is wanted", "into manifest.x", "where a mapping is wanted: ",
	"into map[string]manifest.x", "where a mapping is wanted: ", "into fleet.Exposure", "where text is wanted")

// whole refuses numbers that are not whole, which the decoder would cut.
func whole(what string, numbers ...*yaml.Node) error {
	for _, n := range numbers {
		if n != nil && n.Tag != "!!int" {
			return fault.New("manifest.whole", fault.Invalid, "line %d: %s: %.32q is no whole number", n.Line, what, n.Value)
		}
	}
	return nil
}
