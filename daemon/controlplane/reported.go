// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"bytes"
	"context"
	"encoding/json"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

// RollKeys replaced the pinned keys of an appliance's cluster at the word of the appliance's certificate alone. It is in
// older logs; [ReportKeys] took its place.
type RollKeys struct {
	Name   fleet.ApplianceID `json:"name"`
	Expect fleet.Digest      `json:"expect"` // of the registration that the new keys were compared with
	JWKS   json.RawMessage   `json:"jwks"`
}

// Kind names the change in the log.
func (RollKeys) Kind() string { return "appliance.keys/1" }

// Apply leaves all else that is registered as it is.
func (c RollKeys) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	const op = "appliance.keys"
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if a.Status != Enrolled {
		return Nothing{}, fault.New(op, fault.Denied, "appliance %q is not enrolled", c.Name)
	}
	if fleet.DigestOf(a.Expect) != c.Expect {
		return Nothing{}, fault.New(op, fault.Conflict, "what appliance %q must prove was changed a moment ago: try again", c.Name)
	}
	var e identity.Expect
	if err := seal.StrictJSON(a.Expect, &e); err != nil {
		return Nothing{}, fault.At(op, fault.Internal, err)
	}
	e.JWKS = c.JWKS
	if err := e.Check(); err != nil {
		return Nothing{}, err
	}
	if a.Expect, err = json.Marshal(e); err != nil {
		return Nothing{}, fault.At(op, fault.Internal, err)
	}
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// Expected is what the appliance must prove, with the keys that count now.
func (a Appliance) Expected() (identity.Expect, error) {
	var e identity.Expect
	if err := seal.StrictJSON(a.Expect, &e); err != nil {
		return e, fault.At("controlplane.expected", fault.Internal, err)
	}
	if len(a.Rolled) > 0 {
		e.JWKS = a.Rolled
	}
	return e, nil
}

// ExpectDigest names what the appliance must prove: another registration or other keys have another digest.
func (a Appliance) ExpectDigest() fleet.Digest {
	if len(a.Rolled) == 0 {
		return fleet.DigestOf(a.Expect)
	}
	return fleet.DigestOf(bytes.Join([][]byte{a.Expect, a.Rolled}, []byte{'\n'}))
}

// ReportKeys takes the keys that an appliance's cluster publishes now. What the vendor registered stays beside them. They
// count from now on where a key that counted before vouches for them: it signed a token, for the registered service
// account, that is made out to this nonce and these keys. Whoever holds nothing but the appliance's certificate and its key
// has no such token; what such a one reports waits for the operator, and proves nothing.
type ReportKeys struct {
	Name      fleet.ApplianceID `json:"name"`
	Expect    fleet.Digest      `json:"expect"` // see mustProve: what the token was compared with
	JWKS      json.RawMessage   `json:"jwks"`
	Vouched   bool              `json:"vouched"`
	Nonce     string            `json:"nonce"`
	NonceTill time.Time         `json:"nonce_till"`
}

// Kind names the change in the log.
func (ReportKeys) Kind() string { return "appliance.keys/2" }

// Apply spends the nonce.
func (c ReportKeys) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "appliance.keys"
	if err := s.spend(op, "report of keys", c.Nonce, c.NonceTill, m.At); err != nil {
		return Nothing{}, err
	}
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if a.Status != Enrolled {
		return Nothing{}, fault.New(op, fault.Denied, "appliance %q is not enrolled", c.Name)
	}
	if a.ExpectDigest() != c.Expect {
		return Nothing{}, fault.New(op, fault.Conflict, "what appliance %q must prove was changed a moment ago: try again", c.Name)
	}
	if c.Vouched {
		return Nothing{}, s.countKeys(a, c.JWKS)
	}
	a.Reported = c.JWKS
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// countKeys makes keys the ones that count.
func (s *State) countKeys(a Appliance, jwks json.RawMessage) error {
	e, err := a.Expected()
	if err != nil {
		return err
	}
	e.JWKS = jwks
	if err := e.Check(); err != nil {
		return err
	}
	a.Rolled, a.Reported = jwks, nil
	s.appliances = s.appliances.Set(a.Name, a)
	return nil
}

// ConfirmKeys makes the keys that wait the ones that count, at an operator's word.
type ConfirmKeys struct {
	Name   fleet.ApplianceID `json:"name"`
	Digest fleet.Digest      `json:"digest"` // of the keys that the operator looked at
}

// Kind names the change in the log.
func (ConfirmKeys) Kind() string { return "appliance.keys.confirm/1" }

// Apply refuses where other keys wait than the operator looked at.
func (c ConfirmKeys) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	const op = "appliance.keys.confirm"
	a, err := s.Appliance(c.Name)
	switch {
	case err != nil:
		return Nothing{}, err
	case len(a.Reported) == 0:
		return Nothing{}, fault.New(op, fault.NotFound, "no keys of appliance %q wait to be confirmed", c.Name)
	case fleet.DigestOf(a.Reported) != c.Digest:
		return Nothing{}, fault.New(op, fault.Conflict, "appliance %q reported other keys than %s: look at them again", c.Name, c.Digest.Short())
	}
	return Nothing{}, s.countKeys(a, a.Reported)
}

// ForgetKeys goes back to the keys that the vendor registered.
type ForgetKeys struct {
	Name fleet.ApplianceID `json:"name"`
}

// Kind names the change in the log.
func (ForgetKeys) Kind() string { return "appliance.keys.forget/1" }

// Apply drops the keys that count in place of the registered ones, and those that wait.
func (c ForgetKeys) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if len(a.Rolled) == 0 && len(a.Reported) == 0 {
		return Nothing{}, fault.New("appliance.keys.forget", fault.NotFound, "of appliance %q nothing is known but what was registered", c.Name)
	}
	a.Rolled, a.Reported = nil, nil
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// RollKeys takes the new keys of the calling appliance's cluster.
func (s *Server) RollKeys(ctx context.Context, req *connect.Request[boundaryv1.RollKeysRequest]) (*connect.Response[boundaryv1.RollKeysResponse], error) {
	who := api.From(ctx)
	_, _, id, _ := who.Principal.Split()
	waiting, err := s.rollKeys(ctx, who, fleet.ApplianceID(id), req.Msg)
	if err == nil {
		return connect.NewResponse(&boundaryv1.RollKeysResponse{Waiting: waiting}), nil
	}
	if k := fault.Of(err); k == fault.Denied || k == fault.Invalid || k == fault.Expired {
		s.onRecord(ctx, who.Principal, Refuse{What: "keys", Name: fault.Clip(id), Fault: k, Reason: fault.Text(err)})
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
	_, key, err := s.secrets()
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
	if err := a.sameAccount(proven.UID); err != nil {
		return false, err
	}
	if old != nil && same(a.Reported, m.GetJwks()) {
		return true, nil
	}
	if _, err := Submit(ctx, s.replica, who.Principal, "", ReportKeys{Name: name, Expect: a.ExpectDigest(), JWKS: m.GetJwks(), Vouched: old == nil, Nonce: m.GetNonce(), NonceTill: till}); err != nil {
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
	_, err := Submit(ctx, k.Server.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), ConfirmKeys{Name: fleet.ApplianceID(m.GetName()), Digest: fleet.Digest(m.GetDigest())})
	return connect.NewResponse(&controlv1.ConfirmKeysResponse{}), err
}

// ForgetKeys goes back to the keys that were pinned.
func (k keys) ForgetKeys(ctx context.Context, req *connect.Request[controlv1.ForgetKeysRequest]) (*connect.Response[controlv1.ForgetKeysResponse], error) {
	m := req.Msg
	_, err := Submit(ctx, k.Server.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), ForgetKeys{Name: fleet.ApplianceID(m.GetName())})
	return connect.NewResponse(&controlv1.ForgetKeysResponse{}), err
}
