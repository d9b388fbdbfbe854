// SPDX-License-Identifier: Apache-2.0

package ledger_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

type blob struct {
	Text string `json:"text"`
	Big  []byte `json:"big,omitempty"`
}

func (blob) Kind() string                              { return "test.blob/1" }
func (blob) Apply(*struct{}, ledger.Meta) (int, error) { return 1, nil }

type shown struct {
	Text string `json:"text"`
	Big  []byte `json:"big,omitempty"`
}

func (shown) Kind() string                              { return "test.shown/1" }
func (shown) Apply(*struct{}, ledger.Meta) (int, error) { return 1, nil }
func (s shown) Record() any {
	return struct {
		Text string      `json:"text"`
		Big  *ledger.Cut `json:"big,omitempty"`
	}{s.Text, ledger.CutOf(s.Big)}
}

// TestALeafIsNeverTooLarge: FAULTS.md C1. A change of any size that the book takes gives a leaf that the verifier reads.
func TestALeafIsNeverTooLarge(t *testing.T) {
	book := ledger.NewBook(struct{}{}, ledger.Learn[blob](), ledger.Learn[shown]())
	n := uint64(0)
	put := func(c ledger.Change[struct{}, int]) audit.Entry {
		t.Helper()
		n++
		data, err := ledger.Encode(ledger.Meta{At: start, By: fleet.Local, Request: fleet.RequestID(strings.Repeat("r", int(n)))}, c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := book.Apply(n, data); err != nil {
			t.Fatal(err)
		}
		leaf := book.Log().Entry(int64(n) - 1)
		e, err := audit.ParseEntry(leaf)
		if err != nil {
			t.Fatalf("a leaf of %d bytes: %v", len(leaf), err)
		}
		return e
	}
	for _, size := range []int{1, audit.MaxLeaf - 300, audit.MaxLeaf, ledger.MaxChange - 400} {
		for _, letter := range []string{"x", "\u2028"} {
			c := blob{Text: strings.Repeat(letter, size/len(letter))}
			if body, _ := json.Marshal(c); len(body) > ledger.MaxChange-300 {
				continue // it is no change
			}
			if e := put(c); e.Body == nil && e.BodyDigest == "" {
				t.Error("neither a body nor its digest")
			}
		}
	}
	small := put(blob{Text: "x"})
	if string(small.Body) != `{"text":"x"}` {
		t.Errorf("a small body is %s", small.Body)
	}
	big := bytes.Repeat([]byte{1}, 5<<20)
	if e := put(shown{"x", big}); !bytes.Contains(e.Body, []byte(fleet.DigestOf(big))) {
		t.Errorf("the entry does not name what was cut: %.200s", e.Body)
	}
}
