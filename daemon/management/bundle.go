// SPDX-License-Identifier: Apache-2.0

package management

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"connectrpc.com/connect"

	managementv1 "github.com/demarc-dev/demarc/api/management/v1"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/smallfile"
)

// Strangers may hand over bundles this often, all of them together: to verify one costs a signature.
const (
	strangerRate  = 5 // a second
	strangerBurst = 20
)

// bundle is the CAs of one control plane, as the key of its log signed them.
type bundle struct {
	number uint64
	cas    []*x509.Certificate
}

// file is where the signed bundle of a peer is kept, so that a CA which was retired is not trusted again after a restart.
func (s *Server) file(p Peer) string { return filepath.Join(s.Dir, p.Name+".bundle.signed") }

// load reads the bundles that were kept. One that the pinned key did not sign is named and trusted by nobody: the control plane hands over
// another one.
func (s *Server) load() error {
	const op = "management.load"
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return fault.Because(err, op, fault.Unavailable, "dir can't be made: %v", err)
	}
	for _, p := range s.Peers {
		sealed, err := os.ReadFile(s.file(p))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fault.Because(err, op, fault.Unavailable, "the bundle of %q can't be read: %s", p.Name, s.file(p))
		}
		b, err := open(p, sealed)
		if err != nil {
			s.Log.Warn("the CAs that were kept are not used: the control plane is asked for them again", "control_plane", p.Name, "err",
				fault.Text(err))
			continue
		}
		s.held[p.Name] = b
	}
	s.repool()
	return nil
}

func open(p Peer, sealed []byte) (bundle, error) {
	b, err := identity.OpenKeptBundle(sealed, p.LogKey, p.TrustDomain)
	if err != nil {
		return bundle{}, err
	}
	cas, err := identity.ParseDER(b.CAs, p.TrustDomain)
	return bundle{b.Number, cas}, err
}

// repool makes the pool of the bundles anew. The caller holds mu, or nobody else knows the server yet.
func (s *Server) repool() {
	var all []*x509.Certificate
	for _, b := range s.held {
		all = append(all, b.cas...)
	}
	s.pool = identity.Pool(all)
}

// Bundle takes the CAs of a control plane. Who hands them over proves nothing and need not: the key that the file pins has signed them, for
// one trust domain, and a number that is lower than the one that is held is refused. A bundle that is news is on the disk before it counts;
// connections of nodes whose CA is not in it any more end at once.
func (s *Server) Bundle(_ context.Context,
	req *connect.Request[managementv1.BundleRequest]) (*connect.Response[managementv1.BundleResponse], error) {
	const op = "management.Bundle"
	if !s.strangers.Allow() {
		return nil, fault.New(op, fault.Busy, "too many bundles are handed over at once: try again in a few seconds")
	}
	sealed := req.Msg.GetSealed()
	for _, p := range s.Peers {
		b, err := open(p, sealed)
		if err != nil {
			continue
		}
		number, err := s.take(p, b, sealed)
		if err != nil {
			return nil, err
		}
		return connect.NewResponse(&managementv1.BundleResponse{Number: number}), nil
	}
	return nil, fault.New(op, fault.Denied, "the bundle is not signed with the log key of a control plane that this management plane's file "+
		"names, for its trust domain")
}

func (s *Server) take(p Peer, b bundle, sealed []byte) (uint64, error) {
	const op = "management.Bundle"
	s.mu.Lock()
	defer s.mu.Unlock()
	switch held := s.held[p.Name]; {
	case b.number < held.number:
		return 0, fault.New(op, fault.Conflict, "the bundle is number %d, and number %d is held already: an old one is not taken back", b.number,
			held.number)
	case b.number == held.number:
		return held.number, nil
	}
	if err := smallfile.Replace(s.file(p), sealed); err != nil {
		return 0, fault.Because(err, op, fault.Unavailable, "the bundle can't be kept on disk")
	}
	s.held[p.Name] = b
	s.repool()
	s.Log.Info("a control plane has other CAs", "control_plane", p.Name, "bundle", b.number, "certificates", len(b.cas))
	for c := range s.conns {
		if who := c.who.Load(); who != nil && s.trustsLocked(who.principal, who.issuer) != nil {
			go func() { _ = c.Close() }() // it takes mu
		}
	}
	return b.number, nil
}

// trusts refuses a principal whose chain ends in a CA that its own control plane does not trust now.
func (s *Server) trusts(who fleet.Principal, issuer fleet.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trustsLocked(who, issuer)
}

func (s *Server) trustsLocked(who fleet.Principal, issuer fleet.Digest) error {
	td, _, _, _ := who.Split()
	for _, p := range s.Peers {
		if p.TrustDomain == td &&
			slices.ContainsFunc(s.held[p.Name].cas, func(c *x509.Certificate) bool { return fleet.DigestOf(c.Raw) == issuer }) {
			return nil
		}
	}
	return fault.New("management.Admit", fault.Denied, "the certificate was not issued by an authority that its trust domain has now")
}

// door is the certificate that the management plane shows, and the CAs of all peers. It is an [identity.Source].
type door struct {
	s    *Server
	leaf *tls.Certificate
}

// Leaf implements [identity.Source].
func (d door) Leaf() (*tls.Certificate, error) { return d.leaf, nil }

// Roots implements [identity.Source].
func (d door) Roots() *x509.CertPool {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	return d.s.pool
}

// Listen makes what the door listens with: a listener that knows its connections, and the TLS config that tells who is at the other end of
// each. A caller without a certificate may hand over a bundle, and nothing else.
func (s *Server) Listen(ln net.Listener, leaf *tls.Certificate) (net.Listener, *tls.Config) {
	conf := identity.Server(door{s, leaf}, s.Admit, false, "h2")
	choose := conf.GetConfigForClient
	conf.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		now, err := choose(h)
		if err != nil {
			return nil, err
		}
		c, ok := h.Conn.(*watched)
		if !ok {
			return nil, fault.New("management.Listen", fault.Internal, "a connection that the listener did not make")
		}
		now = now.Clone()
		verify := now.VerifyConnection
		now.VerifyConnection = func(state tls.ConnectionState) error {
			if err := verify(state); err != nil {
				return err
			}
			return c.proven(state)
		}
		return now, nil
	}
	return listener{ln, s}, conf
}

type listener struct {
	net.Listener
	s *Server
}

// Accept implements [net.Listener].
func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	w := &watched{Conn: c, s: l.s}
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.s.conns[w] = struct{}{}
	return w, nil
}

// watched is a connection that ends when its peer's CA is not trusted any more.
type watched struct {
	net.Conn
	s    *Server
	who  atomic.Pointer[peerOf] // nil until it has proven a certificate
	once sync.Once
}

type peerOf struct {
	principal fleet.Principal
	issuer    fleet.Digest
}

// proven notes whose certificate a handshake has verified, then looks whether its CA counts still: what was changed before that is seen
// here, what is changed after it ends the connection.
func (w *watched) proven(state tls.ConnectionState) error {
	if len(state.VerifiedChains) == 0 {
		return nil
	}
	state.HandshakeComplete = true // it is as good as: crypto/tls asks here last
	p, _, err := identity.PrincipalOf(&state)
	if err != nil {
		return err
	}
	who := &peerOf{p, identity.IssuerOf(&state)}
	w.who.Store(who)
	return w.s.trusts(who.principal, who.issuer)
}

// Close implements [net.Conn].
func (w *watched) Close() error {
	w.once.Do(func() {
		w.s.mu.Lock()
		defer w.s.mu.Unlock()
		delete(w.s.conns, w)
	})
	return w.Conn.Close()
}
