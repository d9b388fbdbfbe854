// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// Source is a node's own certificate and the CAs that it trusts. What it was given serves the first start; once the
// book has a CA that issues, the node makes its own leaf from it, renews it from half of its life on, and makes another
// as soon as another CA issues. It is an [identity.Source].
type Source struct {
	server *Server
	first  *tls.Certificate
	roots  *x509.CertPool
	key    crypto.Signer
	csr    *x509.CertificateRequest

	mu     sync.Mutex
	number uint64 // of the bundle that pool holds
	pool   *x509.CertPool
	issuer fleet.Digest // of leaf
	leaf   *tls.Certificate
	from   time.Time              // when leaf is renewed
	path   string                 // of the file that kept is on; "": nowhere
	kept   kept                   // the CAs as this node met them last
	ahead  *identity.SignedBundle // of the others, where this node's book is behind; see CatchUp
}

// NewSource makes the source of a node from the certificate and the CAs that serve its first start.
func (s *Server) NewSource(first *tls.Certificate, roots *x509.CertPool) (*Source, error) {
	const op = "controlplane.NewSource"
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	der, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := identity.ParseCSR(der)
	if err != nil {
		return nil, err
	}
	if first.Leaf == nil {
		if first.Leaf, err = x509.ParseCertificate(first.Certificate[0]); err != nil {
			return nil, fault.At(op, fault.Invalid, err)
		}
	}
	return &Source{server: s, first: first, roots: roots, key: key, csr: csr}, nil
}

func loadFiles(cfg *configs.Control, s *Server) (*Source, error) {
	const op = "controlplane.certificate"
	leaf, err := tls.LoadX509KeyPair(cfg.Certificate.File, cfg.Certificate.Key)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the node's certificate can't be read: %v", err)
	}
	b, err := os.ReadFile(cfg.Certificate.Bundle)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the bundle can't be read: %s", cfg.Certificate.Bundle)
	}
	cas, err := identity.ParseBundle(b, cfg.TrustDomain)
	if err != nil {
		return nil, fault.At(op, "", err)
	}
	return s.NewSource(&leaf, identity.Pool(cas))
}

// Leaf implements [identity.Source]. A node that can't make its leaf shows the one it has: that is better than none.
func (f *Source) Leaf() (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.fresh(); err != nil {
		f.server.log.Warn("this node could not make its own certificate", "err", err)
	}
	if f.leaf != nil {
		return f.leaf, nil
	}
	return f.first, nil
}

// fresh makes a leaf where there is none, another CA issues, or half of its life is over.
func (f *Source) fresh() error {
	page, now := f.known(), f.server.now()
	if len(page.Slots) == 0 {
		return nil // the book has not begun
	}
	slot, err := f.issuing(page)
	if err != nil {
		return err
	}
	if f.leaf != nil && f.issuer == slot.ID() && now.Before(f.from) && !f.refused() {
		return nil
	}
	k, err := f.server.ring.get(page.KEK)
	if err != nil {
		return err
	}
	ca, err := identity.OpenAuthority(slot.CertDER, slot.SealedKey, k.key)
	if err != nil {
		return err
	}
	back := f.server.Backdate
	if certs, _ := f.server.book.View().Certs(f.server.name); !certs.Floor.IsZero() {
		back = max(min(back, now.Sub(certs.Floor)), time.Nanosecond) // what begins before that is refused
	}
	extra := identity.IssueOptions{Rand: rand.Reader, Backdate: back, DNSNames: f.first.Leaf.DNSNames}
	for _, ip := range f.first.Leaf.IPAddresses {
		if a, ok := netip.AddrFromSlice(ip); ok {
			extra.IPs = append(extra.IPs, a.Unmap())
		}
	}
	leaf, err := ca.Issue(f.csr, fleet.PrincipalOf(page.TrustDomain, fleet.Node, f.server.name), now, f.server.LeafLife, extra)
	if err != nil {
		return err
	}
	f.leaf, f.issuer = &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: f.key, Leaf: leaf}, slot.ID()
	f.from = identity.RenewFrom(leaf, f.server.Backdate)
	return nil
}

// refused tells whether the book refuses the leaf of this node. Whoever certified the node did not mean who holds its disk and the
// key-encryption key: that one makes itself another. The caller holds mu.
func (f *Source) refused() bool {
	_, err := f.server.book.View().refusesNode("controlplane.Source", f.server.name, identity.SerialOf(f.leaf.Leaf), f.leaf.Leaf.NotBefore)
	return err != nil
}

// record puts the leaf that this node shows on record, with the one of its file, where the book does not have it. An older build
// among the voters keeps it out: then it is tried again later.
func (s *Server) record(ctx context.Context, f *Source) error {
	f.mu.Lock()
	c := NodeLeaf{Name: s.name, File: NodeCert{Serial: identity.SerialOf(f.first.Leaf), Till: f.first.Leaf.NotAfter}}
	if f.leaf != nil {
		c.Leaf = NodeCert{Serial: identity.SerialOf(f.leaf.Leaf), Till: f.leaf.Leaf.NotAfter}
	}
	f.mu.Unlock()
	if had, _ := s.book.View().Certs(s.name); c.Leaf.Serial == "" || had.Current.Serial == c.Leaf.Serial {
		return nil
	}
	_, err := submit(ctx, s, s.self(), "", c)
	return err
}

// Roots implements [identity.Source]. One pool serves all handshakes until the bundle changes.
func (f *Source) Roots() *x509.CertPool {
	f.mu.Lock()
	defer f.mu.Unlock()
	page := f.known()
	number := page.Bundle
	if number == 0 {
		return f.roots
	}
	if f.ahead != nil && f.ahead.Number > number {
		if cas, err := identity.ParseDER(f.ahead.CAs, page.TrustDomain); err == nil { // OpenBundle has read it
			return identity.Pool(cas)
		}
	}
	if f.pool == nil || f.number != number {
		pool, err := identity.Bundle(page.Slots)
		if err != nil {
			f.server.log.Error("the CAs of the book can't be read", "err", err)
			return f.roots
		}
		f.pool, f.number = pool, number
	}
	return f.pool
}

// serves tells the number of the bundle that this node trusts, has kept, and shows a leaf of; 0 while it can't.
func (f *Source) serves() uint64 {
	page := f.server.book.View()
	number := page.Bundle()
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.keep(page); err != nil {
		f.server.log.Warn("this node could not keep the CAs on its disk", "err", err)
		return 0
	}
	if err := f.fresh(); err != nil || f.leaf == nil {
		return 0
	}
	return number
}

// Tend puts on record which bundle this node serves and which certificate it shows, each time that they change, until ctx ends.
func (s *Server) Tend(ctx context.Context, f *Source) error {
	wait := time.Second
	var late time.Time // of the next try to put the leaf on record, after one that failed
	pause := time.Second
	for {
		changed := s.book.Changed()
		again := make(<-chan time.Time)
		page := s.book.View()
		f.remember(page)
		had, _ := page.nodes.Get(s.name)
		if number := page.Bundle(); number > had && page.TrustDomain != "" {
			var err error
			if serves := f.serves(); serves >= number {
				_, err = submit(ctx, s, s.self(), "", NodeBundle{Name: s.name, Number: number})
			}
			if now, _ := s.book.View().nodes.Get(s.name); now < number {
				if err != nil && ctx.Err() == nil {
					s.log.Info("which bundle this node serves is not on record yet", "err", fault.Text(err))
				}
				again, wait = time.After(wait), min(2*wait, time.Minute)
				changed = nil // its own trouble is not mended by each change of the book
			} else {
				wait = time.Second
			}
		}
		if page.TrustDomain != "" && !time.Now().Before(late) {
			if err := s.record(ctx, f); err == nil {
				late, pause = time.Time{}, time.Second
			} else if ctx.Err() == nil {
				s.log.Info("the certificate of this node is not on record yet", "err", fault.Text(err))
				late, pause = time.Now().Add(pause), min(2*pause, time.Minute)
			}
		}
		var retry <-chan time.Time
		if !late.IsZero() {
			retry = time.After(time.Until(late))
		}
		select {
		case <-retry:
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-again:
		}
	}
}
