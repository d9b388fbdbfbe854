// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"bytes"
	"errors"
	"io"
	"regexp"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/fault"
)

const maxDepth = 16 // nesting of a template's YAML

var (
	decimal  = regexp.MustCompile(`^(0|[1-9][0-9]{0,9})$`)
	typeName = regexp.MustCompile(` not found in type \S+`)
)

// ParseTemplate reads one YAML document. Unknown and repeated keys are refused with their line, and so is whatever says
// something else than it shows: aliases, merge keys, tags, numbers that are not decimal, keys without a value.
func ParseTemplate(file []byte) (Template, error) {
	const op = "operation.ParseTemplate"
	if len(file) > MaxTemplate {
		return Template{}, fault.New(op, fault.Invalid, "the template has %d bytes, at most %d are allowed", len(file), MaxTemplate)
	}
	if !utf8.Valid(file) {
		return Template{}, fault.New(op, fault.Invalid, "the template is not UTF-8")
	}
	if err := plainYAML(op, file); err != nil {
		return Template{}, err
	}
	var t Template
	d := yaml.NewDecoder(bytes.NewReader(file))
	d.KnownFields(true)
	if err := d.Decode(&t); err != nil {
		return Template{}, fault.Because(err, op, fault.Invalid, "not a template: %s", sentence(err))
	}
	if err := t.Check(); err != nil {
		return Template{}, err
	}
	return t, nil
}

// plainYAML refuses a second document, and nodes that say something else than they show.
func plainYAML(op string, file []byte) error {
	d := yaml.NewDecoder(bytes.NewReader(file))
	var n yaml.Node
	if err := d.Decode(&n); err != nil {
		if errors.Is(err, io.EOF) {
			return fault.New(op, fault.Invalid, "the template is empty")
		}
		return fault.Because(err, op, fault.Invalid, "not YAML: %s", sentence(err))
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return fault.New(op, fault.Invalid, "the template must be one YAML document")
	}
	return plain(op, &n, 0)
}

func plain(op string, n *yaml.Node, depth int) error {
	bad := func(text string) error { return fault.New(op, fault.Invalid, "line %d: %s", n.Line, text) }
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		return bad("anchors and aliases are not allowed in a template")
	case n.Kind == yaml.ScalarNode && n.ShortTag() == "!!merge":
		return bad("merge keys are not allowed in a template")
	case n.Style&yaml.TaggedStyle != 0:
		return bad("tags are not allowed in a template")
	case n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null":
		return bad("a value is missing: write it, or leave its key out")
	case depth > maxDepth:
		return bad("nested too deep")
	}
	for i, c := range n.Content {
		if n.Kind == yaml.MappingNode && i%2 == 1 && c.Kind == yaml.ScalarNode {
			if tag := c.ShortTag(); (tag == "!!int" || tag == "!!float") && !decimal.MatchString(c.Value) {
				return fault.New(op, fault.Invalid, "line %d: %s: write a whole number in decimal digits, or quote what is text", c.Line,
					fault.Clip(c.Value))
			}
		}
		if err := plain(op, c, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// sentence takes the names of this program's types out of what the YAML reader says.
func sentence(err error) string {
	s := err.Error()
	var te *yaml.TypeError
	if errors.As(err, &te) && len(te.Errors) > 0 {
		s = te.Errors[0]
	}
	s = typeName.ReplaceAllString(strings.TrimPrefix(s, "yaml: "), " is not a key of a template")
	return fault.ClipTo(strings.ReplaceAll(s, " into operation.", " into "), 200)
}
