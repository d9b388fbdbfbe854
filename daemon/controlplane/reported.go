// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"bytes"
	"context"
	"encoding/json"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// RollKeys takes the new keys of the calling appliance's cluster.
func (s *Server) RollKeys(ctx context.Context, req *connect.Request[boundaryv1.RollKeysRequest]) (*connect.Response[boundaryv1.RollKeysResponse], error) {
	who := api.From(ctx)
	_, _, id, _ := who.Principal.Split()
	waiting, err := s.rollKeys(ctx, who, fleet.ApplianceID(id), req.Msg)
	if err == nil {
		return connect.NewResponse(&boundaryv1.RollKeysResponse{Waiting: waiting}), nil
	}
	if k := fault.Of(err); k == fault.Denied || k == fault.Invalid || k == fault.Expired {
		s.refusals.Named(ctx, who.Principal, book.Refuse{What: "keys", Name: fault.Clip(id), Fault: k, Reason: fault.Text(err)})
	}
	return nil, err
}

// rollKeys tells whether the keys wait for the operator.
func (s *Server) rollKeys(ctx context.Context, who api.Who, name fleet.ApplianceID, m *boundaryv1.RollKeysRequest) (waiting bool, err error) {
	const op = "controlplane.RollKeys"
	if err := s.replica.Read(ctx); err != nil {
		return false, fault.At(op, "", err)
	}
	page := s.replica.View()
	a, err := page.Appliance(name)
	if err != nil {
		return false, err
	}
	if err := a.Accepts(who.Serial); err != nil {
		return false, err
	}
	e, err := a.Expected()
	switch {
	case err != nil:
		return false, err
	case e.Discovery:
		return false, nil // they are fetched when they are needed
	case e.Kind != identity.KindKubernetes:
		return false, fault.New(op, fault.Invalid, "no keys are pinned for this appliance: there is nothing to replace")
	}
	if _, err := identity.ParseKeys(m.GetJwks()); err != nil {
		return false, err
	}
	if err := seal.StrictJSON(m.GetJwks(), new(any)); err != nil { // it goes into the book as it is
		return false, err
	}
	if same(e.JWKS, m.GetJwks()) {
		return false, nil
	}
	_, key, err := s.authority.Secrets()
	if err != nil {
		return false, err
	}
	till, err := identity.CheckNonce(key, m.GetNonce(), s.replica.Now())
	if err != nil {
		return false, err
	}
	audience, err := identity.KeysAudience(page.TrustDomain, m.GetNonce(), m.GetJwks())
	if err != nil {
		return false, err
	}
	_, old := e.Verify(m.GetToken(), audience, s.replica.Now())
	e.JWKS = m.GetJwks()
	proven, err := e.Verify(m.GetToken(), audience, s.replica.Now()) // else a slip would lock the appliance out
	if err != nil {
		return false, err
	}
	if err := a.SameAccount(proven.UID); err != nil {
		return false, err
	}
	if old != nil && same(a.Reported, m.GetJwks()) {
		return true, nil
	}
	if _, err := book.Submit(ctx, s.replica, who.Principal, "", book.ReportKeys{Name: name, Expect: a.ExpectDigest(), JWKS: m.GetJwks(), Vouched: old == nil, Nonce: m.GetNonce(), NonceTill: till}); err != nil {
		return false, err
	}
	s.log.Info("an appliance reported the keys of its cluster", "appliance", name, "vouched", old == nil)
	return old != nil, nil
}

// same compares two JSON texts but for white space.
func same(a, b json.RawMessage) bool {
	x, err := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err == nil && err2 == nil && bytes.Equal(x, y)
}

// keys is the service of operators about the keys of clusters.
type keys struct {
	*Server
	controlv1connect.UnimplementedIssuerKeysHandler
}

// GetExpect tells what an appliance must prove, and by which keys.
func (k keys) GetExpect(ctx context.Context, req *connect.Request[controlv1.GetExpectRequest]) (*connect.Response[controlv1.GetExpectResponse], error) {
	if err := k.replica.Read(ctx); err != nil {
		return nil, err
	}
	a, err := k.replica.View().Appliance(fleet.ApplianceID(req.Msg.GetName()))
	if err != nil {
		return nil, err
	}
	out := &controlv1.GetExpectResponse{Expect: a.Expect, InUse: a.Rolled, Reported: a.Reported}
	if len(a.Reported) > 0 {
		out.Digest = string(fleet.DigestOf(a.Reported))
	}
	return connect.NewResponse(out), nil
}

// ConfirmKeys makes the keys that wait the ones that count.
func (k keys) ConfirmKeys(ctx context.Context, req *connect.Request[controlv1.ConfirmKeysRequest]) (*connect.Response[controlv1.ConfirmKeysResponse], error) {
	m := req.Msg
	_, err := book.Submit(ctx, k.Server.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), book.ConfirmKeys{Name: fleet.ApplianceID(m.GetName()), Digest: fleet.Digest(m.GetDigest())})
	return connect.NewResponse(&controlv1.ConfirmKeysResponse{}), err
}

// ForgetKeys goes back to the keys that were pinned.
func (k keys) ForgetKeys(ctx context.Context, req *connect.Request[controlv1.ForgetKeysRequest]) (*connect.Response[controlv1.ForgetKeysResponse], error) {
	m := req.Msg
	_, err := book.Submit(ctx, k.Server.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), book.ForgetKeys{Name: fleet.ApplianceID(m.GetName())})
	return connect.NewResponse(&controlv1.ForgetKeysResponse{}), err
}
