// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/net/http2"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/daemon/appliance/credentials"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/seal"
)

// welcomeWait bounds the wait for the first word on a channel.
const welcomeWait = 10 * time.Second

// Of an HTTP/2 connection: after how much silence it is pinged, and how long the answer may take.
const (
	pingAfter = 10 * time.Second
	pingWait  = 5 * time.Second
)

// base stands for the control plane in URLs: who answers is proven by its certificate, not by a name.
const base = "https://control-plane"

// link is what a node of the control plane is called over. Closing cc ends it.
type link struct {
	cc   io.Closer
	http *http.Client
	node string
	at   string // route

	shown string // serial of the certificate that it was dialled with, "" where that is not known

	classical bool // the keys were agreed on without ML-KEM
}

// boundary is the vendor's service for appliances, and bootstrap the one for strangers. An answer has so many bytes at most.
// What is told of a call that broke reports whether it may have happened: see [api.Sent].
func (l *link) boundary(most int) boundaryv1connect.BoundaryClient {
	return boundaryv1connect.NewBoundaryClient(l.http, base, connect.WithReadMaxBytes(most), api.Doubt())
}

func (l *link) bootstrap(most int) boundaryv1connect.BootstrapClient {
	return boundaryv1connect.NewBootstrapClient(l.http, base, connect.WithReadMaxBytes(most), api.Doubt())
}

// open proves the node that answers on a connection, and speaks HTTP/2 with it.
func (a *Appliance) open(ctx context.Context, route string, c net.Conn, s identity.Source) (*link, error) {
	const op = "appliance.open"
	t, err := a.shake(ctx, route, mesh.LayerChannel, c, identity.Client(s, identity.WantNode(a.cfg.TrustDomain), "h2"))
	if err != nil {
		return nil, err
	}
	seen := seenIn(ctx)
	seen.proven.Store(true)
	return speakHTTP2(route, alerted{t, seen}, op)
}

func speakHTTP2(route string, c net.Conn, op string) (*link, error) {
	tr := &http2.Transport{ReadIdleTimeout: pingAfter, PingTimeout: pingWait}
	cc, err := tr.NewClientConn(c)
	if err != nil {
		_ = c.Close()
		return nil, fault.At(op, fault.Unavailable, err)
	}
	return &link{cc: cc, http: &http.Client{Transport: api.Sent(cc)}, at: route}, nil
}

// seen is what a session learned of the node that answered.
type seen struct {
	proven  atomic.Bool // it is a node of the vendor's
	refused atomic.Bool // and it refused our certificate
}

type seenKey struct{}

func seenIn(ctx context.Context) *seen {
	if s, ok := ctx.Value(seenKey{}).(*seen); ok {
		return s
	}
	return &seen{}
}

// alerted notes when the other side refuses the certificate. In TLS 1.3 the client is done before the server has looked
// at it, so that the refusal comes as an alert in place of the first answer. It is encrypted: only the node sends it.
type alerted struct {
	*tls.Conn
	seen *seen
}

// Read implements net.Conn.
func (c alerted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if refusal(err) {
		c.seen.refused.Store(true)
	}
	return n, err
}

// refusal reports whether an error is an alert about our certificate (RFC 8446, 6.2). On a connection crypto/tls keeps the
// type of an alert to itself ([tls.AlertError] is for QUIC), so that its words are compared.
func refusal(err error) bool {
	var remote *net.OpError
	if !errors.As(err, &remote) || remote.Op != "remote error" {
		return false
	}
	// bad, unsupported, revoked, expired, unknown certificate; unknown CA; access denied
	for _, alert := range []tls.AlertError{42, 43, 44, 45, 46, 48, 49} {
		if remote.Err.Error() == alert.Error() {
			return true
		}
	}
	return false
}

// proving spaces out the proofs of the platform identity: an appliance that is banned must not run hot.
type proving struct {
	mu     sync.Mutex
	wanted bool  // the certificate was refused
	why    error // the certificate was refused, or the last proof failed; nil: neither
	tries  int   // since the last channel that stood
	next   time.Time
}

// Waits between proofs.
const (
	proveBase = 2 * time.Second // doubles
	proveCap  = 10 * time.Minute
)

// again says why the identity is not proven yet, and when it is tried again; p.mu is held.
func (p *proving) again(wait time.Duration) error {
	const op = "appliance.prove"
	if p.why == nil {
		return fault.New(op, fault.Busy, "the platform identity is proven again in %s", wait.Round(time.Second))
	}
	return mesh.For(mesh.ReasonOf(p.why), fault.Because(p.why, op, fault.Busy, "%s; it is tried again in %s", fault.Text(p.why),
		wait.Round(time.Second)))
}

// refusal is the refusal of a certificate, which comes without a sentence: what the vendor said to the last proof stands, if it was a
// refusal; p.mu is held.
func (p *proving) refusal(err error) error {
	text := "a node of the vendor's refuses this appliance's certificate: the platform identity is proven again"
	if mesh.ReasonOf(p.why) == mesh.VendorRefuses {
		text = fault.Text(p.why)
	}
	return mesh.For(mesh.VendorRefuses, fault.Because(err, "appliance.session", fault.Of(err), "%s", text))
}

// answered returns a reason to what a node of the vendor's said, which was proven.
func answered(err error) error {
	switch fault.Of(err) {
	case fault.Denied, fault.NotFound, fault.Invalid, fault.Expired:
		return mesh.For(mesh.VendorRefuses, err)
	}
	return mesh.For(mesh.VendorUnready, err)
}

// refusedBy is the error of a call to a proven node: what the node said has a reason of its own, a call that broke has that of the road.
func refusedBy(op string, err error) error {
	out := api.FromWire(op, err)
	if connect.IsWireError(err) {
		return answered(out)
	}
	return out
}

// session is the work over one connection: it proves the platform identity where there is no good certificate, then
// carries the channel. Where the node that answers can't be recognised, it asks for the signed bundle.
func (a *Appliance) session(ctx context.Context, route string, c net.Conn, up func()) error {
	s := &seen{}
	ctx = context.WithValue(ctx, seenKey{}, s)
	if a.mustProve() {
		if err := a.prove(ctx, route, c); err != nil {
			if s.proven.Load() {
				return err
			}
			return a.lost(ctx, route, s, err)
		}
		var err error
		if c, err = a.routes[route].Dial(ctx, ""); err != nil { // the certificate is shown on a connection of its own
			return err
		}
		defer c.Close()
		s = &seen{}
		ctx = context.WithValue(ctx, seenKey{}, s)
	}
	err := a.carry(ctx, route, c, func() {
		a.proving.mu.Lock()
		a.proving.tries, a.proving.wanted, a.proving.why, a.proving.next = 0, false, nil, time.Time{}
		a.proving.mu.Unlock()
		up()
	})
	return a.lost(ctx, route, s, err)
}

func (a *Appliance) mustProve() bool {
	a.proving.mu.Lock()
	defer a.proving.mu.Unlock()
	return a.proving.wanted || !a.creds.Valid() || a.book.View().VendorLogKey == nil
}

// prove trades the platform identity for a certificate. The one of before stays until another is stored.
func (a *Appliance) prove(ctx context.Context, route string, c net.Conn) error {
	p := &a.proving
	p.mu.Lock()
	now := a.now()
	if wait := p.next.Sub(now); wait > 0 {
		waits := p.again(wait)
		p.mu.Unlock()
		return later{waits, wait}
	}
	p.mu.Unlock()

	l, err := a.open(ctx, route, c, credentials.Anonymous{Store: a.creds})
	if err != nil {
		return err // nothing was proven to anybody: it does not count
	}
	p.mu.Lock()
	wait := min(proveCap, proveBase<<min(p.tries, 16))
	wait = wait/2 + time.Duration(a.opts.Rand()*float64(wait)/2)
	p.tries, p.next = p.tries+1, now.Add(wait)
	p.mu.Unlock()
	logKey, err := a.enrol(ctx, l)
	_ = l.cc.Close()
	if err != nil {
		if a.creds.Valid() { // the refusal may have been that of a node that was behind: no proof must not make a good certificate useless
			p.mu.Lock()
			p.wanted = false
			p.mu.Unlock()
		}
		p.mu.Lock()
		p.why = err
		p.mu.Unlock()
		a.log.Warn("not enrolled", "route", route, "err", err)
		return later{err, wait}
	}
	if !bytes.Equal(a.book.View().VendorLogKey, logKey) { // the first time; another key later is refused by the book
		if _, err := book.Attempt(ctx, a.book, book.MeetVendor{LogKey: logKey}); err != nil {
			return err
		}
	}
	p.mu.Lock()
	p.wanted = false
	p.mu.Unlock()
	a.log.Info("enrolled", "route", route)
	return nil
}

// lost looks at why a session ended, and prepares the next one.
func (a *Appliance) lost(ctx context.Context, route string, s *seen, err error) error {
	if err == nil || ctx.Err() != nil {
		return err
	}
	if s.proven.Load() {
		if s.refused.Load() || fault.Of(err) == fault.Denied {
			a.proving.mu.Lock()
			if s.refused.Load() {
				err = a.proving.refusal(err)
			}
			a.proving.wanted, a.proving.why = true, err
			a.proving.mu.Unlock()
			a.log.Warn("the certificate was refused: the platform identity is proven again, the certificate is kept until then", "route", route,
				"err", err)
		}
		return err
	}
	var foreign x509.UnknownAuthorityError
	if fault.Of(err) != fault.Expired && !errors.As(err, &foreign) {
		return err
	}
	if a.book.View().VendorLogKey == nil {
		// the customer's bundle file is all that can be trusted
		return fault.Because(err, "appliance.session", fault.Of(err), "%s", firstMeeting(foreign, err))
	}
	news, again := a.recover(ctx, route)
	if again != nil {
		a.log.Warn("no signed bundle", "route", route, "err", again)
	}
	if again != nil || !news {
		return err
	}
	return fault.Because(err, "appliance.session", fault.Unavailable,
		"the CAs or the clock were behind and were set right by the vendor's signature: dialling again")
}

// firstMeeting says what to do where an appliance that never enrolled does not recognise who answers.
func firstMeeting(foreign x509.UnknownAuthorityError, err error) string {
	if foreign.Cert == nil {
		return fault.Text(err) + ": before the first enrolment this host's clock must be right; set it"
	}
	return fault.Text(err) + "; or the vendor changed its CA since bundle_file was written: ask the vendor, on a way that you trust, for the newest bundle " +
		"(the file that an operator's bundle setting names), put it in the place of bundle_file and restart the appliance"
}

// newBundle takes a bundle that came down the channel. Its time says nothing: nobody asked for it.
func (a *Appliance) newBundle(sealed []byte) error {
	pinned, err := seal.ParseKey(a.book.View().VendorLogKey)
	if err != nil {
		return err
	}
	b, err := identity.OpenBundle(sealed, pinned, a.cfg.TrustDomain, nil, 0)
	if err != nil {
		return err
	}
	_, err = a.takeBundle(b, sealed) // which leaves one aside that is older than the one held: that node is behind
	return err
}

func (a *Appliance) takeBundle(b identity.SignedBundle, sealed []byte) (bool, error) {
	news, err := a.creds.Trust(b, sealed)
	if err == nil && news {
		a.log.Info("the vendor's CAs changed", "bundle", b.Number, "certificates", len(b.CAs))
		a.wakeRenewal()
	}
	return news, err
}

// welcomed looks at the clock: who answers is proven.
func (a *Appliance) welcomed(w *boundaryv1.Welcome) {
	if at := w.GetServerTimeUnix(); at > 0 {
		a.setClock(time.Unix(at, 0))
	}
}

func (a *Appliance) setClock(at time.Time) bool {
	a.book.VendorTime(at)
	off, news := a.creds.SetTime(at)
	if news {
		a.log.Warn("this host's clock differs from the vendor's: certificates are judged by the vendor's", "difference", off.Round(time.Second))
		a.wakeRenewal()
	}
	return news
}
