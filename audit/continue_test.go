// SPDX-License-Identifier: Apache-2.0

package audit_test

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// TestCountersigned: nothing is kept as a countersignature but one line of the witness below a checkpoint that was sent
// (FAULTS.md C2, I4).
func TestCountersigned(t *testing.T) {
	own, by, other := key(1), key(2), key(3)
	note := func(size int, by ed25519.PrivateKey) []byte {
		return checkpoint(t, origin, logOf(size), int64(size), by)
	}
	sign := func(cp []byte, name string, by ed25519.PrivateKey) []byte {
		b, err := audit.Cosign(cp, name, by, time.Unix(1_700_000_000, 0))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	sent := [][]byte{note(3, own), note(5, own)}
	v, err := audit.CosignVerifier(vendor, by.Public())
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range sent {
		h, at, err := audit.Countersigned(sign(s, vendor, by), sent, v)
		if err != nil || at != i || h.Size != int64(3+2*i) {
			t.Errorf("a good one: %+v, %d, %v", h, at, err)
		}
	}
	good := sign(sent[0], vendor, by)
	line := good[len(sent[0]):]
	for name, b := range map[string][]byte{
		"rubbish":                       []byte("rubbish"),
		"nothing":                       {},
		"the checkpoint as it was sent": sent[0],
		"another's line":                sign(sent[0], vendor, other),
		"another's line and name":       sign(sent[0], "someone", other),
		"the log's own line":            sign(sent[0], origin, own),
		"a head that was never sent":    sign(note(4, own), vendor, by),
		"another history":               sign(checkpoint(t, origin, logOf(2).AppendLeaf([]byte("x")), 3, own), vendor, by),
		"signed by another log":         sign(note(3, other), vendor, by),
		"two lines":                     sign(good, "someone", other),
		"the line of another head":      append(bytes.Clone(sent[1]), line...),
		"cut":                           good[:len(good)-1],
		"a byte more":                   append(bytes.Clone(good), 'x'),
		"huge":                          append(bytes.Clone(good), bytes.Repeat([]byte("x"), 1<<20)...),
		"a line without signature":      append(bytes.Clone(sent[0]), []byte("— "+vendor+" AAAA\n")...),
	} {
		_, _, err := audit.Countersigned(b, sent, v)
		if !errors.Is(err, fault.Denied) {
			t.Errorf("%s: %v, want denied", name, err)
		}
		if text := fault.Text(err); !strings.Contains(text, string(fleet.DigestOf(b))) || strings.Contains(text, "rubbish") {
			t.Errorf("%s: %q names no digest, or the bytes", name, text)
		}
	}
	if _, _, err := audit.Countersigned(good, nil, v); err == nil {
		t.Error("nothing was sent, and something is countersigned")
	}
	if _, _, err := audit.Countersigned(good, [][]byte{nil}, v); err == nil {
		t.Error("an empty checkpoint was countersigned")
	}
}
