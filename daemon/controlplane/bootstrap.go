// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/refusal"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

// bootstrap is the only service that a stranger may call. Messages are bounded at 32 KiB before they are parsed.
type bootstrap struct {
	*Server
	boundaryv1connect.UnimplementedBootstrapHandler
}

// Challenge draws a nonce. It keeps nothing.
func (b bootstrap) Challenge(_ context.Context, req *connect.Request[boundaryv1.ChallengeRequest]) (*connect.Response[boundaryv1.ChallengeResponse], error) {
	if !b.refusals.Heard(req.Peer().Addr) {
		return nil, refusal.Busy()
	}
	now := b.replica.Now()
	_, key, err := b.authority.Secrets()
	if err != nil {
		return nil, err
	}
	nonce, err := identity.NewNonce(key, now, rand.Reader)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&boundaryv1.ChallengeResponse{Nonce: nonce, TrustDomain: b.replica.View().TrustDomain, ServerTimeUnix: now.Unix()}), nil
}

// Enrol checks the proof and issues a certificate. Each refusal is on record with the reason that the caller is told.
func (b bootstrap) Enrol(ctx context.Context, req *connect.Request[boundaryv1.EnrolRequest]) (*connect.Response[boundaryv1.EnrolResponse], error) {
	return refusal.Answer(ctx, b.refusals, req, "enrol", func(ctx context.Context, m *boundaryv1.EnrolRequest) (*boundaryv1.EnrolResponse, string, error) {
		res, err := b.enrol(ctx, m)
		return res, m.GetAppliance(), err
	})
}

func (b bootstrap) enrol(ctx context.Context, m *boundaryv1.EnrolRequest) (*boundaryv1.EnrolResponse, error) {
	const op = "controlplane.Enrol"
	now := b.replica.Now()
	_, key, err := b.authority.Secrets()
	if err != nil {
		return nil, err
	}
	till, err := identity.CheckNonce(key, m.GetNonce(), now)
	if err != nil {
		return nil, err
	}
	if err := b.replica.Read(ctx); err != nil {
		return nil, fault.At(op, "", err)
	}
	page := b.replica.View()
	a, err := page.Appliance(fleet.ApplianceID(m.GetAppliance()))
	if err != nil {
		return nil, err
	}
	audience, err := identity.Audience(page.TrustDomain, m.GetNonce(), m.GetCsr())
	if err != nil {
		return nil, err
	}
	proven, err := b.prove(ctx, a, m, audience, now)
	if err != nil {
		return nil, err
	}
	if k, err := seal.ParseKey(m.GetLogKey()); err != nil {
		return nil, err
	} else if _, ok := k.Public.(ed25519.PublicKey); !ok {
		return nil, fault.New(op, fault.Invalid, "the log key must be Ed25519")
	}
	cert, _, err := authority.Certify(ctx, b.authority, m.GetCsr(), fleet.Appliance, string(a.Name), b.LeafLife, func(is authority.Certificate) ledger.Change[book.State, book.Nothing] {
		return book.EnrolProven{UID: proven.UID, Expect: a.ExpectDigest(), Issuer: is.Issuer,
			Enrol: book.Enrol{Name: a.Name, Nonce: m.GetNonce(), NonceTill: till, Proven: proven.Kind + " " + proven.Issuer + " " + proven.Subject,
				Serial: is.Serial, Till: is.Till, LogKey: m.GetLogKey()}}
	})
	if err != nil {
		return nil, err
	}
	b.log.Info("appliance enrolled", "appliance", a.Name, "proven", proven.Subject)
	cas, number, err := b.authority.NewestBundle(ctx)
	if err != nil {
		return nil, err
	}
	return &boundaryv1.EnrolResponse{Certificate: cert, Bundle: cas, BundleNumber: number, ServerTimeUnix: now.Unix(), LogKey: b.authority.LogPublicKey()}, nil
}

// Renew issues the next certificate of the appliance that calls.
func (s *Server) Renew(ctx context.Context, req *connect.Request[boundaryv1.RenewRequest]) (*connect.Response[boundaryv1.RenewResponse], error) {
	who := api.From(ctx)
	_, _, id, _ := who.Principal.Split()
	a, err := s.replica.View().Appliance(fleet.ApplianceID(id))
	if err != nil {
		return nil, err
	}
	if err := a.Accepts(who.Serial); err != nil {
		return nil, err
	}
	if err := s.renews(a.Name); err != nil {
		return nil, err
	}
	cert, _, err := authority.Certify(ctx, s.authority, req.Msg.GetCsr(), fleet.Appliance, id, s.LeafLife, func(is authority.Certificate) ledger.Change[book.State, book.Nothing] {
		return book.RenewBy{Issuer: is.Issuer, Renew: book.Renew{Name: a.Name, Using: who.Serial, Serial: is.Serial, Till: is.Till}}
	})
	if err != nil {
		return nil, err
	}
	cas, number, err := s.authority.NewestBundle(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&boundaryv1.RenewResponse{Certificate: cert, Bundle: cas, BundleNumber: number}), nil
}
