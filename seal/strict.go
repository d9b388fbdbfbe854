// SPDX-License-Identifier: Apache-2.0

package seal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode/utf8"

	jsonv2 "github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	jsonv1 "github.com/go-json-experiment/json/v1"

	"github.com/demarc-dev/demarc/fault"
)

const maxDepth = 64 // nesting of a JSON document

// StrictJSON reads exactly one JSON value into v. Unknown fields, fields in another letter case, a key that is given twice in one object,
// trailing data, text that is not UTF-8 and nesting beyond 64 are refused, with line and column. The caller bounds the size.
//
// What is right is read once; what is not is read again, by slower code that decides alone and knows the place.
func StrictJSON(b []byte, v any) error {
	if plain(b, v) {
		return nil
	}
	return placed(b, v)
}

// JSON is json.Marshal, byte for byte, by the second version of that package, which is faster.
func JSON(v any) ([]byte, error) { return jsonv2.Marshal(v, jsonv1.DefaultOptionsV1()) }

// onePass has the second version of encoding/json read as the first does, and refuse what [StrictJSON] refuses.
var onePass = jsonv2.JoinOptions(jsonv1.DefaultOptionsV1(), jsonv2.RejectUnknownMembers(true),
	jsonv2.MatchCaseInsensitiveNames(false), jsontext.AllowDuplicateNames(false), jsontext.AllowInvalidUTF8(false))

// plain reads a document that is not deep, and leaves v as it was where it can't.
func plain(b []byte, v any) bool {
	p := reflect.ValueOf(v)
	if p.Kind() != reflect.Pointer || p.IsNil() || bytes.Count(b, []byte("{"))+bytes.Count(b, []byte("[")) > maxDepth {
		return false
	}
	was := reflect.New(p.Type().Elem()).Elem()
	was.Set(p.Elem())
	if jsonv2.Unmarshal(b, v, onePass) == nil {
		return true
	}
	p.Elem().Set(was)
	return false
}

// placed reads in two passes, and says where a document is wrong.
func placed(b []byte, v any) error {
	const op = "seal.StrictJSON"
	if !utf8.Valid(b) {
		return fault.New(op, fault.Invalid, "the text is not UTF-8")
	}
	if err := shape(op, b); err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		if text, ok := written(err); ok {
			return fault.Because(err, op, fault.Invalid, "%s", text)
		}
		at := d.InputOffset()
		var te *json.UnmarshalTypeError
		if errors.As(err, &te) {
			return fault.Because(err, op, fault.Invalid, "%s: field %q can't hold a JSON %s", place(b, te.Offset), fault.Clip(te.Field),
				fault.Clip(te.Value))
		}
		return fault.Because(err, op, fault.Invalid, "%s: %s", place(b, at), fault.ClipTo(strings.TrimPrefix(err.Error(), "json: "), 160))
	}
	return sameCase(op, b, v)
}

// sameCase refuses what only a reader that folds letters takes: others would read another document.
func sameCase(op string, b []byte, v any) error {
	err := jsonv2.Unmarshal(b, reflect.New(reflect.TypeOf(v).Elem()).Interface(), onePass)
	if err == nil {
		return nil
	}
	if text, ok := written(err); ok {
		return fault.Because(err, op, fault.Invalid, "%s", text)
	}
	return fault.Because(err, op, fault.Invalid, "%s: upper and lower case count in names",
		fault.ClipTo(strings.TrimPrefix(err.Error(), "json: "), 160))
}

// written finds the sentence of a fault that a type's own UnmarshalJSON gave.
func written(err error) (string, bool) {
	var f *fault.Error
	if errors.As(err, &f) && f.Text != "" {
		return f.Text, true
	}
	return "", false
}

// shape walks the tokens once: duplicate keys, depth, trailing data.
func shape(op string, b []byte) error {
	type level struct {
		keys map[string]bool // nil for an array
		key  bool            // the next token is a key
	}
	var stack []level
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	done := false
	for {
		start := d.InputOffset()
		tok, err := d.Token()
		if errors.Is(err, io.EOF) && done {
			return nil
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fault.Because(err, op, fault.Invalid, "%s: not JSON: %s", place(b, max(start, d.InputOffset())), fault.ClipTo(err.Error(), 160))
		}
		if done {
			return fault.New(op, fault.Invalid, "%s: data after the end of the document", place(b, d.InputOffset()))
		}
		top := len(stack) - 1
		if top >= 0 && stack[top].keys != nil && stack[top].key {
			if name, ok := tok.(string); ok {
				if stack[top].keys[name] {
					return fault.New(op, fault.Invalid, "%s: the key %q is given twice", place(b, d.InputOffset()), fault.Clip(name))
				}
				stack[top].keys[name], stack[top].key = true, false
				continue
			}
		}
		switch tok {
		case json.Delim('{'):
			stack = append(stack, level{keys: map[string]bool{}, key: true})
		case json.Delim('['):
			stack = append(stack, level{})
		case json.Delim('}'), json.Delim(']'):
			stack = stack[:top]
		}
		if len(stack) > maxDepth {
			return fault.New(op, fault.Invalid, "%s: nested deeper than %d", place(b, d.InputOffset()), maxDepth)
		}
		if open := tok == json.Delim('{') || tok == json.Delim('['); !open {
			if n := len(stack) - 1; n >= 0 {
				stack[n].key = stack[n].keys != nil
			}
		}
		done = len(stack) == 0
	}
}

// place spells an offset for people.
func place(b []byte, off int64) string {
	off = min(max(off, 0), int64(len(b)))
	before := b[:off]
	line := bytes.Count(before, []byte("\n")) + 1
	col := len(before) - (bytes.LastIndexByte(before, '\n') + 1) + 1
	return fmt.Sprintf("line %d, column %d", line, col)
}
