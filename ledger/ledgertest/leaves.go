// SPDX-License-Identifier: Apache-2.0

// Package ledgertest holds tests that each book has in common.
package ledgertest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// LeavesAtTheBound has each kind of change go into a book once for each of its texts and byte fields, with that one as long as
// a change may be, and reads each entry as the verifier does. It returns how many there are. Refused or not, they are on record.
func LeavesAtTheBound[S any](t *testing.T, book *ledger.Book[S]) int {
	t.Helper()
	n := 0
	for _, kind := range book.Kinds() {
		for i := 0; ; i += each {
			c := book.Empty(kind)
			left := i
			if i > 0 && !fill(reflect.ValueOf(c), &left) {
				break
			}
			body, err := json.Marshal(c)
			if err != nil {
				continue // the field has a form of its own
			}
			n++
			meta, err := json.Marshal(ledger.Meta{At: time.Unix(int64(n), 0), By: fleet.Local, Request: fleet.RequestID(fmt.Sprint("bound", n))})
			if err != nil {
				t.Fatal(err)
			}
			data := fmt.Appendf(nil, `{"kind":%q,"meta":%s,"body":%s}`, kind, meta, body)
			if _, err := book.Apply(book.Index()+1, data); err != nil {
				if book.DryRun(data) == nil {
					t.Fatalf("%s: %v", kind, err)
				}
				n--
				continue // it is no change at all, and stays out of the log
			}
			leaf := book.Log().Entry(book.Log().Size() - 1)
			if _, err := audit.ParseEntry(leaf); err != nil {
				t.Errorf("%s, field %d: a leaf of %d bytes: %v", kind, i, len(leaf), err)
			}
		}
	}
	return n
}

// fill makes the text or the bytes of number *left, from 1, as long as a change may be, and reports whether there is one.
func fill(v reflect.Value, left *int) bool {
	const long = ledger.MaxChange/4*3 - 4<<10 // bytes, for base64 adds a third
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			if !v.CanSet() {
				return false
			}
			v.Set(reflect.New(v.Type().Elem()))
		}
		return fill(v.Elem(), left)
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() && fill(v.Field(i), left) {
				return true
			}
		}
	case reflect.String:
		if *left--; *left == 0 {
			v.SetString(strings.Repeat("x", long))
			return true
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			if *left--; *left == 0 {
				v.SetBytes(bytes.Repeat([]byte{'1'}, long))
				return true
			}
			return false
		}
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		return fill(v.Index(0), left)
	}
	return false
}
