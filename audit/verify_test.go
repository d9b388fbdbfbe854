// SPDX-License-Identifier: Apache-2.0

package audit_test

import (
	"crypto"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
)

const (
	vendor  = "acme.example/control-plane"
	witness = "acme.example/control-plane/witness"
)

// evidence is a whole bundle: the appliance's log of 10 entries with checkpoints at 3, 6 and 10, cosigned at 6 by the
// vendor, and the vendor's log of 4 of which the appliance kept the checkpoint at 2.
func evidence(t testing.TB) (audit.Bundle, audit.Pins) {
	t.Helper()
	l, v := logOf(10), logOf(4)
	at6 := checkpoint(t, origin, l, 6, key(1))
	co, err := audit.Cosign(at6, witness, key(3), t0.Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	a, err := audit.Collect(origin, key(1).Public(), l,
		[][]byte{checkpoint(t, origin, l, 3, key(1)), at6, checkpoint(t, origin, l, 10, key(1))}, [][]byte{co})
	if err != nil {
		t.Fatal(err)
	}
	b, err := audit.Collect(vendor, key(2).Public(), v, [][]byte{checkpoint(t, vendor, v, 4, key(2))}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return audit.Bundle{Logs: []audit.LogEvidence{a, b}, Witnessed: []string{string(checkpoint(t, vendor, v, 2, key(2)))},
			Documents: []string{}},
		audit.Pins{Logs: map[string]crypto.PublicKey{origin: key(1).Public(), vendor: key(2).Public()},
			Witnesses: map[string]crypto.PublicKey{witness: key(3).Public()}}
}

func encode(t testing.TB, b audit.Bundle) []byte {
	t.Helper()
	out, err := b.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestVerifyWhole(t *testing.T) {
	b, pins := evidence(t)
	r, err := audit.Verify(encode(t, b), pins)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Logs) != 2 || r.Logs[0].Size != 10 || r.Logs[0].Witnessed != 6 || !r.Logs[0].WitnessedAt.Equal(t0.Add(time.Minute)) ||
		!r.Logs[0].First.Equal(t0) || !r.Logs[0].Last.Equal(t0.Add(9*time.Second)) || r.Logs[1].Witnessed != 0 {
		t.Errorf("Report.Logs = %+v", r.Logs)
	}
	if r.Logs[0].Lag != 3*time.Second || r.Logs[1].Lag != 3*time.Second { // entries 6 to 9, and all 4
		t.Errorf("not witnessed: %s and %s", r.Logs[0].Lag, r.Logs[1].Lag)
	}
	if len(r.Missing) != 0 || r.Unchecked != 0 || len(r.Unpaired) != 0 {
		t.Errorf("Report = %+v", r)
	}
	// Formatting the file anew changes nothing.
	compact, err := json.Marshal(json.RawMessage(encode(t, b)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Verify(compact, pins); err != nil {
		t.Errorf("the compacted file: %v", err)
	}
	b.Logs = b.Logs[:1]
	if r, err = audit.Verify(encode(t, b), pins); err != nil || len(r.Unpaired) != 1 || r.Unpaired[0].Size != 2 ||
		!slices.Equal(r.Missing, []string{vendor}) {
		t.Errorf("without the vendor's log: %+v, %v", r, err)
	}
	delete(pins.Logs, vendor)
	if r, err = audit.Verify(encode(t, b), pins); err != nil || r.Unchecked != 1 || len(r.Unpaired) != 0 {
		t.Errorf("without the vendor's key: %+v, %v", r, err)
	}
}

// forge makes the log's owner rewrite an entry and sign the new history with the genuine key.
func forge(t testing.TB, b *audit.Bundle, name string, k crypto.Signer, n, at int) {
	var l audit.Log
	for i := range n {
		e := entry(i)
		if i == at {
			e.Detail = "rewritten"
		}
		l = l.Append(e)
	}
	for i := range b.Logs {
		if b.Logs[i].Origin == name {
			ev, err := audit.Collect(name, k.Public(), l, [][]byte{checkpoint(t, name, l, int64(n), k)}, nil)
			if err != nil {
				t.Fatal(err)
			}
			ev.Cosignatures = b.Logs[i].Cosignatures
			b.Logs[i] = ev
		}
	}
}

func TestVerifyFinds(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil  func(t *testing.T, b *audit.Bundle, p *audit.Pins)
		breach audit.Breach
		kind   fault.Kind
		text   string
	}{
		"an edit": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			b.Logs[0].Entries[4] = strings.Replace(b.Logs[0].Entries[4], "r4", "r5", 1)
		}, audit.Edited, fault.Conflict, "entry 4 is not"},
		"an edit without hashes": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			b.Logs[0].Entries[4], b.Logs[0].Hashes = strings.Replace(b.Logs[0].Entries[4], "r4", "r5", 1), nil
		}, audit.Edited, fault.Conflict, "entries 3 to 5"},
		"an edit with its hash edited": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			b.Logs[0].Entries[4] = strings.Replace(b.Logs[0].Entries[4], "r4", "r5", 1)
			b.Logs[0].Hashes[4] = b.Logs[0].Hashes[5]
		}, audit.Edited, fault.Conflict, "entries 3 to 5"},
		"two entries swapped": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			e := b.Logs[0].Entries
			e[7], e[8] = e[8], e[7]
		}, audit.Edited, fault.Conflict, "entry 7 is not"},
		"an omission": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			b.Logs[0].Entries = slices.Delete(b.Logs[0].Entries, 4, 5)
		}, audit.Omitted, fault.Conflict, "entry 4 was left out"},
		"an omission without hashes": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			b.Logs[0].Entries, b.Logs[0].Hashes = slices.Delete(b.Logs[0].Entries, 4, 5), nil
		}, audit.Omitted, fault.Conflict, "entries 3 to 5"},
		"the tail cut": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			b.Logs[0].Entries, b.Logs[0].Hashes = b.Logs[0].Entries[:8], nil
		}, audit.Omitted, fault.Conflict, "entry 8 and what follows"},
		"the tail and its checkpoint cut, the witness remembers": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			b.Logs[1].Entries, b.Logs[1].Hashes = b.Logs[1].Entries[:1], nil
			b.Logs[1].Checkpoints = []string{string(checkpoint(t, vendor, logOf(1), 1, key(2)))}
		}, audit.Omitted, fault.Conflict, "witnessed checkpoint 0 has 2 entries, and entry 1"},
		"an uncovered tail": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			b.Logs[0].Entries = append(b.Logs[0].Entries, string(entry(10).Leaf()))
		}, audit.Uncovered, fault.Denied, "entry 10 and what follows"},
		"no checkpoint": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) { b.Logs[0].Checkpoints = nil }, audit.Uncovered, fault.Denied,
			"no checkpoint"},
		"a rewritten log against what was witnessed": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			forge(t, b, vendor, key(2), 4, 1)
		}, audit.Forked, fault.Conflict, "witnessed checkpoint 0, of 2 entries, is not a beginning"},
		"a rewritten log against its cosignature": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			forge(t, b, origin, key(1), 10, 1)
		}, audit.Forked, fault.Conflict, "entries 0 to 5"},
		"a rewritten log cut below its cosignature": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			forge(t, b, origin, key(1), 5, 1)
		}, audit.Omitted, fault.Conflict, "signed 6 entries"},
		"two checkpoints of one size": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			b.Logs[0].Checkpoints = append(b.Logs[0].Checkpoints, string(checkpoint(t, origin, logOf(2).Append(entry(9)), 3, key(1))))
		}, audit.Forked, fault.Conflict, "two histories of 3 entries"},
		"two witnessed of one size": {func(t *testing.T, b *audit.Bundle, _ *audit.Pins) {
			b.Logs = b.Logs[:1]
			b.Witnessed = append(b.Witnessed, string(checkpoint(t, vendor, logOf(1).Append(entry(9)), 2, key(2))))
		}, audit.Forked, fault.Conflict, "second history of 2 entries"},
		"another key": {func(t *testing.T, b *audit.Bundle, p *audit.Pins) { p.Logs[origin] = key(9).Public() }, audit.Unsigned, fault.Denied,
			"another key"},
		"another key, unsaid": {func(t *testing.T, b *audit.Bundle, p *audit.Pins) {
			p.Logs[origin], b.Logs[0].Key = key(9).Public(), ""
		}, audit.Unsigned, fault.Denied, "checkpoint 0"},
		"no pin": {func(t *testing.T, b *audit.Bundle, p *audit.Pins) { delete(p.Logs, origin) }, audit.Unsigned, fault.Denied,
			"no key is pinned"},
		"an empty log": {func(t *testing.T, b *audit.Bundle, p *audit.Pins) {
			b.Logs[0], _ = audit.Collect(origin, key(1).Public(), audit.Log{}, [][]byte{checkpoint(t, origin, audit.Log{}, 0, key(1))}, nil)
		}, audit.Omitted, fault.Denied, "is empty"},
		"another log's checkpoint": {func(t *testing.T, b *audit.Bundle, p *audit.Pins) {
			l := logOf(10)
			n, _ := audit.Checkpoint(vendor, 10, l.Root(), signer(t, origin, key(1)))
			b.Logs[0].Checkpoints = []string{string(n)}
		}, audit.Unsigned, fault.Denied, "of another log"},
		"a witness is needed": {func(t *testing.T, b *audit.Bundle, p *audit.Pins) { p.NeedWitness = true }, audit.Unwitnessed, fault.Denied,
			vendor},
		"its own key is no witness": {func(t *testing.T, b *audit.Bundle, p *audit.Pins) {
			selfWitnessed(t, b, p, origin)
		}, audit.Unwitnessed, fault.Denied, origin},
		"nor under another name": {func(t *testing.T, b *audit.Bundle, p *audit.Pins) {
			selfWitnessed(t, b, p, "somebody.else")
		}, audit.Unwitnessed, fault.Denied, origin},
		"witnessed once, and never again": {func(t *testing.T, b *audit.Bundle, p *audit.Pins) {
			b.Logs, p.WitnessLag = b.Logs[:1], 2*time.Second
		}, audit.Unwitnessed, fault.Denied, "entry 6 and what follows, made within 3s"},
		"a log twice": {func(t *testing.T, b *audit.Bundle, p *audit.Pins) { b.Logs[1].Origin = origin }, "", fault.Invalid, "twice"},
		"no log":      {func(t *testing.T, b *audit.Bundle, p *audit.Pins) { b.Logs = nil }, "", fault.Invalid, "nothing to verify"},
		"signed nonsense": {func(t *testing.T, b *audit.Bundle, p *audit.Pins) {
			l := logOf(1).AppendLeaf([]byte("nonsense"))
			b.Logs[0], _ = audit.Collect(origin, key(1).Public(), l, [][]byte{checkpoint(t, origin, l, 2, key(1))}, nil)
		}, "", fault.Invalid, "entry 1 was signed and can't be read"},
	} {
		t.Run(name, func(t *testing.T) {
			b, pins := evidence(t)
			tc.spoil(t, &b, &pins)
			_, err := audit.Verify(encode(t, b), pins)
			if fault.Of(err) != tc.kind || !strings.Contains(fault.Text(err), tc.text) {
				t.Errorf("Verify = %v\nwant %q with %q", err, tc.kind, tc.text)
			}
			if tc.breach != "" && !errors.Is(err, tc.breach) {
				t.Errorf("Verify = %v, want the breach %q", err, tc.breach)
			}
		})
	}
}

// selfWitnessed rewrites the log, and has its own key countersign that under a name that is pinned as a witness (FAULTS.md C6).
func selfWitnessed(t *testing.T, b *audit.Bundle, p *audit.Pins, name string) {
	forge(t, b, origin, key(1), 10, 1)
	co, err := audit.Cosign([]byte(b.Logs[0].Checkpoints[0]), name, key(1), t0)
	if err != nil {
		t.Fatal(err)
	}
	b.Logs = b.Logs[:1]
	b.Logs[0].Cosignatures = []string{string(co)}
	p.Witnesses[name], p.NeedWitness = key(1).Public(), true
}

// TestWitnessLag: what is witnessed up to now passes, and what is not is allowed for as long as the auditor says.
func TestWitnessLag(t *testing.T) {
	b, pins := evidence(t)
	b.Logs, pins.WitnessLag = b.Logs[:1], 3*time.Second
	if _, err := audit.Verify(encode(t, b), pins); err != nil {
		t.Error(err)
	}
	co, err := audit.Cosign([]byte(b.Logs[0].Checkpoints[2]), witness, key(3), t0.Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	b.Logs[0].Cosignatures, pins.WitnessLag = append(b.Logs[0].Cosignatures, string(co)), 1
	if r, err := audit.Verify(encode(t, b), pins); err != nil || r.Logs[0].Lag != 0 || r.Logs[0].Witnessed != 10 {
		t.Errorf("%+v, %v", r.Logs, err)
	}
}

// TestRubbishSpoilsNoLog: what others sent for a log and is no cosignature of it is told and passed over; what its own key signed
// over another history is a fork all the same (FAULTS.md C2, I4).
func TestRubbishSpoilsNoLog(t *testing.T) {
	b, pins := evidence(t)
	pins.NeedWitness = true
	b.Logs = b.Logs[:1]
	other, err := audit.Cosign(checkpoint(t, origin, logOf(6), 6, key(9)), witness, key(3), t0)
	if err != nil {
		t.Fatal(err)
	}
	forged, err := audit.Cosign(checkpoint(t, origin, logOf(6), 6, key(1)), witness, key(9), t0)
	if err != nil {
		t.Fatal(err)
	}
	b.Logs[0].Cosignatures = append([]string{"rubbish", "", string(other), b.Witnessed[0]}, append(b.Logs[0].Cosignatures, string(forged))...)
	r, err := audit.Verify(encode(t, b), pins)
	if err != nil || len(r.Logs[0].Worthless) != 4 || r.Logs[0].Witnessed != 6 {
		t.Errorf("%+v, %v", r.Logs, err)
	}
	b.Logs[0].Cosignatures = b.Logs[0].Cosignatures[:4]
	if _, err := audit.Verify(encode(t, b), pins); !errors.Is(err, audit.Unwitnessed) {
		t.Errorf("nothing but rubbish: %v", err)
	}
	fork, err := audit.Cosign(checkpoint(t, origin, logOf(5).Append(entry(9)), 6, key(1)), witness, key(9), t0)
	if err != nil {
		t.Fatal(err)
	}
	b.Logs[0].Cosignatures = append(b.Logs[0].Cosignatures, string(fork))
	if _, err := audit.Verify(encode(t, b), pins); !errors.Is(err, audit.Forked) {
		t.Errorf("a fork among rubbish: %v", err)
	}
}

// TestEachEntryIsGuarded spoils each entry in turn, in each way, and wants it named.
func TestEachEntryIsGuarded(t *testing.T) {
	for i := range 10 {
		b, pins := evidence(t)
		b.Logs[0].Entries[i] = strings.Replace(b.Logs[0].Entries[i], `"by":"local"`, `"by":"other"`, 1)
		if _, err := audit.Verify(encode(t, b), pins); !errors.Is(err, audit.Edited) ||
			!strings.Contains(fault.Text(err), "entry "+string(rune('0'+i))+" ") {
			t.Errorf("an edit of entry %d: %v", i, err)
		}
		b, _ = evidence(t)
		b.Logs[0].Entries = slices.Delete(b.Logs[0].Entries, i, i+1)
		if _, err := audit.Verify(encode(t, b), pins); !errors.Is(err, audit.Omitted) ||
			!strings.Contains(fault.Text(err), "entry "+string(rune('0'+i))+" ") {
			t.Errorf("an omission of entry %d: %v", i, err)
		}
	}
}

func FuzzVerify(f *testing.F) {
	b, pins := evidence(f)
	f.Add(encode(f, b))
	b.Witnessed, b.Documents, b.Logs[0].Hashes = nil, nil, nil
	f.Add(encode(f, b))
	f.Add([]byte(`{"version":"demarc-evidence/1","logs":[{"origin":""}],"witnessed":["\n"],"documents":[""]}`))
	want := logOf(10)
	f.Fuzz(func(t *testing.T, file []byte) {
		r, err := audit.Verify(file, pins)
		if err != nil {
			return
		}
		for _, l := range r.Logs { // whatever passes is a beginning of the history that the keys signed
			if root, err := want.RootAt(l.Size); err != nil || root != l.Root {
				t.Fatalf("a history that was never signed passes: %+v", l)
			}
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	var l audit.Log
	leaf := entry(1).Leaf()
	b.ReportAllocs()
	for b.Loop() {
		l = l.AppendLeaf(leaf)
	}
}
