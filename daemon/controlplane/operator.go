// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/api/channel"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/refusal"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// InviteOperator puts an invitation into the book. Its secret never comes here.
func (s *Server) InviteOperator(ctx context.Context, req *connect.Request[controlv1.InviteOperatorRequest]) (*connect.Response[controlv1.InviteOperatorResponse], error) {
	const op = "controlplane.InviteOperator"
	m := req.Msg
	if n := len(m.GetVerifier()); n != 32 {
		return nil, fault.New(op, fault.Invalid, "the verifier of an invitation has 32 bytes, this one has %d", n)
	}
	valid := m.GetValidSeconds()
	if valid <= 0 || valid > int64(identity.MaxInviteLife/time.Second) {
		return nil, fault.New(op, fault.Invalid, "an invitation that is good for %d seconds: use more than none and at most %s", valid, identity.MaxInviteLife)
	}
	till := s.replica.Now().UTC().Truncate(time.Second).Add(time.Duration(valid) * time.Second)
	_, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()),
		book.InviteOperator{Name: m.GetName(), Role: fleet.Rank(m.GetRole()), Verifier: fleet.DigestOf(m.GetVerifier()), Till: till})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&controlv1.InviteOperatorResponse{TrustDomain: s.replica.View().TrustDomain, LogKey: s.authority.LogPublicKey(), ExpiresUnix: till.Unix()}), nil
}

// ListOperators tells who may call, what they may, and since when.
func (s *Server) ListOperators(ctx context.Context, _ *connect.Request[controlv1.ListOperatorsRequest]) (*connect.Response[controlv1.ListOperatorsResponse], error) {
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	out := &controlv1.ListOperatorsResponse{}
	for _, o := range s.replica.View().Operators() {
		r := &controlv1.OperatorRecord{Name: o.Name, Role: string(o.Role), Status: o.Status, Via: o.Via, SinceUnix: o.Since.Unix(), By: string(o.By),
			Serial: string(o.Current), ExpiresUnix: api.Unix(o.CurrentTill), NextSerial: string(o.Next), Reason: o.Reason}
		if o.Invitation != nil && o.Status == book.Invited {
			r.InvitationExpiresUnix = o.Invitation.Till.Unix()
		}
		out.Operators = append(out.Operators, r)
	}
	return connect.NewResponse(out), nil
}

// GetDoor tells what one needs to recognize this control plane.
func (s *Server) GetDoor(context.Context, *connect.Request[controlv1.GetDoorRequest]) (*connect.Response[controlv1.GetDoorResponse], error) {
	return connect.NewResponse(&controlv1.GetDoorResponse{TrustDomain: s.replica.View().TrustDomain, LogKey: s.authority.LogPublicKey()}), nil
}

// SetOperatorRole changes what an operator may do, from its next call on.
func (s *Server) SetOperatorRole(ctx context.Context, req *connect.Request[controlv1.SetOperatorRoleRequest]) (*connect.Response[controlv1.SetOperatorRoleResponse], error) {
	m := req.Msg
	_, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), book.SetOperatorRole{Name: m.GetName(), Role: fleet.Rank(m.GetRole())})
	return connect.NewResponse(&controlv1.SetOperatorRoleResponse{}), err
}

// BanOperator makes every certificate of an operator worthless and closes its connections, at every node.
func (s *Server) BanOperator(ctx context.Context, req *connect.Request[controlv1.BanOperatorRequest]) (*connect.Response[controlv1.BanOperatorResponse], error) {
	m := req.Msg
	if len(m.GetReason()) > channel.MaxSentence {
		return nil, fault.New("controlplane.BanOperator", fault.Invalid, "the reason has more than %d bytes", channel.MaxSentence)
	}
	_, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), book.BanOperator{Name: m.GetName(), Reason: m.GetReason()})
	return connect.NewResponse(&controlv1.BanOperatorResponse{}), err
}

// RemoveOperator forgets an operator and withdraws its invitation.
func (s *Server) RemoveOperator(ctx context.Context, req *connect.Request[controlv1.RemoveOperatorRequest]) (*connect.Response[controlv1.RemoveOperatorResponse], error) {
	m := req.Msg
	_, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), book.RemoveOperator{Name: m.GetName()})
	return connect.NewResponse(&controlv1.RemoveOperatorResponse{}), err
}

// RenewOperator issues another certificate to the operator who calls. The one that it calls with passes until the new one is
// used.
func (s *Server) RenewOperator(ctx context.Context, req *connect.Request[controlv1.RenewOperatorRequest]) (*connect.Response[controlv1.RenewOperatorResponse], error) {
	who := api.From(ctx)
	_, _, name, ok := who.Principal.Split()
	if !ok {
		return nil, fault.New("controlplane.RenewOperator", fault.Denied, "the caller has no name")
	}
	cert, _, err := authority.Certify(ctx, s.authority, req.Msg.GetCsr(), fleet.Operator, name, s.LeafLife, func(is authority.Certificate) ledger.Change[book.State, book.Nothing] {
		return book.RenewOperator{Name: name, Using: who.Serial, Serial: is.Serial, Till: is.Till, Issuer: is.Issuer}
	})
	if err != nil {
		if refusal.IsRefusal(err) {
			s.refusals.Named(ctx, who.Principal, book.Refuse{What: "operator.renew", Name: fault.Clip(name), Fault: fault.Of(err), Reason: fault.Text(err)})
		}
		return nil, err
	}
	return connect.NewResponse(&controlv1.RenewOperatorResponse{Certificate: cert}), nil
}

// operatorBootstrap is what one who has no operator's certificate yet may call. It is bounded like the bootstrap of
// appliances, and shares their rate.
type operatorBootstrap struct {
	*Server
	controlv1connect.UnimplementedOperatorBootstrapHandler
}

// AcceptInvitation makes an operator of one who holds an invitation. Each refusal is on record with the reason that the
// caller is told.
func (b operatorBootstrap) AcceptInvitation(ctx context.Context, req *connect.Request[controlv1.AcceptInvitationRequest]) (*connect.Response[controlv1.AcceptInvitationResponse], error) {
	return refusal.Answer(ctx, b.refusals, req, "operator.accept", refusal.ByName(b.accept))
}

func (b operatorBootstrap) accept(ctx context.Context, m *controlv1.AcceptInvitationRequest) (*controlv1.AcceptInvitationResponse, error) {
	const op = "controlplane.AcceptInvitation"
	if err := b.replica.Read(ctx); err != nil {
		return nil, fault.At(op, "", err)
	}
	page := b.replica.View()
	if err := identity.CheckInvite(m.GetVerifier(), page.TrustDomain, m.GetName(), m.GetCsr(), m.GetProof()); err != nil {
		return nil, err
	}
	key, _, err := authority.KeyOf(op, m.GetCsr())
	if err != nil {
		return nil, err
	}
	verifier := fleet.DigestOf(m.GetVerifier())
	o, _ := page.FindOperator(m.GetName())
	if err := o.Takes(verifier, key, b.replica.Now()); err != nil { // nothing is signed for one who holds no invitation
		return nil, err
	}
	cert, rank, err := authority.Certify(ctx, b.authority, m.GetCsr(), fleet.Operator, o.Name, b.LeafLife, func(is authority.Certificate) ledger.Change[book.State, fleet.Rank] {
		return book.EnrolOperator{Name: o.Name, Verifier: verifier, Key: key, Serial: is.Serial, Till: is.Till, Issuer: is.Issuer, Bundle: m.GetBundleHeld()}
	})
	if err != nil {
		return nil, err
	}
	b.log.Info("an operator accepted its invitation", "operator", o.Name, "role", rank)
	return &controlv1.AcceptInvitationResponse{Certificate: cert, Role: string(rank)}, nil
}
