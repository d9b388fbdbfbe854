// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"os"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane/platform"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

// EnrolProven is Enrol with what else the platform vouched for, and with the CA that issued.
type EnrolProven struct {
	Enrol  Enrol        `json:"enrol"`
	UID    string       `json:"uid,omitempty"` // of the account or role; "" where the platform told none
	Expect fleet.Digest `json:"expect"`        // of the registration that the proof was compared with
	Issuer fleet.Digest `json:"issuer"`        // the CA
}

// Kind names the change in the log.
func (EnrolProven) Kind() string { return "appliance.enrol/2" }

// Apply refuses another account or role of the same name than enrolled before, a proof of what is no longer registered,
// and a certificate of a CA that no longer issues.
func (c EnrolProven) Apply(s *State, m ledger.Meta) (none, error) {
	if err := s.issues("appliance.enrol", c.Issuer); err != nil {
		return none{}, err
	}
	a, err := s.Appliance(c.Enrol.Name)
	if err != nil {
		return none{}, err
	}
	if err := a.sameAccount(c.UID); err != nil {
		return none{}, err
	}
	if fleet.DigestOf(a.Expect) != c.Expect {
		return none{}, fault.New("appliance.enrol", fault.Conflict, "what appliance %q must prove was changed a moment ago: try again", c.Enrol.Name)
	}
	if _, err := c.Enrol.Apply(s, m); err != nil {
		return none{}, err
	}
	a, _ = s.appliances.Get(c.Enrol.Name)
	if c.UID != "" {
		a.UID = c.UID
	}
	s.appliances = s.appliances.Set(a.Name, a)
	return none{}, s.issued(a.Name, c.Enrol.Serial, c.Issuer)
}

// sameAccount compares what the platform calls the account with what it called it at first. A platform that told it once
// must tell it again.
func (a Appliance) sameAccount(uid string) error {
	if a.UID == "" || a.UID == uid {
		return nil
	}
	return fault.New("appliance.enrol", fault.Denied, "appliance %q proved itself with the account %s of its platform before, and %s has the same name now: it was deleted and made anew, or it is an impostor; the vendor lifts this with demarc appliance expect", a.Name, clip(a.UID), clip(uid))
}

// RollKeys replaces the pinned keys of an appliance's cluster, at the appliance's own word.
type RollKeys struct {
	Name   fleet.ApplianceID `json:"name"`
	Expect fleet.Digest      `json:"expect"` // of the registration that the new keys were compared with
	JWKS   json.RawMessage   `json:"jwks"`
}

// Kind names the change in the log.
func (RollKeys) Kind() string { return "appliance.keys/1" }

// Apply leaves all else that is registered as it is.
func (c RollKeys) Apply(s *State, _ ledger.Meta) (none, error) {
	const op = "appliance.keys"
	a, err := s.Appliance(c.Name)
	if err != nil {
		return none{}, err
	}
	if a.Status != Enrolled {
		return none{}, fault.New(op, fault.Denied, "appliance %q is not enrolled", c.Name)
	}
	if fleet.DigestOf(a.Expect) != c.Expect {
		return none{}, fault.New(op, fault.Conflict, "what appliance %q must prove was changed a moment ago: try again", c.Name)
	}
	var e identity.Expect
	if err := seal.StrictJSON(a.Expect, &e); err != nil {
		return none{}, fault.At(op, fault.Internal, err)
	}
	e.JWKS = c.JWKS
	if err := e.Check(); err != nil {
		return none{}, err
	}
	if a.Expect, err = json.Marshal(e); err != nil {
		return none{}, fault.At(op, fault.Internal, err)
	}
	s.appliances = s.appliances.Set(c.Name, a)
	return none{}, nil
}

// SetExpect replaces what an appliance must prove, at an operator's word. It also forgets which account proved it before:
// the next one that has the registered name is taken.
type SetExpect struct {
	Name   fleet.ApplianceID `json:"name"`
	Expect json.RawMessage   `json:"expect"`
}

// Kind names the change in the log.
func (SetExpect) Kind() string { return "appliance.expect/1" }

// Apply refuses a banned appliance: a ban is for good.
func (c SetExpect) Apply(s *State, _ ledger.Meta) (none, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return none{}, err
	}
	if a.Status == Banned {
		return none{}, fault.New("appliance.expect", fault.Denied, "appliance %q is banned: register it again under another name", c.Name)
	}
	a.Expect, a.UID = c.Expect, ""
	s.appliances = s.appliances.Set(c.Name, a)
	return none{}, nil
}

// platformsOf makes the verifier of the operator's file.
func platformsOf(c configs.Platforms) (*platform.Verifier, error) {
	o := platform.Options{GoogleKeys: c.GoogleKeys, Now: time.Now}
	for _, i := range c.Kubernetes.Issuers {
		to := platform.Issuer{URL: i.URL, PrivateHost: i.PrivateHost}
		if i.CAFile != "" {
			b, err := os.ReadFile(i.CAFile)
			if to.Roots = x509.NewCertPool(); err != nil || !to.Roots.AppendCertsFromPEM(b) {
				return nil, fault.Because(err, "controlplane.platforms", fault.Invalid, "ca_file holds no certificate, or can't be read: %s", i.CAFile)
			}
		}
		o.Issuers = append(o.Issuers, to)
	}
	return platform.New(o)
}

// checkExpect tells whether a registration can be met here.
func (s *Server) checkExpect(b []byte) error {
	var e identity.Expect
	if err := seal.StrictJSON(b, &e); err != nil {
		return err
	}
	return s.Platforms.CheckExpect(e)
}

// prove compares the proof in a request with what is registered for the appliance.
func (s *Server) prove(ctx context.Context, a Appliance, m *boundaryv1.EnrolRequest, audience string, now time.Time) (identity.Proven, error) {
	var e identity.Expect
	if err := seal.StrictJSON(a.Expect, &e); err != nil {
		return identity.Proven{}, fault.At("controlplane.Enrol", fault.Internal, err)
	}
	p := platform.Proof{Token: m.GetToken()}
	if w := m.GetAws(); w != nil {
		p.AWS = &identity.SignedIdentity{Region: w.GetRegion(), Date: w.GetDate(), AccessKeyID: w.GetAccessKeyId(), SessionToken: w.GetSessionToken(), Signature: w.GetSignature()}
	}
	return s.Platforms.Verify(ctx, e, p, audience, now)
}

// RollKeys takes the new keys of the calling appliance's cluster. What vouches for them is the appliance's certificate; the
// token shows that they sign for the registered service account, so that no slip locks the appliance out.
func (s *Server) RollKeys(ctx context.Context, req *connect.Request[boundaryv1.RollKeysRequest]) (*connect.Response[boundaryv1.RollKeysResponse], error) {
	who := api.From(ctx)
	_, _, id, _ := who.Principal.Split()
	err := s.rollKeys(ctx, who, fleet.ApplianceID(id), req.Msg)
	if err == nil {
		return connect.NewResponse(&boundaryv1.RollKeysResponse{}), nil
	}
	if k := fault.Of(err); k == fault.Denied || k == fault.Invalid || k == fault.Expired {
		s.onRecord(ctx, who.Principal, Refuse{What: "keys", Name: clip(id), Fault: k, Reason: fault.Text(err)})
	}
	return nil, err
}

func (s *Server) rollKeys(ctx context.Context, who api.Who, name fleet.ApplianceID, m *boundaryv1.RollKeysRequest) error {
	const op = "controlplane.RollKeys"
	if err := s.Order.Read(ctx); err != nil {
		return fault.At(op, "", err)
	}
	page := s.book.View()
	a, err := page.Appliance(name)
	if err != nil {
		return err
	}
	if err := a.admits(who.Serial); err != nil {
		return err
	}
	var e identity.Expect
	if err := seal.StrictJSON(a.Expect, &e); err != nil {
		return fault.At(op, fault.Internal, err)
	}
	if e.Discovery {
		return nil // they are fetched when they are needed
	}
	if e.Kind != identity.KindKubernetes {
		return fault.New(op, fault.Invalid, "no keys are pinned for this appliance: there is nothing to replace")
	}
	if _, err := identity.ParseKeys(m.GetJwks()); err != nil {
		return err
	}
	if err := seal.StrictJSON(m.GetJwks(), new(any)); err != nil { // it goes into the book as it is
		return err
	}
	if same(e.JWKS, m.GetJwks()) {
		return nil
	}
	audience, err := identity.KeysAudience(page.TrustDomain, m.GetJwks())
	if err != nil {
		return err
	}
	was := fleet.DigestOf(a.Expect)
	e.JWKS = m.GetJwks()
	proven, err := e.Verify(m.GetToken(), audience, s.now())
	if err != nil {
		return err
	}
	if err := a.sameAccount(proven.UID); err != nil {
		return err
	}
	if _, err := submit(ctx, s, who.Principal, "", RollKeys{Name: name, Expect: was, JWKS: m.GetJwks()}); err != nil {
		return err
	}
	s.log.Info("the keys of an appliance's cluster were rolled over", "appliance", name)
	return nil
}

// same compares two JSON texts but for white space.
func same(a, b json.RawMessage) bool {
	x, err := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err == nil && err2 == nil && bytes.Equal(x, y)
}

// SetExpect replaces what an appliance must prove.
func (s *Server) SetExpect(ctx context.Context, req *connect.Request[controlv1.SetExpectRequest]) (*connect.Response[controlv1.SetExpectResponse], error) {
	m := req.Msg
	if err := s.checkExpect(m.GetExpect()); err != nil {
		return nil, err
	}
	_, err := submit(ctx, s, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), SetExpect{Name: fleet.ApplianceID(m.GetName()), Expect: m.GetExpect()})
	return connect.NewResponse(&controlv1.SetExpectResponse{}), err
}
