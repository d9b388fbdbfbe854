// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
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
func (c EnrolProven) Apply(s *State, m ledger.Meta) (Nothing, error) {
	if err := s.issues("appliance.enrol", c.Issuer); err != nil {
		return Nothing{}, err
	}
	a, err := s.Appliance(c.Enrol.Name)
	if err != nil {
		return Nothing{}, err
	}
	if err := a.sameAccount(c.UID); err != nil {
		return Nothing{}, err
	}
	if a.ExpectDigest() != c.Expect {
		return Nothing{}, fault.New("appliance.enrol", fault.Conflict, "what appliance %q must prove was changed a moment ago: try again", c.Enrol.Name)
	}
	if _, err := c.Enrol.Apply(s, m); err != nil {
		return Nothing{}, err
	}
	a, _ = s.appliances.Get(c.Enrol.Name)
	if c.UID != "" {
		a.UID = c.UID
	}
	s.appliances = s.appliances.Set(a.Name, a)
	return Nothing{}, s.issued(a.Name, c.Enrol.Serial, c.Issuer)
}

// sameAccount compares what the platform calls the account with what it called it at first. A platform that told it once
// must tell it again.
func (a Appliance) sameAccount(uid string) error {
	if a.UID == "" || a.UID == uid {
		return nil
	}
	return fault.New("appliance.enrol", fault.Denied, "appliance %q proved itself with the account %s of its platform before, and %s has the same name now: it was deleted and made anew, or it is an impostor; the vendor lifts this with demarc appliance expect", a.Name, fault.Clip(a.UID), fault.Clip(uid))
}

// SetExpect replaces what an appliance must prove, at an operator's word. It also forgets the keys that were reported since,
// and which account proved it before: the next one that has the registered name is taken.
type SetExpect struct {
	Name   fleet.ApplianceID `json:"name"`
	Expect json.RawMessage   `json:"expect"`
}

// Kind names the change in the log.
func (SetExpect) Kind() string { return "appliance.expect/1" }

// Apply refuses a banned appliance: a ban is for good. It refuses a development identity as [RegisterAppliance] does.
func (c SetExpect) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	a, err := s.Appliance(c.Name)
	if err != nil {
		return Nothing{}, err
	}
	if err := s.TakesPlatform(platformOf(c.Expect)); err != nil {
		return Nothing{}, err
	}
	if a.Status == Banned {
		return Nothing{}, fault.New("appliance.expect", fault.Denied, "appliance %q is banned: register it again under another name", c.Name)
	}
	a.Expect, a.UID, a.Rolled, a.Reported = c.Expect, "", nil, nil
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// TakesPlatform refuses a development identity where the trust domain was not made for it. Whoever has the file of such a key is the
// appliance: it is no proof of any platform.
func (s State) TakesPlatform(kind string) error {
	if kind != identity.KindDev || s.Development {
		return nil
	}
	return fault.New("controlplane.takes", fault.Denied, "the trust domain %q was not made for development, and takes no development identity: "+
		"register the appliance's platform, or make another trust domain with demarc control-plane init --development", s.TrustDomain)
}

// platformOf is the kind of a registration, "" where it has none.
func platformOf(expect json.RawMessage) string {
	kind, err := kindOf(expect)
	if err != nil {
		return "" // it can't be met: see Appliance.expected
	}
	return kind
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
	if err := s.replica.View().TakesPlatform(e.Kind); err != nil {
		return err
	}
	return s.Platforms.CheckExpect(e)
}

// prove compares the proof in a request with what is registered for the appliance.
func (s *Server) prove(ctx context.Context, a Appliance, m *boundaryv1.EnrolRequest, audience string, now time.Time) (identity.Proven, error) {
	e, err := a.Expected()
	if err == nil {
		err = s.replica.View().TakesPlatform(e.Kind)
	}
	if err != nil {
		return identity.Proven{}, err
	}
	p := platform.Proof{Token: m.GetToken()}
	if w := m.GetAws(); w != nil {
		p.AWS = &identity.SignedIdentity{Region: w.GetRegion(), Date: w.GetDate(), AccessKeyID: w.GetAccessKeyId(), SessionToken: w.GetSessionToken(), Signature: w.GetSignature()}
	}
	return s.Platforms.Verify(ctx, e, p, audience, now)
}

// SetExpect replaces what an appliance must prove.
func (s *Server) SetExpect(ctx context.Context, req *connect.Request[controlv1.SetExpectRequest]) (*connect.Response[controlv1.SetExpectResponse], error) {
	m := req.Msg
	if err := s.checkExpect(m.GetExpect()); err != nil {
		return nil, err
	}
	_, err := Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), SetExpect{Name: fleet.ApplianceID(m.GetName()), Expect: m.GetExpect()})
	return connect.NewResponse(&controlv1.SetExpectResponse{}), err
}
