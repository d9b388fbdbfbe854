// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

// TestOperatorsAreWaitedFor (FAULTS.md I1): a CA issues only once each operator with a valid certificate who called lately holds it.
func TestOperatorsAreWaitedFor(t *testing.T) {
	o := &order{book: book.NewBook()}
	ca, err := identity.NewCA(domain, time.Now(), rand.Reader, identity.DefaultCALife)
	ok(t, err)
	next, err := identity.NewCA(domain, time.Now(), rand.Reader, identity.DefaultCALife)
	ok(t, err)
	slots := []identity.Slot{{Stage: identity.Active, CertDER: ca.Cert.Raw, SealedKey: []byte("k")}}
	issuer := slots[0].ID()
	year := start.AddDate(1, 0, 0)
	must(t, o, book.GenesisWith{Genesis: book.Genesis{TrustDomain: domain, Slots: slots}, Operator: book.FirstOperator{Name: "ann", Serial: "a", Till: year, Issuer: issuer}})
	joins := func(name string, till time.Time, bundle uint64) {
		t.Helper()
		v := fleet.DigestOf([]byte(name))
		at := start.Add(time.Duration(o.n) * time.Second)
		must(t, o, book.InviteOperator{Name: name, Role: fleet.Viewer, Verifier: v, Till: at.Add(time.Hour)})
		must(t, o, book.EnrolOperator{Name: name, Verifier: v, Key: v, Serial: fleet.Serial(name), Till: till, Issuer: issuer, Bundle: bundle})
	}
	joins("away", year, 1)
	o.n += 31 * 24 * 3600 // more than 30 days later
	now := func() time.Time { return start.Add(time.Duration(o.n) * time.Second) }
	joins("ben", year, 1)
	joins("brief", now().Add(10*time.Second), 1)
	must(t, o, book.PrepareCA{Cert: next.Cert.Raw, SealedKey: []byte("k")})
	joins("cat", year, 99) // it says more than there is: as much as there is counts
	must(t, o, book.OperatorSeen{Name: "ann", Serial: "a"})
	refused(t, o, fault.Conflict, book.OperatorSeen{Name: "ann", Serial: "a", Bundle: 3})
	refused(t, o, fault.Denied, book.OperatorSeen{Name: "ann", Serial: "x", Bundle: 2})
	refused(t, o, fault.NotFound, book.OperatorSeen{Name: "eve", Serial: "a", Bundle: 2})
	o.n += 20
	activate := book.ActivateCA{ID: fleet.DigestOf(next.Cert.Raw)}
	waits := func(c book.ActivateCA, want ...string) {
		t.Helper()
		_, err := put(t, o, c)
		if fault.Of(err) != fault.Conflict {
			t.Fatalf("%v, want it to wait for %q", err, want)
		}
		for _, name := range []string{"ann", "away", "ben", "brief", "cat"} {
			is := strings.Contains(fault.Text(err), "operator "+name)
			if wanted := strings.Contains(strings.Join(want, " "), name); is != wanted {
				t.Errorf("%s is waited for: %v, want %v: %s", name, is, wanted, fault.Text(err))
			}
		}
		if !strings.Contains(fault.Text(err), "demarc status") {
			t.Errorf("what they should do is not said: %s", fault.Text(err))
		}
	}
	waits(activate, "ann", "ben")
	must(t, o, book.OperatorSeen{Name: "ann", Serial: "a", Bundle: 2})
	waits(activate, "ben")
	must(t, o, book.OperatorSeen{Name: "ann", Serial: "a", Bundle: 1}) // of another machine, which takes nothing back
	must(t, o, book.OperatorSeen{Name: "away", Serial: "away"})        // it is back
	waits(activate, "away", "ben")
	refused(t, o, fault.NotFound, book.ActivateCA{ID: activate.ID, Without: []string{"eve"}})
	waits(book.ActivateCA{ID: activate.ID, Without: []string{"away"}}, "ben")
	missing := map[string]bool{}
	for _, h := range o.book.View().Missing(nil, o.book.View().Bundle(), now()) {
		missing[h.Name] = h.Online
	}
	if len(missing) != 2 || !missing["ben"] || !missing["away"] {
		t.Errorf("missing: %v", missing)
	}
	must(t, o, book.ActivateCA{ID: activate.ID, Without: []string{"away", "ben"}})
}

// saying is an HTTP client that says which bundle it holds and hears which is the newest.
type saying struct {
	way    http.RoundTripper
	held   uint64
	newest atomic.Uint64
}

func (s *saying) RoundTrip(r *http.Request) (*http.Response, error) {
	r.Header.Set(api.BundleHeader, strconv.FormatUint(s.held, 10))
	res, err := s.way.RoundTrip(r)
	if err == nil {
		n, _ := strconv.ParseUint(res.Header.Get(api.BundleHeader), 10, 64)
		s.newest.Store(n)
	}
	return res, err
}

// TestOperatorsAcknowledgeABundle: by any call; once for each number, and not for one that was never given out. Nobody but a proven
// operator is told a number or acknowledges one.
func TestOperatorsAcknowledgeABundle(t *testing.T) {
	g := newGate(t, 0)
	first := g.operator("ann")
	ben := g.joins(first, "ben", fleet.Viewer)
	calls := func(cert *tls.Certificate, held uint64) uint64 {
		t.Helper()
		c := g.caller(cert)
		s := &saying{way: c.Transport, held: held}
		c.Transport = s
		if _, err := controlv1connect.NewControlClient(c, "https://"+g.addr).Status(t.Context(), connect.NewRequest(&controlv1.StatusRequest{})); (err == nil) != (cert != nil) {
			t.Fatal(err)
		}
		return s.newest.Load()
	}
	_, err := g.control(first).PrepareAuthority(t.Context(), connect.NewRequest(&controlv1.PrepareAuthorityRequest{}))
	ok(t, err)
	if n := calls(ben, 1); n != 2 {
		t.Errorf("ben is told of bundle %d, want 2", n)
	}
	if n := calls(nil, 2); n != 0 {
		t.Errorf("a stranger is told of bundle %d", n)
	}
	if n := g.record("ben").Bundle; n != 1 {
		t.Errorf("ben holds %d, want 1", n)
	}
	size := g.order.book.Log().Size()
	calls(ben, 3) // no such bundle
	if n := g.order.book.Log().Size(); n != size {
		t.Errorf("a number that was never given out made %d entries: %s", n-size, g.last())
	}
	for range 5 {
		calls(ben, 2)
	}
	if n := g.order.book.Log().Size(); n != size+1 || !strings.Contains(g.last(), "operator.seen/1") || g.record("ben").Bundle != 2 {
		t.Errorf("%d entries for one acknowledgement, the last is %s", n-size, g.last())
	}
}

// late is an order whose node catches up with the leader when it reads; err is what a read says.
type late struct {
	*tape
	log func() [][]byte
	err error
}

func (l *late) Read(context.Context) error {
	if l.err != nil {
		return l.err
	}
	for _, data := range l.log()[len(l.tape.log):] {
		if _, err := l.Propose(context.Background(), data); err != nil {
			return err
		}
	}
	return nil
}

// TestABundleIsHandedOutAfterARead (FAULTS.md I1): a node that is behind hands out no older bundle than was announced. If no leader can be
// asked it gives what it knows to whoever asks for a bundle alone, which no holder of a newer one takes, and gives no certificate.
func TestABundleIsHandedOutAfterARead(t *testing.T) {
	ca, genesis := firstCA(t)
	up := newNode(t, "cp-1", ca, nil)
	behind := &late{tape: &tape{order: order{book: book.NewBook()}}, log: func() [][]byte { return up.log }}
	down := newNode(t, "cp-2", ca, func(o *controlplane.Options) { o.Book, o.Consensus = behind.book, behind })
	_, err := up.tape.Propose(t.Context(), mustEncode(t, genesis))
	ok(t, err)
	ok(t, behind.Read(t.Context()))
	prepared(t, up)
	pinned := logOf(t, up.Server)
	ask := func() (identity.SignedBundle, error) {
		nonce := make([]byte, identity.MaxBundleNonce)
		_, _ = rand.Read(nonce)
		res, err := controlplane.HandBundle(t.Context(), down.Server, &boundaryv1.BundleRequest{Nonce: nonce})
		if err != nil {
			return identity.SignedBundle{}, err
		}
		return identity.OpenBundle(res.GetSealed(), pinned, domain, nonce, 0)
	}
	behind.err = fault.New("test", fault.Unavailable, "no leader")
	b, err := ask()
	ok(t, err)
	if b.Number != 1 || len(b.CAs) != 1 {
		t.Errorf("bundle %d of %d CAs by a node that can ask nobody, want the one that it knows", b.Number, len(b.CAs))
	}
	if _, _, err := controlplane.Newest(t.Context(), down.Server); !errors.Is(err, fault.Unavailable) || !strings.Contains(fault.Text(err), "no leader could be asked") {
		t.Errorf("what goes with a certificate: %v", err)
	}
	behind.err = nil
	b, err = ask()
	ok(t, err)
	if b.Number != 2 || len(b.CAs) != 2 {
		t.Errorf("bundle %d of %d CAs, want 2 of 2", b.Number, len(b.CAs))
	}
	cas, number, err := controlplane.Newest(t.Context(), down.Server)
	ok(t, err)
	if number != 2 || len(cas) != 2 {
		t.Errorf("bundle %d of %d CAs goes with a certificate, want 2 of 2", number, len(cas))
	}
	for _, der := range cas {
		if _, err := x509.ParseCertificate(der); err != nil {
			t.Error(err)
		}
	}
}

func mustEncode[R any](t *testing.T, c ledger.Change[book.State, R]) []byte {
	t.Helper()
	b, err := ledger.Encode(ledger.Meta{At: time.Now(), By: "test", Request: fleet.RequestID(rand.Text())}, c)
	ok(t, err)
	return b
}

func logOf(t *testing.T, s *controlplane.Server) seal.Key {
	t.Helper()
	k, err := seal.ParseKey(controlplane.LogPublic(s))
	ok(t, err)
	return k
}
