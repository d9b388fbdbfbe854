// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"net/http"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// How a node that hears of no leader looks for a change of CA.
const (
	CatchUpEvery = 5 * time.Second
	catchUpAsk   = 5 * time.Second // of one other node
)

// CatchUp looks, while this node hears of no leader that it can ask, for credentials that its peers take. The CA may have been changed and the old
// one retired while it was down. Then its own certificate is one that nobody takes, and so the book would never come here.
//
// It asks the others for the signed bundle, which any node hands to anybody while it serves; by that it makes its certificate of the
// CA that issues now. Where nobody serves, because a majority needs this node, it shows its peers a certificate of each CA that it
// trusts and has the key of, in turn: a CA issues only once each node has its key on disk, so one of them is of the CA that the
// newest of them goes by.
//
// A leader that is heard and can't be asked counts as none. It may be heard by a connection that was opened with a certificate of a CA
// that has been retired since, while no new connection is taken: a node that kept to that certificate would never be asked nor answered.
func (f *Source) CatchUp(ctx context.Context, every time.Duration) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		heard := f.store.replica.Leader() != ""
		if heard && f.confirm(ctx) {
			continue
		}
		if !heard {
			f.store.current.Store(false)
		}
		if f.trustDomain() == "" {
			continue
		}
		learned := false
		for _, m := range f.addresses() {
			if m.Name == f.store.replica.Node || m.API == "" {
				continue
			}
			news, err := f.catchUp(ctx, m.API)
			if err != nil && ctx.Err() == nil {
				f.store.log.Debug("a node was asked for the signed bundle", "node", m.Name, "err", fault.Text(err))
			}
			learned = learned || news
		}
		f.next(learned)
	}
}

// confirm reports whether this node's book is known to be the newest, and asks the leader if that is not known yet. From then on the book
// goes before the credentials.
func (f *Source) confirm(ctx context.Context) bool {
	if f.store.current.Load() && !f.trying() {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, catchUpAsk)
	defer cancel()
	if !f.store.upToDate(ctx) {
		return false
	}
	f.next(true)
	if err := f.Save(); err != nil {
		f.store.log.Warn("this node could not keep its credentials on its disk", "err", err)
	}
	return true
}

// addresses is the roster, and those whom the credentials know beside it: the book may be too old to know them.
func (f *Source) addresses() []book.Member {
	all := f.store.replica.Roster()
	if k := f.store.saved.Load(); k != nil {
		for _, m := range k.Peers {
			if !slices.ContainsFunc(all, func(x book.Member) bool { return x.Name == m.Name && x.API == m.API }) {
				all = append(slices.Clip(all), m)
			}
		}
	}
	return all
}

// trustDomain is the trust domain of the CAs that are known, "" before any are.
func (f *Source) trustDomain() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.cas().domain
}

// catchUp asks one node, and takes what is newer than what this node goes by.
func (f *Source) catchUp(ctx context.Context, addr string) (news bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, catchUpAsk)
	defer cancel()
	nonce := make([]byte, identity.MaxBundleNonce)
	_, _ = rand.Read(nonce) // crypto/rand.Read never fails
	sealed, err := f.askAnyone(ctx, addr, nonce)
	if err != nil {
		return false, err
	}
	own, err := seal.ParseKey(f.store.LogPublicKey())
	if err != nil {
		return false, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	st := f.cas()
	b, err := identity.OpenBundle(sealed, own, st.domain, nonce, st.number)
	if err != nil || b.Number <= st.number {
		return false, err
	}
	page := f.store.replica.View()
	c := credentials{Version: credentialsVersion, TrustDomain: st.domain, KEK: page.KEK, Epoch: page.Epoch().Number, Peers: f.addresses()}
	if had := f.store.savedIfNewer(page); had != nil {
		c.KEK, c.Epoch = had.KEK, max(c.Epoch, had.Epoch)
	}
	had := st.cas
	st.number, st.issuer, st.cas = b.Number, b.Issuer, nil
	for _, der := range b.CAs {
		if slices.ContainsFunc(had, func(x []byte) bool { return bytes.Equal(x, der) }) {
			st.cas = append(st.cas, der) // whose key this node has; the others are trusted
		}
	}
	if err := f.write(c, st, sealed); err != nil {
		if k := f.store.saved.Load(); k == nil || k.bundle.Number < b.Number {
			return false, err
		}
		f.store.log.Warn("this node could not keep its credentials on its disk", "err", err) // it goes by them all the same
	}
	f.store.log.Warn("the CA was changed while this node was down: it shows a certificate of the new one", "bundle", b.Number, "issuer", b.Issuer.Short())
	return true, nil
}

// askAnyone asks WHOEVER ANSWERS for the signed bundle. THIS CONNECTION IS NOT VERIFIED. As at the appliance, which does the
// same, that is safe: nothing goes out on it but random bytes, and nothing that comes back is believed but a document that
// the vendor's own key signed over them.
func (f *Source) askAnyone(ctx context.Context, addr string, nonce []byte) ([]byte, error) {
	tr := &http.Transport{DialContext: f.store.Dial, ForceAttemptHTTP2: true, DisableKeepAlives: true, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true}}
	defer tr.CloseIdleConnections()
	client := boundaryv1connect.NewBootstrapClient(&http.Client{Transport: tr}, "https://"+addr, connect.WithReadMaxBytes(2*identity.MaxBundle))
	res, err := client.Bundle(ctx, connect.NewRequest(&boundaryv1.BundleRequest{Nonce: nonce}))
	if err != nil {
		return nil, api.FromWire("controlplane.CatchUp", err)
	}
	return res.Msg.GetSealed(), nil
}
