// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"crypto/ed25519"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
)

const ownLog, vendorLog = "acme.example/appliance/eu-1", "acme.example/control-plane"

func (o *order) head(t *testing.T, own ed25519.PrivateKey) []byte {
	t.Helper()
	signer, err := audit.NoteSigner(ownLog, own)
	if err != nil {
		t.Fatal(err)
	}
	log := o.book.Log()
	cp, err := audit.Checkpoint(ownLog, log.Size(), log.Root(), signer)
	if err != nil {
		t.Fatal(err)
	}
	return cp
}

// asks has the book ask the vendor to countersign a head of its log.
func (o *order) asks(t *testing.T, own ed25519.PrivateKey) []byte {
	t.Helper()
	cp := o.head(t, own)
	must(t, o, book.Checkpointed{Checkpoint: book.Checkpoint{Note: cp}})
	return cp
}

func cosign(t *testing.T, cp []byte, name string, by ed25519.PrivateKey) []byte {
	t.Helper()
	b, err := audit.Cosign(cp, name, by, start)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestTheVendorsRubbishIsNoCountersignature: an order with bytes that are no countersignature of the vendor over a head that
// was sent is refused with its size and digest, and the next good one is taken (FAULTS.md C2).
func TestTheVendorsRubbishIsNoCountersignature(t *testing.T) {
	own, log := key(7), key(8)
	o := newBook(t)
	must(t, o, book.MeetVendor{LogKey: pem(t, log)})
	first := o.asks(t, own)
	for name, b := range map[string][]byte{
		"rubbish":                    []byte("rubbish"),
		"the question":               first,
		"another key":                cosign(t, first, vendorLog, thief),
		"our own key":                cosign(t, first, ownLog, own),
		"a head that we did not ask": cosign(t, o.head(t, own), vendorLog, log), // the log grew since
	} {
		why := take(t, o, book.Take{Cosigned: b})
		if !strings.Contains(why, string(fleet.DigestOf(b))) {
			t.Errorf("%s: %q", name, why)
		}
		if s := o.book.View(); len(s.Cosigned) != 0 || len(s.Asked) != 1 {
			t.Fatalf("%s: it is kept, or the question is forgotten", name)
		}
	}
	second := o.asks(t, own)
	good := cosign(t, second, vendorLog, log)
	if why := take(t, o, book.Take{Cosigned: good}); why != "" {
		t.Fatal(why)
	}
	if s := o.book.View(); len(s.Cosigned) != 1 || len(s.Asked) != 0 {
		t.Fatalf("%d are kept, %d are asked for", len(s.Cosigned), len(s.Asked))
	}
	for name, b := range map[string][]byte{"the same again": good, "an older question": cosign(t, first, vendorLog, log)} {
		if why := take(t, o, book.Take{Cosigned: b}); why == "" || len(o.book.View().Cosigned) != 1 {
			t.Errorf("%s is taken", name)
		}
	}
	for range 2 * book.MaxAsked {
		o.asks(t, own)
	}
	if n := len(o.book.View().Asked); n != book.MaxAsked {
		t.Errorf("%d questions are kept, want %d", n, book.MaxAsked)
	}
}

// TestAWitnessedHeadThatIsSentAgainIsKeptOnce: the vendor did not take it, and gets it again.
func TestAWitnessedHeadThatIsSentAgainIsKeptOnce(t *testing.T) {
	o := newBook(t)
	for range 2 {
		take(t, o, book.Take{Witnessed: []byte("a head")})
	}
	s := o.book.View()
	if len(s.Witnessed) != 1 || len(s.Reports) != 2 {
		b, _ := json.Marshal(s.Reports)
		t.Errorf("%d are kept, and reported: %s", len(s.Witnessed), b)
	}
}

// TestNoApprovalThatAnAuditorWouldRefuse: its clock contradicts that of the request or of this host, so the chain could not be
// verified later; and what is let begin says when, so that a restart in the midst of it changes nothing about that.
func TestNoApprovalThatAnAuditorWouldRefuse(t *testing.T) {
	o := deployed(t)
	must(t, o, consent(t, granted(fleet.OperateRead, 1), customer))
	take(t, o, book.Take{Operation: o.request(t, "op-1")})
	x, err := o.book.View().Operation("op-1")
	if err != nil {
		t.Fatal(err)
	}
	for name, at := range map[string]time.Time{"before the request": o.now().Add(-time.Hour), "an hour from now": o.now().Add(time.Hour)} {
		a := operation.Approval{ID: "op-1", Appliance: "eu-1", Request: fleet.DigestOf(x.Request), Decision: operation.DecisionApprove,
			Argv: x.Argv,
			At:   at, NotAfter: at.Add(3 * time.Hour), Nonce: nonce()}
		if _, err := put(t, o, consent(t, a, customer)); err == nil || o.state(t, "op-1") != operation.Requested {
			t.Errorf("%s: %v, %s", name, err, o.state(t, "op-1"))
		}
	}
	must(t, o, o.approve(t, "op-1"))
	began := o.now()
	must(t, o, book.Start{ID: "op-1"})
	if x, err = o.book.View().Operation("op-1"); err != nil || !x.Started.Equal(began) {
		t.Errorf("it began at %s, want %s: %v", x.Started, began, err)
	}
}
