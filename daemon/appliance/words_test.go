// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"bytes"
	"crypto/x509"
	enc "encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// started is a book in which the operation runs.
func started(t *testing.T, id string) *order {
	t.Helper()
	o := deployed(t)
	must(t, o, consent(t, granted(fleet.OperateRead, 0), customer))
	take(t, o, book.Take{Operation: o.request(t, id)})
	must(t, o, o.approve(t, id))
	if s := must(t, o, book.Start{ID: id}); s != operation.Running {
		t.Fatal(s)
	}
	return o
}

func (o *order) one(t *testing.T, id string) book.Operation {
	t.Helper()
	x, err := o.book.View().Operation(id)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// TestACancelBindsItsRequest: the customer's word against one request ends no other of the same id; it names what must be killed, and
// what comes of the operation afterwards is evidence without output.
func TestACancelBindsItsRequest(t *testing.T) {
	o := started(t, "op-1")
	c := operation.Cancel{ID: "op-1", Appliance: "eu-1", Request: fleet.DigestOf(o.one(t, "op-1").Request), At: o.now(), Nonce: nonce()}
	other := o.request(t, "op-1") // signed again
	refused(t, o, fault.Conflict, consent(t, edited(c, func(c *operation.Cancel) { c.Request = fleet.DigestOf(other) }), customer))
	refused(t, o, fault.Denied, consent(t, edited(c, func(c *operation.Cancel) { c.Appliance = "us-1" }), customer))
	refused(t, o, fault.Denied, consent(t, c, vendor))
	if done := must(t, o, consent(t, c, customer)); !slices.Equal(done.Stopped, []string{"op-1"}) ||
		o.state(t, "op-1") != operation.Cancelled {
		t.Fatalf("%+v, %s", done, o.state(t, "op-1"))
	}
	result := sealed(t, operation.Result{ID: "op-1"}, vendor)
	must(t, o, book.Finish{ID: "op-1", Result: result, Output: []byte("hidden")})
	if x := o.one(t, "op-1"); x.State != operation.Cancelled || len(x.Output) != 0 || !bytes.Equal(x.Result, result) {
		t.Errorf("%s, an output of %d bytes, a result of %d", x.State, len(x.Output), len(x.Result))
	}
}

// TestWhatIsWithheldIsGone: no output of it is left, and none was told. A document of before the end of the operation lets nothing out.
func TestWhatIsWithheldIsGone(t *testing.T) {
	o := started(t, "op-1")
	result := sealed(t, operation.Result{ID: "op-1", Ended: o.now().Add(time.Hour)}, vendor)
	must(t, o, book.Finish{ID: "op-1", Result: result, Output: []byte("hidden")})
	r := operation.Release{ID: "op-1", Appliance: "eu-1", Result: fleet.DigestOf(result), Decision: operation.DecisionWithhold, At: o.now(),
		Nonce: nonce()}
	early := edited(r, func(r *operation.Release) {
		r.Decision, r.Output = operation.DecisionRelease, fleet.DigestOf([]byte("hidden"))
	})
	refused(t, o, fault.Conflict, book.Consent{Document: sealed(t, early, customer), Output: []byte("hidden")})
	o.later(time.Hour)
	r.At = o.now()
	must(t, o, consent(t, r, customer))
	if x := o.one(t, "op-1"); x.State != operation.Withheld || len(x.Output) != 0 {
		t.Errorf("%s, an output of %d bytes", x.State, len(x.Output))
	}
	for _, rep := range o.book.View().Reports {
		if rep.Operation != nil && len(rep.Operation.Output) != 0 {
			t.Errorf("report of %s with an output", rep.Operation.State)
		}
	}
}

// TestNoReadablePrivateKeyIsLeftAtTheAppliance: beside the appliance's own files, no key of a customer whose private half lies there
// is pinned.
func TestNoReadablePrivateKeyIsLeftAtTheAppliance(t *testing.T) {
	p := newPlace(t)
	srv := httptest.NewServer(p.app.Handler())
	defer srv.Close()
	client := localv1connect.NewLocalClient(http.DefaultClient, srv.URL)
	der, err := x509.MarshalPKCS8PrivateKey(customer)
	if err != nil {
		t.Fatal(err)
	}
	private := enc.EncodeToMemory(&enc.Block{Type: "PRIVATE KEY", Bytes: der})
	pin := func() error {
		_, err := client.Pin(t.Context(), connect.NewRequest(&localv1.PinRequest{RequestId: nonce(), PublicKey: pem(t, customer)}))
		return err
	}
	if err := os.MkdirAll(filepath.Dir(p.cfg.Socket), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(p.cfg.Dir, "mine.pem"), filepath.Join(filepath.Dir(p.cfg.Socket), "mine")} {
		if err := os.WriteFile(path, private, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := pin(); err == nil || !strings.Contains(err.Error(), "lies readable in "+path) || len(p.o.book.View().Pinned) != 0 {
			t.Errorf("%s: %v, %d keys are pinned", path, err, len(p.o.book.View().Pinned))
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	if err := pin(); err != nil || len(p.o.book.View().Pinned) != 1 {
		t.Errorf("%v, %d keys are pinned", err, len(p.o.book.View().Pinned))
	}
}

// TestWhatEndsConsentIsReceipted: a revocation, a deny and a cancel are answered with a receipt that the appliance signed for that
// document.
func TestWhatEndsConsentIsReceipted(t *testing.T) {
	p := newPlace(t)
	p.operating(true)
	srv := httptest.NewServer(p.app.Handler())
	defer srv.Close()
	client := localv1connect.NewLocalClient(http.DefaultClient, srv.URL)
	list, err := client.ListOperations(t.Context(), connect.NewRequest(&localv1.ListOperationsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	own, err := seal.ParseKey(list.Msg.GetLogKey())
	if err != nil {
		t.Fatal(err)
	}
	op := p.o.one(t, "op-1")
	for name, c := range map[string]struct {
		document []byte
		receipt  bool
	}{
		"a grant": {sealed(t, granted(fleet.OperateAdmin, 1), customer), false},
		"a cancel": {sealed(t, operation.Cancel{ID: op.ID, Appliance: "eu-1", Request: fleet.DigestOf(op.Request), At: p.now(),
			Nonce: nonce()}, customer), true},
		"a revocation": {sealed(t, grant.Revoke{Appliance: "eu-1", Phase: fleet.OperateAdmin, At: start, Nonce: nonce()}, customer), true},
		"a deny": {sealed(t, grant.Deny{Appliance: "eu-1", Name: "no-admin",
			Cedar: `forbid (principal, action == Action::"operate.admin", resource);`,
			At:    start, Nonce: nonce()}, customer), true},
	} {
		m, err := client.Submit(t.Context(), connect.NewRequest(&localv1.SubmitRequest{RequestId: nonce(), Document: c.document}))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !c.receipt {
			if len(m.Msg.GetReceipt()) != 0 {
				t.Errorf("%s has a receipt", name)
			}
			continue
		}
		r, _, err := seal.Open[operation.Receipt](m.Msg.GetReceipt(), []seal.Key{own})
		if err != nil || r.Appliance != "eu-1" || r.Document != fleet.DigestOf(c.document) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}

// TestAPostureThatIsNotOnRecordOpensNothing: if the book does not take it, the doors are as before.
func TestAPostureThatIsNotOnRecordOpensNothing(t *testing.T) {
	p := newPlace(t)
	p.deployed()
	p.restart() // nothing works by itself, so nothing mends the doors later
	srv := httptest.NewServer(p.app.Handler())
	defer srv.Close()
	client := localv1connect.NewLocalClient(http.DefaultClient, srv.URL)
	set := func(m *localv1.SetPostureRequest) error {
		m.RequestId = "once"
		_, err := client.SetPosture(t.Context(), connect.NewRequest(m))
		return err
	}
	if err := set(&localv1.SetPostureRequest{Exposure: string(fleet.Allowlist), Allow: []string{"192.0.2.0/24"}}); err != nil {
		t.Fatal(err)
	}
	before, said := p.app.Doors(), p.o.book.View().Posture
	if len(before) != 1 || len(before[0].From) != 1 {
		t.Fatalf("%+v", before)
	}
	err := set(&localv1.SetPostureRequest{Exposure: string(fleet.Public)}) // under a request id that was used
	if connect.CodeOf(err) != connect.CodeAlreadyExists {
		t.Errorf("%v", err)
	}
	if after := p.app.Doors(); !reflect.DeepEqual(after, before) || !reflect.DeepEqual(p.o.book.View().Posture, said) {
		t.Errorf("the doors are %+v, and the posture on record %+v", after, p.o.book.View().Posture)
	}
}
