// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// Source is a node's own certificate and the CAs that it trusts. What it was given serves the first start; once the
// book has a CA that issues, the node makes its own leaf from it, renews it from half of its life on, and makes another
// as soon as another CA issues. It is an [identity.Source].
type Source struct {
	store *Store
	first *tls.Certificate
	roots *x509.CertPool
	key   crypto.Signer
	csr   *x509.CertificateRequest

	mu     sync.Mutex
	of     any // what pool is made of; see standing
	pool   *x509.CertPool
	issuer fleet.Digest // of leaf
	leaf   *tls.Certificate
	from   time.Time // when leaf is renewed
	path   string    // of the file that the credentials are on; "": nowhere
	dirty  bool      // they could not be written to it

	tries int                               // certificates that were shown to peers in vain; see CatchUp
	tried map[fleet.Digest]*tls.Certificate // made to be tried, by their CA
}

// NewSource makes the source of a node from the certificate and the CAs that serve its first start.
func (s *Store) NewSource(first *tls.Certificate, roots *x509.CertPool) (*Source, error) {
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
	f := &Source{store: s, first: first, roots: roots, key: key, csr: csr}
	s.source.Store(f)
	return f, nil
}

func (s *Store) LoadSource(cfg *configs.Control) (*Source, error) {
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
	return f.leafOrFirst(), nil
}

func (f *Source) leafOrFirst() *tls.Certificate {
	if err := f.renew(); err != nil {
		f.store.log.Warn("this node could not make its own certificate", "err", err)
	}
	if f.leaf != nil {
		return f.leaf
	}
	return f.first
}

// cas is the CAs as the book has them, or as they were kept while the book is behind. The caller holds mu.
func (f *Source) cas() caSet {
	page := f.store.replica.View()
	if k := f.store.savedIfNewer(page); k != nil {
		return k.cas()
	}
	return f.store.casOf(page)
}

// renew makes a leaf where there is none, another CA issues, or half of its life is over. It is on disk before anybody is shown it,
// where the disk takes it.
func (f *Source) renew() error {
	st, now := f.cas(), f.store.replica.Now()
	if st.number == 0 {
		return nil // the book has not begun
	}
	if st.issuer == "" {
		return fault.New("controlplane.Source", fault.NotFound, "no CA is active: prepare one and activate it")
	}
	if f.leaf != nil && f.issuer == st.issuer && now.Before(f.from) && !f.refused() {
		return nil
	}
	leaf, err := f.issue(st, st.issuer)
	if err != nil {
		return err
	}
	f.leaf, f.issuer, f.from = leaf, st.issuer, identity.RenewFrom(leaf.Leaf, f.store.Backdate)
	return f.save()
}

// issue makes a leaf of one of the CAs. The caller holds mu.
func (f *Source) issue(st caSet, by fleet.Digest) (*tls.Certificate, error) {
	ca, err := st.open(by)
	if err != nil {
		return nil, err
	}
	now := f.store.replica.Now()
	// What begins before the last certificate that an operator gave this node is refused; where its clock is behind, that would be.
	floor := f.first.Leaf.NotBefore
	if certs, _ := f.store.replica.View().Certs(f.store.replica.Node); certs.Floor.After(floor) {
		floor = certs.Floor
	}
	back := max(min(f.store.Backdate, now.Sub(floor)), time.Nanosecond)
	extra := identity.IssueOptions{Rand: rand.Reader, Backdate: back, DNSNames: f.first.Leaf.DNSNames}
	for _, ip := range f.first.Leaf.IPAddresses {
		if a, ok := netip.AddrFromSlice(ip); ok {
			extra.IPs = append(extra.IPs, a.Unmap())
		}
	}
	leaf, err := ca.Issue(f.csr, fleet.PrincipalOf(st.domain, fleet.Node, f.store.replica.Node), now, f.store.LeafLife, extra)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: f.key, Leaf: leaf}, nil
}

// ToPeers is the source for connections between nodes. It shows the same leaf, unless that leads to no leader; see [Server.CatchUp].
func (f *Source) ToPeers() identity.Source { return toPeers{f} }

type toPeers struct{ *Source }

// Leaf implements [identity.Source].
func (p toPeers) Leaf() (*tls.Certificate, error) {
	f := p.Source
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tries > 0 {
		if leaf := f.nextTried(); leaf != nil {
			return leaf, nil
		}
	}
	return f.leafOrFirst(), nil
}

// nextTried is the certificate whose turn it is; nil for that of all others. They are: that one, one of the CA that issues, one of each
// other CA that is trusted, and that of the file. The caller holds mu.
func (f *Source) nextTried() *tls.Certificate {
	st := f.cas()
	ids := []fleet.Digest{st.issuer}
	for _, der := range st.cas {
		if id := fleet.DigestOf(der); id != st.issuer {
			ids = append(ids, id)
		}
	}
	i := f.tries % (len(ids) + 2)
	switch {
	case i == 0:
		return nil
	case i > len(ids):
		return f.first
	}
	id := ids[i-1]
	if f.tried[id] == nil {
		leaf, err := f.issue(st, id)
		if err != nil {
			f.store.log.Debug("this node could not make a certificate to try", "ca", id.Short(), "err", fault.Text(err))
			return nil
		}
		if f.tried == nil {
			f.tried = map[fleet.Digest]*tls.Certificate{}
		}
		f.tried[id] = leaf
	}
	return f.tried[id]
}

// next has the peers shown the next certificate, or, where this node was told more or its book is the newest, its own again.
func (f *Source) next(own bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tries++; own {
		f.tries, f.tried = 0, nil
	}
}

func (f *Source) trying() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.tries > 0
}

// refused tells whether the book refuses the leaf of this node. Whoever certified the node did not mean who holds its disk and the
// key-encryption key: that one makes itself another. The caller holds mu.
func (f *Source) refused() bool {
	_, err := f.store.replica.View().RefusesNode("controlplane.Source", f.store.replica.Node, identity.SerialOf(f.leaf.Leaf), f.leaf.Leaf.NotBefore)
	return err != nil
}

// record puts the leaf that this node shows on record, with the one of its file, where the book does not have it. An older build
// among the voters keeps it out: then it is tried again later.
func (f *Source) record(ctx context.Context) error {
	f.mu.Lock()
	c := book.NodeLeaf{Name: f.store.replica.Node, File: book.NodeCert{Serial: identity.SerialOf(f.first.Leaf), Till: f.first.Leaf.NotAfter}}
	if f.leaf != nil {
		c.Leaf = book.NodeCert{Serial: identity.SerialOf(f.leaf.Leaf), Till: f.leaf.Leaf.NotAfter}
	}
	f.mu.Unlock()
	if had, _ := f.store.replica.View().Certs(f.store.replica.Node); c.Leaf.Serial == "" || had.Current.Serial == c.Leaf.Serial {
		return nil
	}
	_, err := book.Submit(ctx, f.store.replica, f.store.replica.Self(), "", c)
	return err
}

// Roots implements [identity.Source]. One pool serves all handshakes until the bundle changes.
func (f *Source) Roots() *x509.CertPool {
	f.mu.Lock()
	defer f.mu.Unlock()
	st := f.cas()
	if st.number == 0 {
		return f.roots
	}
	if f.pool == nil || f.of == nil || f.of != st.of {
		cas, err := identity.ParseDER(st.cas, st.domain)
		if err != nil {
			f.store.log.Error("the CAs that this node trusts can't be read", "err", err)
			return f.roots
		}
		f.pool, f.of = identity.Pool(cas), st.of
	}
	return f.pool
}

// serves tells the number of the bundle that this node trusts, has on disk with the keys of its CAs, and shows a leaf of; 0 while it
// can't.
func (f *Source) serves() uint64 {
	page := f.store.replica.View()
	number := page.Bundle()
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := errors.Join(f.renew(), f.save()); err != nil || f.leaf == nil {
		f.store.log.Warn("this node could not keep its credentials on its disk", "err", err)
		return 0
	}
	return number
}

// Tend puts on record which bundle this node serves and which certificate it shows, each time that they change, until ctx ends.
func (f *Source) Tend(ctx context.Context) error {
	for wait := 50 * time.Millisecond; !f.store.upToDate(ctx); wait = min(2*wait, time.Second) {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
	wait := time.Second
	var late time.Time // of the next try to put the leaf on record, after one that failed
	pause := time.Second
	var said string
	for {
		changed := f.store.replica.Changed()
		again := make(<-chan time.Time)
		page := f.store.replica.View()
		if err := f.Save(); err != nil && fault.Text(err) != said {
			said = fault.Text(err)
			f.store.log.Warn("this node could not keep its credentials on its disk", "err", err)
		}
		had := page.NodeBundle(f.store.replica.Node)
		if number := page.Bundle(); number > had && page.TrustDomain != "" {
			var err error
			if serves := f.serves(); serves >= number {
				_, err = book.Submit(ctx, f.store.replica, f.store.replica.Self(), "", book.NodeBundle{Name: f.store.replica.Node, Number: number})
			}
			if f.store.replica.View().NodeBundle(f.store.replica.Node) < number {
				if err != nil && ctx.Err() == nil {
					f.store.log.Info("which bundle this node serves is not on record yet", "err", fault.Text(err))
				}
				again, wait = time.After(wait), min(2*wait, time.Minute)
				changed = nil // its own trouble is not mended by each change of the book
			} else {
				wait = time.Second
			}
		}
		if page.TrustDomain != "" && !time.Now().Before(late) {
			if err := f.record(ctx); err == nil {
				late, pause = time.Time{}, time.Second
			} else if ctx.Err() == nil {
				f.store.log.Info("the certificate of this node is not on record yet", "err", fault.Text(err))
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
