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

// Source is a node's own certificate and the CAs that it trusts. The first start uses the node's file; once the book has an active CA,
// the node issues its own leaf, renews it after half of its life, and issues another as soon as another CA is active. It is an
// [identity.Source].
type Source struct {
	store *Store
	first *tls.Certificate
	roots *x509.CertPool
	key   crypto.Signer
	csr   *x509.CertificateRequest

	mu     sync.Mutex
	of     any // what pool is made of; compared with caSet.of
	pool   *x509.CertPool
	issuer fleet.Digest // of leaf
	leaf   *tls.Certificate
	from   time.Time // when leaf is renewed
	path   string    // of the file that the credentials are on; "": nowhere
	dirty  bool      // the last write failed

	tries int                               // certificates that were tried with peers without success; see CatchUp
	tried map[fleet.Digest]*tls.Certificate // issued for these tries, by CA
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

// LoadSource makes the source of a node from the files of its configuration.
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

// Leaf implements [identity.Source]. A node that can't issue a new leaf uses the one it has.
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

// cas is the CAs of the book, or the saved ones while the book is behind. The caller holds mu.
func (f *Source) cas() caSet {
	st := f.store.replica.View()
	if k := f.store.savedIfNewer(st); k != nil {
		return k.cas()
	}
	return f.store.casOf(st)
}

// renew issues a leaf if there is none, another CA is active, or half of its life is over. The leaf is written to disk before it is used,
// if the disk works.
func (f *Source) renew() error {
	set, now := f.cas(), f.store.replica.Now()
	if set.number == 0 {
		return nil // the book has not begun
	}
	if set.issuer == "" {
		return fault.New("controlplane.Source", fault.NotFound, "no CA is active: prepare one and activate it")
	}
	if f.leaf != nil && f.issuer == set.issuer && now.Before(f.from) && !f.refused() {
		return nil
	}
	leaf, err := f.issue(set, set.issuer)
	if err != nil {
		return err
	}
	f.leaf, f.issuer, f.from = leaf, set.issuer, identity.RenewFrom(leaf.Leaf, f.store.Backdate)
	return f.save()
}

// issue issues a leaf of one of the CAs. The caller holds mu.
func (f *Source) issue(set caSet, by fleet.Digest) (*tls.Certificate, error) {
	ca, err := set.open(by)
	if err != nil {
		return nil, err
	}
	now := f.store.replica.Now()
	// A leaf that begins before the last certificate that an operator issued for this node is refused; with a slow clock it would.
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
	leaf, err := ca.Issue(f.csr, fleet.PrincipalOf(set.domain, fleet.Node, f.store.replica.Node), now, f.store.LeafLife, extra)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: f.key, Leaf: leaf}, nil
}

// ToPeers is the source for connections between nodes. It uses the same leaf, unless that reaches no leader; see [Source.CatchUp].
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

// nextTried is the certificate to try next; nil means the node's leaf. The order is: that leaf, one of the active CA, one of each other
// trusted CA, and that of the file. The caller holds mu.
func (f *Source) nextTried() *tls.Certificate {
	set := f.cas()
	ids := []fleet.Digest{set.issuer}
	for _, der := range set.cas {
		if id := fleet.DigestOf(der); id != set.issuer {
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
		leaf, err := f.issue(set, id)
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

// next selects the next certificate for peers, or the node's own leaf again if own is true.
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

// refused reports whether the book refuses the leaf of this node. A node with its disk and the key-encryption key then issues itself
// another one. The caller holds mu.
func (f *Source) refused() bool {
	_, err := f.store.replica.View().RefusesNode("controlplane.Source", f.store.replica.Node, identity.SerialOf(f.leaf.Leaf),
		f.leaf.Leaf.NotBefore)
	return err != nil
}

// record puts the leaf of this node and the one of its file on record, if the book does not have them. If a voter with an older build
// prevents it, it is tried again later.
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
	set := f.cas()
	if set.number == 0 {
		return f.roots
	}
	if f.pool == nil || f.of == nil || f.of != set.of {
		cas, err := identity.ParseDER(set.cas, set.domain)
		if err != nil {
			f.store.log.Error("the CAs that this node trusts can't be read", "err", err)
			return f.roots
		}
		f.pool, f.of = identity.Pool(cas), set.of
	}
	return f.pool
}

// serves returns the number of the bundle that this node trusts, has on disk with the keys of its CAs, and uses a leaf of; 0 if there is
// none.
func (f *Source) serves() uint64 {
	st := f.store.replica.View()
	number := st.Bundle()
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := errors.Join(f.renew(), f.save()); err != nil || f.leaf == nil {
		f.store.log.Warn("this node could not keep its credentials on its disk", "err", err)
		return 0
	}
	return number
}

// Tend records which bundle this node serves and which certificate it uses, each time that they change, until ctx ends.
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
		st := f.store.replica.View()
		if err := f.Save(); err != nil && fault.Text(err) != said {
			said = fault.Text(err)
			f.store.log.Warn("this node could not keep its credentials on its disk", "err", err)
		}
		had := st.NodeBundle(f.store.replica.Node)
		if number := st.Bundle(); number > had && st.TrustDomain != "" {
			var err error
			if serves := f.serves(); serves >= number {
				_, err = book.Submit(ctx, f.store.replica, f.store.replica.Self(), "", book.NodeBundle{Name: f.store.replica.Node, Number: number})
			}
			if f.store.replica.View().NodeBundle(f.store.replica.Node) < number {
				if err != nil && ctx.Err() == nil {
					f.store.log.Info("which bundle this node serves is not on record yet", "err", fault.Text(err))
				}
				again, wait = time.After(wait), min(2*wait, time.Minute)
				changed = nil // changes of the book do not repair a local failure
			} else {
				wait = time.Second
			}
		}
		if st.TrustDomain != "" && !time.Now().Before(late) {
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
