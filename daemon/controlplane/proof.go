// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/x509"
	"os"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/platform"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

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
func (s *Server) prove(ctx context.Context, a book.Appliance, m *boundaryv1.EnrolRequest, audience string, now time.Time) (identity.Proven, error) {
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
	_, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), book.SetExpect{Name: fleet.ApplianceID(m.GetName()), Expect: m.GetExpect()})
	return connect.NewResponse(&controlv1.SetExpectResponse{}), err
}
