// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// maxCALife bounds the life of a CA that an operator requests.
const maxCALife = 20 * 365 * 24 * time.Hour

// signedBundleCache is the newest signed bundle: it is signed once for all channels.
type signedBundleCache struct {
	mu     sync.Mutex
	number uint64
	sealed []byte
}

// ListAuthorities returns the stage of each CA, how many still use it, and which parties do not hold the newest bundle.
func (s *Service) ListAuthorities(ctx context.Context,
	_ *connect.Request[controlv1.ListAuthoritiesRequest]) (*connect.Response[controlv1.ListAuthoritiesResponse], error) {
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	st := s.replica.View()
	out := &controlv1.ListAuthoritiesResponse{BundleNumber: st.Bundle()}
	users, operators := map[fleet.Digest]uint32{}, map[fleet.Digest]uint32{}
	for _, o := range st.Operators() {
		if o.Current != "" {
			operators[o.CurrentIssuer]++
		}
		if o.Next != "" && (o.Current == "" || o.NextIssuer != o.CurrentIssuer) {
			operators[o.NextIssuer]++
		}
	}
	for _, a := range st.Appliances() {
		if a.Current != "" {
			users[a.CurrentIssuer]++
		}
		if a.Next != "" && a.NextIssuer != a.CurrentIssuer {
			users[a.NextIssuer]++
		}
	}
	for _, slot := range st.Slots {
		cert, err := x509.ParseCertificate(slot.CertDER)
		if err != nil {
			return nil, fault.At("controlplane.ListAuthorities", fault.Internal, err)
		}
		out.Authorities = append(out.Authorities, &controlv1.Authority{Id: string(slot.ID()), Stage: string(slot.Stage),
			Name:         cert.Subject.CommonName,
			NotAfterUnix: cert.NotAfter.Unix(), Appliances: users[slot.ID()], Operators: operators[slot.ID()]})
	}
	for _, h := range st.Missing(s.replica.NodeNames(), st.Bundle(), s.replica.Now()) {
		out.Missing = append(out.Missing, &controlv1.Missing{Name: h.Name, Kind: h.Kind, Online: h.Online, Holds: h.Holds,
			SeenUnix: api.Unix(h.Seen)})
	}
	return connect.NewResponse(out), nil
}

// NewestBundle returns the trusted CAs after a read of the leader: a node that is behind does not return an older bundle than was
// announced before the call.
func (s *Store) NewestBundle(ctx context.Context) ([][]byte, uint64, error) {
	if err := s.replica.Read(ctx); err != nil {
		return nil, 0, fault.Because(err, "controlplane.bundle", fault.Of(err),
			"it is not known which CAs are the newest: no leader could be asked, try again in a few seconds")
	}
	cas, number := s.replica.View().ActiveCAs()
	return cas, number, nil
}

// SignedBundle is the newest bundle, signed without a client's nonce.
func (s *Store) SignedBundle() ([]byte, error) {
	st := s.replica.View()
	s.signed.mu.Lock()
	defer s.signed.mu.Unlock()
	if s.signed.number != st.Bundle() {
		key, err := s.LogSigner()
		if err != nil {
			return nil, err
		}
		sealed, err := identity.SealBundle(st.TrustDomain, st.Bundle(), st.Slots, s.replica.Now(), nil, key)
		if err != nil {
			return nil, err
		}
		s.signed.number, s.signed.sealed = st.Bundle(), sealed
	}
	return s.signed.sealed, nil
}

// PrepareAuthority creates a CA and announces it.
func (s *Service) PrepareAuthority(ctx context.Context,
	req *connect.Request[controlv1.PrepareAuthorityRequest]) (*connect.Response[controlv1.PrepareAuthorityResponse], error) {
	const op = "controlplane.PrepareAuthority"
	seconds := req.Msg.GetLifeSeconds()
	life := identity.DefaultCALife
	if seconds != 0 {
		if seconds < 0 || seconds > int64(maxCALife/time.Second) {
			return nil, fault.New(op, fault.Invalid, "a CA that lives %d seconds: use more than none and at most 20 years", seconds)
		}
		life = time.Duration(seconds) * time.Second
	}
	by, id := api.From(ctx).Principal, fleet.RequestID(req.Msg.GetRequestId())
	if err := s.replica.Read(ctx); err != nil {
		return nil, fault.At(op, "", err)
	}
	if done, err := s.preparedBy(by, id, life); done != nil || err != nil {
		return done, err
	}
	st := s.replica.View()
	ca, err := identity.NewCA(st.TrustDomain, s.replica.Now(), rand.Reader, life)
	if err != nil {
		return nil, err
	}
	k, err := s.store.keyring.Get(st.KEK)
	if err != nil {
		return nil, err
	}
	key, err := ca.SealKey(k.Key, rand.Reader)
	if err != nil {
		return nil, err
	}
	took, err := book.Submit(ctx, s.replica, by, id,
		book.PrepareCAWith{KEK: st.KEK, PrepareCA: book.PrepareCA{Cert: ca.Cert.Raw, SealedKey: key}})
	if fault.Of(err) == fault.Conflict { // each try draws another CA: the same request may have arrived at another node meanwhile
		if s.replica.Read(ctx) == nil {
			if done, again := s.preparedBy(by, id, life); done != nil && again == nil {
				return done, nil
			}
		}
	}
	return connect.NewResponse(&controlv1.PrepareAuthorityResponse{Id: string(took.ID), BundleNumber: took.Bundle}), err
}

// preparedBy is the earlier response to a repeated request; nil if the request is new.
func (s *Service) preparedBy(by fleet.Principal, id fleet.RequestID,
	life time.Duration) (*connect.Response[controlv1.PrepareAuthorityResponse], error) {
	const op = "controlplane.PrepareAuthority"
	for _, slot := range s.replica.View().Slots {
		if id == "" || slot.Request != id || slot.By != by {
			continue
		}
		cert, err := x509.ParseCertificate(slot.CertDER)
		if err != nil {
			return nil, fault.At(op, fault.Internal, err)
		}
		if cert.NotAfter.Sub(cert.NotBefore) != life+identity.DefaultBackdate {
			return nil, fault.New(op, fault.Conflict, "this request id was used for a CA of another life: draw a new one")
		}
		return connect.NewResponse(&controlv1.PrepareAuthorityResponse{Id: string(slot.ID()), BundleNumber: slot.Since}), nil
	}
	return nil, nil
}

// ActivateAuthority makes a prepared CA the one that issues.
func (s *Service) ActivateAuthority(ctx context.Context,
	req *connect.Request[controlv1.ActivateAuthorityRequest]) (*connect.Response[controlv1.ActivateAuthorityResponse], error) {
	_, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(req.Msg.GetRequestId()),
		book.ActivateCA{ID: fleet.Digest(req.Msg.GetId()), Nodes: s.replica.NodeNames(), Without: req.Msg.GetWithout()})
	return connect.NewResponse(&controlv1.ActivateAuthorityResponse{}), err
}

// RetireAuthority ends the trust in a CA. It refuses an operator whose own certificate is of that CA, compromised or not, so that at
// least one operator can still call.
func (s *Service) RetireAuthority(ctx context.Context,
	req *connect.Request[controlv1.RetireAuthorityRequest]) (*connect.Response[controlv1.RetireAuthorityResponse], error) {
	const op = "controlplane.RetireAuthority"
	m := req.Msg
	id := fleet.Digest(m.GetId())
	if own := api.From(ctx).Issuer; own != "" && own == id {
		return nil, fault.New(op, fault.Conflict,
			"your own certificate is of CA %s, and you would be cut off with it: run demarc operator renew first", own.Short())
	}
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	_, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()),
		book.RetireCA{ID: id, Nodes: s.replica.NodeNames(), Compromised: m.GetCompromised()})
	return connect.NewResponse(&controlv1.RetireAuthorityResponse{}), err
}
