// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/mattn/go-shellwords"
	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/fault"
)

// shapes checks what compose-go would drop, cut or spell anew, and returns each service's environment as it is written.
func shapes(root *yaml.Node, app string) (map[string]types.MappingWithEquals, error) {
	const op = "manifest.shapes"
	if n := child(root, "name"); n != nil && n.Value != app {
		return nil, below(fault.New(op, fault.Invalid, "name %.64q is not what x-demarc calls the app, %.64q: leave it out", n.Value, app),
			"name")
	}
	err := each(child(root, "secrets"), "secrets", func(name string, n *yaml.Node) error { return only(n, "secret "+name, externalKeys) })
	if err != nil {
		return nil, err
	}
	envs := map[string]types.MappingWithEquals{}
	return envs, each(child(root, "services"), "services", func(name string, n *yaml.Node) (err error) {
		if d := child(n, "depends_on"); d != nil && d.Kind == yaml.MappingNode {
			err = each(d, "depends_on", func(on string, n *yaml.Node) error { return only(n, "depends_on "+on, dependKeys) })
		}
		if err == nil {
			err = wholeCommand(child(n, "command"))
		}
		if err == nil {
			err = limits(n)
		}
		if err == nil {
			envs[name], err = environment(child(n, "environment"))
		}
		return below(err, "services", name)
	})
}

// wholeCommand refuses a command of which a reader would take the first words only: there is no shell here.
func wholeCommand(n *yaml.Node) error {
	bad := func(n *yaml.Node, text string) error {
		return fault.New("manifest.command", fault.Invalid, "line %d: command: %s", n.Line, text)
	}
	switch {
	case n == nil:
		return nil
	case n.Kind == yaml.SequenceNode:
		for _, c := range n.Content {
			if c.Kind != yaml.ScalarNode || c.Tag != "!!str" {
				return bad(c, fmt.Sprintf("%.32q is no text: quote it", c.Value))
			}
		}
		return nil
	case n.Kind != yaml.ScalarNode || n.Tag != "!!str":
		return bad(n, "must be a list of texts, or one text")
	}
	p := shellwords.NewParser()
	if _, err := p.Parse(n.Value); err != nil || p.Position >= 0 || strings.ContainsAny(n.Value, "`$\n") {
		return bad(n, "there is no shell here, and this text has an open quote, a second row, or one of ; & | < > ` $: write the command as a "+
			"list")
	}
	return nil
}

// environment reads the variables of a service: each value is its own text.
func environment(n *yaml.Node) (types.MappingWithEquals, error) {
	out := types.MappingWithEquals{}
	if n == nil {
		return out, nil
	}
	set := func(at *yaml.Node, name, value string, has bool) error {
		if _, twice := out[name]; twice {
			return fault.New("manifest.environment", fault.Invalid, "line %d: the variable %.64q is there twice", at.Line, name)
		}
		if out[name] = nil; has {
			value = strings.ReplaceAll(value, "$$", "$")
			out[name] = &value
		}
		return nil
	}
	switch n.Kind {
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			k, v := n.Content[i], n.Content[i+1]
			if v.Kind != yaml.ScalarNode {
				return nil, fault.New("manifest.environment", fault.Invalid, "line %d: the variable %.64q must be text", v.Line, k.Value)
			}
			if err := set(k, k.Value, v.Value, v.Tag != "!!null"); err != nil {
				return nil, err
			}
		}
		return out, nil
	case yaml.SequenceNode:
		for _, c := range n.Content {
			if c.Kind != yaml.ScalarNode || c.Tag != "!!str" {
				return nil, fault.New("manifest.environment", fault.Invalid, "line %d: write NAME=value", c.Line)
			}
			name, value, has := strings.Cut(c.Value, "=")
			if err := set(c, name, value, has); err != nil {
				return nil, err
			}
		}
		return out, nil
	}
	return nil, fault.New("manifest.environment", fault.Invalid, "line %d: environment must be a mapping or a list", n.Line)
}
