// SPDX-License-Identifier: Apache-2.0

// Package configs is the operator's file: strict, with every default in one place and examples that tests load.
//
// The promise: what the operator wrote is what runs, or nothing does. An unknown key, a key written twice, an empty
// section, a value of another type, an anchor or a second document is an error that names the file and the line;
// all that is wrong is told at once. A secret has no place in the file: it holds paths of files with secrets.
//
// # The file
//
// YAML, at most 256 KiB, with "version: demarc/1" and "role: control-plane | appliance | management-plane".
// Before a value of the file goes DEMARC_<KEY> of the environment (raft.listen is DEMARC_RAFT_LISTEN; a list of
// strings is separated by commas), and before that a flag of the same name (--raft.listen). Version, role, and what
// is inside a list or a map come from the file alone. A relative path is relative to the folder of the file.
package configs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"github.com/spf13/viper"
	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/fault"
)

// Version is the one version of the file that is understood.
const Version = "demarc/1"

// MaxFile bounds the file.
const MaxFile = 256 << 10

const envPrefix = "DEMARC"

// Config is one of *Control, *Appliance and *Management: the set is closed.
type Config interface {
	// Effective is the whole configuration as it holds, defaults included and without anything that may be secret.
	Effective() ([]byte, error)
	problems() []problem
}

// Load reads the operator's file. flags may be nil; of them, only those count that were set and name a key.
func Load(path string, flags *pflag.FlagSet) (Config, error) {
	const op = "configs.Load"
	f, err := os.Open(path)
	if err != nil {
		kind := fault.Unavailable
		if errors.Is(err, os.ErrNotExist) {
			kind = fault.NotFound
		}
		return nil, fault.At(op, kind, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, fault.At(op, fault.Unavailable, err)
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	return parse(path, filepath.Dir(abs), b, flags)
}

// Parse is Load for bytes. The name stands for the file in errors, and relative paths are relative to its folder.
func Parse(name string, file []byte, flags *pflag.FlagSet) (Config, error) {
	return parse(name, filepath.Dir(name), file, flags)
}

func parse(name, dir string, file []byte, flags *pflag.FlagSet) (Config, error) {
	const op = "configs.Load"
	root, c, err := open(name, file)
	if err != nil {
		return nil, err
	}
	into := reflect.ValueOf(c).Elem()
	places := map[string]string{}
	w := walker{name: name, places: places}
	w.walk(root, into.Type(), "")
	if len(w.found) > 0 {
		return nil, report(op, name, places, w.found)
	}
	var values map[string]any
	if err := root.Decode(&values); err != nil {
		return nil, fault.At(op, fault.Invalid, fmt.Errorf("%s: %w", name, err))
	}
	v := viper.New()
	if err := v.MergeConfigMap(values); err != nil {
		return nil, fault.At(op, fault.Invalid, fmt.Errorf("%s: %w", name, err))
	}
	if err := overlay(v, into, places, flags); err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	if err := v.UnmarshalExact(c, viper.DecoderConfigOption(tagged)); err != nil {
		return nil, fault.At(op, fault.Invalid, fmt.Errorf("%s, the environment or the flags: %w", name, err))
	}
	complete(into, dir)
	if found := append(checkFields(into), c.problems()...); len(found) > 0 {
		return nil, report(op, name, places, found)
	}
	return c, nil
}

// open finds the document, its version and its role.
func open(name string, file []byte) (*yaml.Node, Config, error) {
	const op = "configs.Load"
	bad := func(line int, format string, args ...any) error {
		return fault.At(op, fault.Invalid, fmt.Errorf("%s:%d: %s", name, line, fmt.Sprintf(format, args...)))
	}
	if len(file) > MaxFile {
		return nil, nil, bad(1, "the file is larger than %d bytes", MaxFile)
	}
	d := yaml.NewDecoder(bytes.NewReader(file))
	var doc yaml.Node
	if err := d.Decode(&doc); err != nil {
		return nil, nil, fault.At(op, fault.Invalid, fmt.Errorf("%s: %w", name, err))
	}
	var more yaml.Node
	if err := d.Decode(&more); err == nil {
		return nil, nil, bad(more.Line, "a second document begins here: one file holds one configuration")
	} else if !errors.Is(err, io.EOF) {
		return nil, nil, fault.At(op, fault.Invalid, fmt.Errorf("%s: %w", name, err))
	}
	if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
		return nil, nil, bad(1, "the file must be a mapping that begins with version: %s", Version)
	}
	root := doc.Content[0]
	version, role := &yaml.Node{Line: 1}, &yaml.Node{Line: 1}
	for i := 0; i+1 < len(root.Content); i += 2 {
		switch root.Content[i].Value {
		case "version":
			version = root.Content[i+1]
		case "role":
			role = root.Content[i+1]
		}
	}
	if version.Value != Version {
		return nil, nil, bad(version.Line, "version %q: this build reads version: %s", fault.Clip(version.Value), Version)
	}
	c := defaults(role.Value)
	if c == nil {
		return nil, nil, bad(role.Line, "role %q: use %s, %s or %s", fault.Clip(role.Value), RoleControl, RoleAppliance, RoleManagement)
	}
	return root, c, nil
}

// overlay gives viper the defaults and the two sources that go before the file, and notes what came from where.
func overlay(v *viper.Viper, into reflect.Value, places map[string]string, flags *pflag.FlagSet) error {
	var err error
	each(into, "", func(key string, f reflect.StructField, val reflect.Value) {
		if !val.IsZero() {
			v.SetDefault(key, plain(val))
		}
		if key == "version" || key == "role" || f.Type.Kind() == reflect.Map ||
			f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() != reflect.String {
			return
		}
		env := envPrefix + "_" + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
		if e := v.BindEnv(key, env); e != nil {
			err = e
		}
		if os.Getenv(env) != "" {
			places[key] = env + " in the environment"
		}
		if flags == nil {
			return
		}
		if fl := flags.Lookup(key); fl != nil && fl.Changed {
			if e := v.BindPFlag(key, fl); e != nil {
				err = e
			}
			places[key] = "--" + key
		}
	})
	return err
}

func plain(v reflect.Value) any {
	if d, ok := v.Interface().(time.Duration); ok {
		return d.String()
	}
	return v.Interface()
}

// each visits the fields of c that hold a value, a list or a map, with the dotted key of each. It looks into a
// section that is absent too, since the environment may bring it.
func each(v reflect.Value, prefix string, visit func(key string, f reflect.StructField, v reflect.Value)) {
	for i := range v.NumField() {
		f, val := v.Type().Field(i), v.Field(i)
		key := prefix + keyOf(f)
		if f.Type.Kind() == reflect.Pointer {
			if val.IsNil() {
				val = reflect.New(f.Type.Elem())
			}
			val = val.Elem()
		}
		if val.Kind() == reflect.Struct {
			each(val, key+".", visit)
			continue
		}
		visit(key, f, val)
	}
}

func keyOf(f reflect.StructField) string {
	key, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
	return key
}

// effective prints what holds. The caller has taken out what may be secret.
func effective(c any) ([]byte, error) {
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(c); err != nil {
		return nil, fault.At("configs.Effective", fault.Internal, err)
	}
	return b.Bytes(), fault.At("configs.Effective", fault.Internal, e.Close())
}

// Keys lists the keys of all roles that a flag of the same name may set, in order.
func Keys() []string {
	var out []string
	for _, c := range []any{Control{}, Appliance{}, Management{}} {
		each(reflect.ValueOf(c), "", func(key string, f reflect.StructField, _ reflect.Value) {
			list := f.Type.Kind() == reflect.Map || f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() != reflect.String
			if key != "version" && key != "role" && !list && !slices.Contains(out, key) {
				out = append(out, key)
			}
		})
	}
	slices.Sort(out)
	return out
}
