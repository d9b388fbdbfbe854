// SPDX-License-Identifier: Apache-2.0

package audit_test

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/audit"
)

// TestARestartedLogIsToldFromAFork: a log that was set back says so in an entry, and heads that were countersigned before and are not in it
// are named as lost. What was countersigned afterwards, what was set back in silence, and a tail that is left out are what they always
// were. FAULTS.md I3.
func TestARestartedLogIsToldFromAFork(t *testing.T) {
	const origin, witness = "acme.example/control-plane", "acme.example/appliance/eu-1"
	_, own, _ := ed25519.GenerateKey(rand.Reader)
	_, theirs, _ := ed25519.GenerateKey(rand.Reader)
	begun := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	signer, err := audit.NoteSigner(origin, own)
	if err != nil {
		t.Fatal(err)
	}
	add := func(l audit.Log, kind string, body any) audit.Log {
		b, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		return l.Append(audit.Entry{At: begun, By: "test", Request: "r", Kind: kind, Body: b})
	}
	more := func(l audit.Log, n int, what string) audit.Log {
		for i := range n {
			l = add(l, "x/1", map[string]any{"n": i, "what": what})
		}
		return l
	}
	cosigned := func(l audit.Log, at time.Time) []byte {
		cp, err := audit.Checkpoint(origin, l.Size(), l.Root(), signer)
		if err == nil {
			cp, err = audit.Cosign(cp, witness, theirs, at)
		}
		if err != nil {
			t.Fatal(err)
		}
		return cp
	}
	kept := more(audit.Log{}, 10, "kept")
	old := more(kept, 20, "forgotten")
	restart := func(size int) any {
		return map[string]any{"epoch": map[string]any{"number": 7, "id": "x", "cause": "restore", "begun": begun, "size": size}}
	}
	now := more(add(kept, audit.RestartKind, restart(10)), 5, "since")
	before, after := begun.Add(-time.Minute), begun.Add(time.Hour)
	for what, tc := range map[string]struct {
		log   audit.Log
		heads [][]byte
		want  error
		lost  int64
	}{
		"announced":               {now, [][]byte{cosigned(kept, before), cosigned(old, before), cosigned(now, after)}, nil, 20},
		"announced, of one size":  {now, [][]byte{cosigned(more(kept, 6, "forgotten"), before), cosigned(now, after)}, nil, 6},
		"countersigned after it":  {now, [][]byte{cosigned(more(kept, 5, "forgotten"), after)}, audit.Forked, 0},
		"a tail that is left out": {now, [][]byte{cosigned(more(now, 3, "hidden"), after)}, audit.Omitted, 0},
		"in silence":              {more(kept, 6, "since"), [][]byte{cosigned(more(kept, 3, "forgotten"), before)}, audit.Forked, 0},
		"of another place than it says": {more(add(kept, audit.RestartKind, restart(4)), 5, "since"),
			[][]byte{cosigned(more(kept, 3, "forgotten"), before)}, audit.Forked, 0},
		"what was kept is not untouched": {now, [][]byte{cosigned(more(audit.Log{}, 8, "other"), before)}, audit.Forked, 0},
	} {
		for _, where := range []string{"cosignatures", "witnessed"} {
			t.Run(fmt.Sprint(what, ", among the ", where), func(t *testing.T) {
				cp, err := audit.Checkpoint(origin, tc.log.Size(), tc.log.Root(), signer)
				if err != nil {
					t.Fatal(err)
				}
				b := audit.Bundle{Version: audit.BundleVersion, Witnessed: []string{}, Documents: []string{}}
				var own2 [][]byte
				for _, h := range tc.heads {
					if where == "witnessed" {
						b.Witnessed = append(b.Witnessed, string(h))
					} else {
						own2 = append(own2, h)
					}
				}
				e, err := audit.Collect(origin, own.Public(), tc.log, [][]byte{cp}, own2)
				if err != nil {
					t.Fatal(err)
				}
				b.Logs = []audit.LogEvidence{e}
				enc, err := b.Encode()
				if err != nil {
					t.Fatal(err)
				}
				r, err := audit.Verify(enc,
					audit.Pins{Logs: map[string]crypto.PublicKey{origin: own.Public()}, Witnesses: map[string]crypto.PublicKey{witness: theirs.Public()}})
				if !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
					t.Fatalf("%v, want %v", err, tc.want)
				}
				if tc.want == nil && (len(r.Logs[0].Restarts) != 1 || r.Logs[0].Restarts[0].Lost != tc.lost || r.Logs[0].Restarts[0].Kept != 10) {
					t.Errorf("%+v, want %d lost", r.Logs[0].Restarts, tc.lost)
				}
			})
		}
	}
}
