// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/appliance"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/operation"
)

// TestEachKindOfChangeGivesALeafThatIsVerified: FAULTS.md C1. At the bound of what a change may have, the leaf can be read.
func TestEachKindOfChangeGivesALeafThatIsVerified(t *testing.T) {
	book := appliance.NewBook("eu-1", "globex")
	n := leavesAtTheBound(t, book)
	if n < len(book.Kinds()) {
		t.Errorf("%d entries of %d kinds", n, len(book.Kinds()))
	}
}

// TestAnOperationsOutputAtItsLimitIsVerified: FAULTS.md C1. An honest operation whose output is as large as it may be.
func TestAnOperationsOutputAtItsLimitIsVerified(t *testing.T) {
	o := deployed(t)
	must(t, o, consent(t, granted(fleet.OperateRead, 0), customer))
	take(t, o, appliance.Take{Operation: o.request(t, "op-1")})
	must(t, o, o.approve(t, "op-1"))
	must(t, o, appliance.Start{ID: "op-1"})
	out := bytes.Repeat([]byte{7}, appliance.MaxOutput)
	result := sealed(t, operation.Result{ID: "op-1", Appliance: "eu-1", State: operation.Held, Started: o.now(), Ended: o.now()}, thief)
	must(t, o, appliance.Finish{ID: "op-1", Result: result, Output: out})
	must(t, o, appliance.Consent{Document: sealed(t, operation.Release{ID: "op-1", Appliance: "eu-1", Result: fleet.DigestOf(result), Decision: operation.DecisionRelease, Output: fleet.DigestOf(out), At: o.now(), Nonce: nonce()}, customer), Output: out})
	log := o.book.Log()
	for i := range log.Size() {
		e, err := audit.ParseEntry(log.Entry(i))
		if err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
		if e.Kind == (appliance.Finish{}).Kind() && (!bytes.Contains(e.Body, []byte(fleet.DigestOf(out))) || len(e.Body) > 64<<10) {
			t.Errorf("the entry does not name the output: %.300s", e.Body)
		}
	}
	if x, _ := o.book.View().Operation("op-1"); x.State != operation.Released {
		t.Errorf("it is %s", x.State)
	}
	if r := o.book.View().Reports; !bytes.Equal(r[len(r)-1].Operation.Output, out) {
		t.Error("the output does not go out")
	}
}

// leavesAtTheBound has each kind of change go into a book once for each of its texts and byte fields, with that one as long as
// a change may be, and reads each entry as the verifier does. It returns how many there are. Refused or not, they are on record.
func leavesAtTheBound(t *testing.T, book *ledger.Book[appliance.State]) int {
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
				if book.Rehearse(data) == nil {
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
