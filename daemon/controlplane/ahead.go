// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/workload"
)

// How a node that hears of no leader looks for a change of CA.
const (
	catchUpEvery = 5 * time.Second
	catchUpAsk   = 5 * time.Second // of one other node
)

// kept is the CAs, their keys sealed, as they stand on a node's disk beside the log. A node that starts knows nothing of the
// log but what a snapshot holds, until it hears from a leader which of it counts; and no leader speaks to a node that shows a
// certificate of a CA that was retired.
type kept struct {
	Version     string          `json:"version"`
	TrustDomain string          `json:"trust_domain"`
	Bundle      uint64          `json:"bundle"`
	Slots       []identity.Slot `json:"slots"`
	KEK         string          `json:"kek,omitempty"`     // that seals; see [State]
	Secrets     []Secret        `json:"secrets,omitempty"` // sealed too: with them the node knows the log's key before its book does
}

func keptOf(page State) kept {
	return kept{keptVersion, page.TrustDomain, page.Bundle(), page.Slots, page.KEK, page.Secrets}
}

const keptVersion = "demarc-node-cas/1"

// KeepAt has the source keep the CAs in a file, and use what is there already where the book is behind it.
func (f *Source) KeepAt(path string) error {
	const op = "controlplane.KeepAt"
	f.mu.Lock()
	defer f.mu.Unlock()
	f.path = path
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the CAs that this node kept can't be read: %s", path)
	}
	var k kept
	if err := seal.StrictJSON(b, &k); err != nil || k.Version != keptVersion {
		return fault.Because(err, op, fault.Invalid, "%s is damaged: remove it, and the node starts with its bundle file", path)
	}
	f.kept = k
	f.server.kept.Store(&k)
	return nil
}

// keep puts the CAs of a page on disk where they, or the key that seals theirs, are news. The caller holds mu.
func (f *Source) keep(page State) error {
	if f.path == "" || page.Bundle() < f.kept.Bundle || page.Bundle() == f.kept.Bundle && page.KEK == f.kept.KEK {
		return nil
	}
	k := keptOf(page)
	b, err := json.Marshal(k)
	if err != nil {
		return fault.At("controlplane.keep", fault.Internal, err)
	}
	if err := workload.Replace(f.path, b); err != nil {
		return fault.At("controlplane.keep", fault.Unavailable, err)
	}
	f.kept = k
	f.server.kept.Store(&k)
	return nil
}

// remember keeps the CAs of a page; see keep.
func (f *Source) remember(page State) {
	if page.TrustDomain == "" {
		return // the book has not begun
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.keep(page); err != nil {
		f.server.log.Warn("this node could not keep the CAs on its disk", "err", err)
	}
}

// known is the CAs as the book has them, or as they were kept where the book is behind that. The caller holds mu.
func (f *Source) known() kept {
	page := f.server.book.View()
	if page.Bundle() < f.kept.Bundle {
		return f.kept
	}
	return keptOf(page)
}

// issuing is the slot that issues: by the book, or by what the others signed where the book is behind.
func (f *Source) issuing(page kept) (identity.Slot, error) {
	if f.ahead == nil || f.ahead.Number <= page.Bundle {
		return identity.Issuer(page.Slots)
	}
	for _, s := range page.Slots {
		if s.ID() == f.ahead.Issuer && len(s.SealedKey) > 0 {
			return s, nil
		}
	}
	return identity.Slot{}, fault.New("controlplane.Source", fault.NotFound, "the others issue from CA %s, which this node's book does not hold: make this node anew, see the runbook", f.ahead.Issuer.Short())
}

// CatchUp looks, while this node hears of no leader, whether the CA was changed and the old one retired while it was down.
// Then its own certificate, made by the book as it stands here, is one that nobody takes, and so the book would never come
// here. A CA issues only once each node has its key, so that the node can make the right certificate as soon as it is told
// which CA issues now. That stands in the signed bundle, which any node hands to anybody; the key that signs it is derived
// from the key-encryption key and so is this node's own too.
func (s *Server) CatchUp(ctx context.Context, f *Source, every time.Duration) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if s.Order.Leader() != "" || f.begun() == "" {
			continue
		}
		for _, m := range s.Members {
			if m.Name == s.name || m.API == "" {
				continue
			}
			if err := s.catchUp(ctx, f, m.API); err != nil && ctx.Err() == nil {
				s.log.Debug("a node was asked for the signed bundle", "node", m.Name, "err", fault.Text(err))
			}
		}
	}
}

// begun is the trust domain of the CAs that are known, "" before any are.
func (f *Source) begun() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.known().TrustDomain
}

// catchUp asks one node, and takes what is newer than the book and than what is held.
func (s *Server) catchUp(ctx context.Context, f *Source, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, catchUpAsk)
	defer cancel()
	nonce := make([]byte, identity.MaxBundleNonce)
	_, _ = rand.Read(nonce) // crypto/rand.Read never fails
	sealed, err := s.askAnyone(ctx, addr, nonce)
	if err != nil {
		return err
	}
	own, err := seal.ParseKey(s.logPublic())
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	page := f.known()
	b, err := identity.OpenBundle(sealed, own, page.TrustDomain, nonce, page.Bundle)
	if err != nil {
		return err
	}
	if b.Number <= page.Bundle || f.ahead != nil && b.Number <= f.ahead.Number {
		return nil
	}
	f.ahead = &b
	s.log.Warn("the CA was changed while this node was down: it shows a certificate of the new one", "bundle", b.Number, "issuer", b.Issuer.Short())
	return nil
}

// askAnyone asks WHOEVER ANSWERS for the signed bundle. THIS CONNECTION IS NOT VERIFIED. As at the appliance, which does the
// same, that is safe: nothing goes out on it but random bytes, and nothing that comes back is believed but a document that
// the vendor's own key signed over them.
func (s *Server) askAnyone(ctx context.Context, addr string, nonce []byte) ([]byte, error) {
	tr := &http.Transport{DialContext: s.Dial, ForceAttemptHTTP2: true, DisableKeepAlives: true, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true}}
	defer tr.CloseIdleConnections()
	client := boundaryv1connect.NewBootstrapClient(&http.Client{Transport: tr}, "https://"+addr, connect.WithReadMaxBytes(2*identity.MaxBundle))
	res, err := client.Bundle(ctx, connect.NewRequest(&boundaryv1.BundleRequest{Nonce: nonce}))
	if err != nil {
		return nil, api.FromWire("controlplane.CatchUp", err)
	}
	return res.Msg.GetSealed(), nil
}
