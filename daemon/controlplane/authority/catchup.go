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

// Intervals at which a node without a leader looks for a change of CA.
const (
	CatchUpEvery = 5 * time.Second
	catchUpAsk   = 5 * time.Second // of one other node
)

// CatchUp looks for credentials that the peers accept, while this node knows no leader that it can reach. The CA may have been replaced
// and the old one retired while the node was down. Then no peer accepts its certificate, and it could never receive the book.
//
// It requests the signed bundle from the other nodes, which return it to any caller while they serve, and issues itself a certificate of
// the active CA. If no node serves, because a majority needs this one, it tries in turn a certificate of each CA that it trusts and has
// the key of: a CA becomes active only once each node has its key on disk, so one of them is of the CA that the most recent node uses.
//
// A leader that is known but does not answer counts as none. Its messages may arrive over a connection that was opened with a certificate
// of a CA that has been retired since, while new connections are refused: with that certificate the node would stay cut off.
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

// confirm reports whether this node's book is known to be the newest, and contacts the leader if that is not known yet. From then on the
// book takes precedence over the saved credentials.
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

// addresses is the roster and the other peers in the saved credentials: the book may be too old to know them.
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

// catchUp calls one node, and accepts a bundle that is newer than the one in use.
func (f *Source) catchUp(ctx context.Context, addr string) (news bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, catchUpAsk)
	defer cancel()
	nonce := make([]byte, identity.MaxBundleNonce)
	_, _ = rand.Read(nonce) // crypto/rand.Read never fails
	sealed, err := f.fetchUnverified(ctx, addr, nonce)
	if err != nil {
		return false, err
	}
	own, err := seal.ParseKey(f.store.LogPublicKey())
	if err != nil {
		return false, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	set := f.cas()
	b, err := identity.OpenBundle(sealed, own, set.domain, nonce, set.number)
	if err != nil || b.Number <= set.number {
		return false, err
	}
	st := f.store.replica.View()
	c := credentials{Version: credentialsVersion, TrustDomain: set.domain, KEK: st.KEK, Epoch: st.Epoch().Number, Peers: f.addresses()}
	if had := f.store.savedIfNewer(st); had != nil {
		c.KEK, c.Epoch = had.KEK, max(c.Epoch, had.Epoch)
	}
	had := set.cas
	set.number, set.issuer, set.cas = b.Number, b.Issuer, nil
	for _, der := range b.CAs {
		if slices.ContainsFunc(had, func(x []byte) bool { return bytes.Equal(x, der) }) {
			set.cas = append(set.cas, der) // this node has its key; the others are only trusted
		}
	}
	if err := f.write(c, set, sealed); err != nil {
		if k := f.store.saved.Load(); k == nil || k.bundle.Number < b.Number {
			return false, err
		}
		f.store.log.Warn("this node could not keep its credentials on its disk", "err", err) // it uses them all the same
	}
	f.store.log.Warn("the CA was changed while this node was down: it shows a certificate of the new one", "bundle", b.Number,
		"issuer", b.Issuer.Short())
	return true, nil
}

// fetchUnverified requests the signed bundle from whatever server answers. THIS CONNECTION IS NOT VERIFIED. It is safe, as for the
// appliance, which does the same: only random bytes are sent, and only a document that the vendor's own key signed over them is accepted.
func (f *Source) fetchUnverified(ctx context.Context, addr string, nonce []byte) ([]byte, error) {
	tr := &http.Transport{DialContext: f.store.Dial, ForceAttemptHTTP2: true, DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true}}
	defer tr.CloseIdleConnections()
	client := boundaryv1connect.NewBootstrapClient(&http.Client{Transport: tr}, "https://"+addr,
		connect.WithReadMaxBytes(2*identity.MaxBundle))
	res, err := client.Bundle(ctx, connect.NewRequest(&boundaryv1.BundleRequest{Nonce: nonce}))
	if err != nil {
		return nil, api.FromWire("controlplane.CatchUp", err)
	}
	return res.Msg.GetSealed(), nil
}
