// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"bytes"
	"crypto/ed25519"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
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

// TestAnEndorsementLetsOneKeyInAtOneAppliance (MUTANTS.md: changes.go:114): of another key, for another appliance, or by a key that is
// not pinned, it lets nobody in.
func TestAnEndorsementLetsOneKeyInAtOneAppliance(t *testing.T) {
	second := key(5)
	o := newBook(t)
	must(t, o, book.Pin{Public: pem(t, customer)})
	of := func(at fleet.ApplianceID, k ed25519.PrivateKey) operation.Endorsement {
		return operation.Endorsement{Appliance: at, Key: keyOf(t, k)[0].ID}
	}
	for name, c := range map[string]struct {
		e  operation.Endorsement
		by ed25519.PrivateKey
	}{
		"of another key":        {of("eu-1", thief), customer},
		"of the key that signs": {of("eu-1", customer), customer},
		"of no key":             {operation.Endorsement{Appliance: "eu-1"}, customer},
		"for another appliance": {of("us-1", second), customer},
		"for no appliance":      {of("", second), customer},
		"by itself":             {of("eu-1", second), second},
		"by the vendor":         {of("eu-1", second), vendor},
	} {
		_, err := put(t, o, book.Pin{Public: pem(t, second), Endorsement: sealed(t, c.e, c.by)})
		if fault.Of(err) != fault.Denied || len(o.book.View().Pinned) != 1 {
			t.Errorf("an endorsement %s: %v, %d keys are pinned", name, err, len(o.book.View().Pinned))
		}
	}
	must(t, o, book.Pin{Public: pem(t, second), Endorsement: sealed(t, of("eu-1", second), customer)})
	must(t, o, consent(t, granted(fleet.Deploy, 1), second))
}

// TestTheVendorsLogHasOneKey (MUTANTS.md: changes.go:55): it is that of the first meeting.
func TestTheVendorsLogHasOneKey(t *testing.T) {
	o := newBook(t)
	refused(t, o, fault.Invalid, book.MeetVendor{LogKey: []byte("no key")})
	must(t, o, book.MeetVendor{LogKey: pem(t, key(6))})
	must(t, o, book.MeetVendor{LogKey: pem(t, key(6))})
	for _, other := range [][]byte{pem(t, key(7)), []byte("no key"), nil} {
		refused(t, o, fault.Denied, book.MeetVendor{LogKey: other})
	}
}

// TestARequestBindsTheTextOfItsTemplate (MUTANTS.md: orders.go:216): one for another text under the same name is not admitted.
func TestARequestBindsTheTextOfItsTemplate(t *testing.T) {
	o := deployed(t)
	must(t, o, consent(t, granted(fleet.OperateRead, 0), customer))
	other, err := operation.ParseTemplate([]byte(strings.Replace(o.template(t), "timeout: 10s", "timeout: 11s", 1)))
	if err != nil {
		t.Fatal(err)
	}
	for id, d := range map[string]fleet.Digest{"another-text": other.Digest(), "no-text": ""} {
		r, err := seal.Peek[operation.Request](o.request(t, id))
		if err != nil {
			t.Fatal(err)
		}
		if d == r.TemplateDigest {
			t.Fatal("the text is not another one")
		}
		r.TemplateDigest = d
		if why := take(t, o, book.Take{Operation: sealed(t, r, ann)}); why == "" || o.state(t, id) != operation.Rejected {
			t.Errorf("%s: %q, %s", id, why, o.state(t, id))
		} else if d != "" && !strings.Contains(why, "binds another text") {
			t.Errorf("%s: %q", id, why)
		}
	}
	if why := take(t, o, book.Take{Operation: o.request(t, "its-text")}); why != "" {
		t.Error(why)
	}
}

// TestADenySpeaksOfEffects (MUTANTS.md: orders.go:228): a deny meets the operations whose template declares the effect, when they
// are asked for and when they would begin.
func TestADenySpeaksOfEffects(t *testing.T) {
	deny := func(effect string) book.Consent {
		policy := `forbid (principal, action, resource) when { context.effects.contains("` + effect + `") };`
		return consent(t, grant.Deny{Appliance: "eu-1", Name: "no-" + effect, Cedar: policy, At: start, Nonce: nonce()}, customer)
	}
	for effect, declared := range map[string]bool{"credentials": true, "network": true, "writes": false} { // by the sample's template
		o := deployed(t)
		must(t, o, consent(t, granted(fleet.OperateRead, 0), customer))
		take(t, o, book.Take{Operation: o.request(t, "op-1")})
		must(t, o, deny(effect))
		want := operation.Requested
		if declared {
			want = operation.Rejected
		}
		why := take(t, o, book.Take{Operation: o.request(t, "op-2")})
		before, after := o.state(t, "op-1"), o.state(t, "op-2")
		if strings.Contains(why, "forbidden by no-"+effect) != declared || before != want || after != want {
			t.Errorf("%s is denied: %q; the one from before is %s, the one from after %s, want %s", effect, why, before, after, want)
		}
	}
}

// TestPresenceOfASecretIsTold (MUTANTS.md: deploy.go:271): on record as it is, and to the customer, as it comes and goes.
func TestPresenceOfASecretIsTold(t *testing.T) {
	p := newPlace(t)
	p.deployed()
	srv := httptest.NewServer(p.app.Handler())
	defer srv.Close()
	client := localv1connect.NewLocalClient(http.DefaultClient, srv.URL)
	told := func(there bool) {
		t.Helper()
		p.until("the presence of the secret is on record", func() bool {
			return slices.Equal(p.o.book.View().Status.Secrets, []book.Presence{{Name: "store-token", Present: there}})
		})
		m, err := client.Status(t.Context(), connect.NewRequest(&localv1.StatusRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		if s := m.Msg.GetSecrets(); len(s) != 1 || s[0].GetName() != "store-token" || s[0].GetPresent() != there {
			t.Errorf("the customer is told %v, want %v", s, there)
		}
	}
	told(false)
	file := filepath.Join(p.cfg.Secrets.Dir, "store-token")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	told(true)
	if err := os.Truncate(file, 0); err != nil {
		t.Fatal(err)
	}
	told(false)
}

// TestWhatAnApprovalAndAReleaseBind (MUTANTS.md consent.go:237 and 275, acts.go:128).
func TestWhatAnApprovalAndAReleaseBind(t *testing.T) {
	o := deployed(t)
	must(t, o, consent(t, granted(fleet.OperateRead, 0), customer))
	for _, id := range []string{"op-1", "op-2"} {
		take(t, o, book.Take{Operation: o.request(t, id)})
	}
	x, err := o.book.View().Operation("op-1")
	if err != nil {
		t.Fatal(err)
	}
	a := operation.Approval{ID: "op-1", Appliance: "eu-1", Request: fleet.DigestOf(x.Request), Decision: operation.DecisionApprove,
		Argv: x.Argv, At: o.now(), NotAfter: o.now().Add(time.Hour), Nonce: nonce()}
	for name, bad := range map[string]operation.Approval{
		// the same id, signed again
		"another request": edited(a, func(a *operation.Approval) { a.Request = fleet.DigestOf(o.request(t, "op-1")) }),
		"another command": edited(a, func(a *operation.Approval) { a.Argv = append(slices.Clone(a.Argv), "--all") }),
	} {
		if _, err := put(t, o, consent(t, bad, customer)); fault.Of(err) != fault.Conflict || o.state(t, "op-1") != operation.Requested {
			t.Errorf("%s: %v, %s", name, err, o.state(t, "op-1"))
		}
	}
	must(t, o, consent(t, edited(a, func(a *operation.Approval) { a.NotAfter = o.now().Add(10 * time.Minute) }), customer))
	must(t, o, o.approve(t, "op-2"))
	must(t, o, book.Start{ID: "op-2"})
	o.later(11 * time.Minute)
	if s := must(t, o, book.Start{ID: "op-1"}); s != operation.Expired {
		t.Errorf("an approval that ran out is %s", s)
	}
	result := sealed(t, operation.Result{ID: "op-2"}, vendor)
	must(t, o, book.Finish{ID: "op-2", Result: result, Output: []byte("hidden")})
	r := operation.Release{ID: "op-2", Appliance: "eu-1", Result: fleet.DigestOf(result), Decision: operation.DecisionRelease,
		Output: fleet.DigestOf([]byte("what was read")), At: o.now(), Nonce: nonce()}
	for _, out := range [][]byte{nil, []byte("another one"), bytes.Repeat([]byte("x"), book.MaxOutput+1)} {
		refused(t, o, fault.Conflict, book.Consent{Document: sealed(t, r, customer), Output: out})
	}
	refused(t, o, fault.Conflict, book.Consent{Document: sealed(t,
		edited(r, func(r *operation.Release) { r.Result = fleet.DigestOf([]byte("x")) }), customer), Output: []byte("what was read")})
	must(t, o, book.Consent{Document: sealed(t, r, customer), Output: []byte("what was read")})
	if s := o.state(t, "op-2"); s != operation.Released {
		t.Error(s)
	}
}
