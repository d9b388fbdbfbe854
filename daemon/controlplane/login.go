// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/x509"
	"os"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/login"
	"github.com/demarc-dev/demarc/daemon/controlplane/refusal"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// Strangers may log in this often, all of them together: each login may have the issuer asked for its keys.
const (
	loginRate  = 5 // a second
	loginBurst = 20
)

// Login is the second door for operators: the vendor's OpenID Connect issuer.
type Login struct {
	Verifier *login.Verifier
	Scopes   []string
	Life     time.Duration // of a certificate
}

// loginOf reads what the operator's file says of it; nil for nothing.
func loginOf(c *configs.OIDC) (*Login, error) {
	const op = "controlplane.login"
	if c == nil {
		return nil, nil
	}
	o := login.Options{Issuer: c.Issuer, ClientID: c.ClientID, KeyHosts: c.KeyHosts, NameClaim: c.NameClaim, Domains: c.Domains, GroupsClaim: c.GroupsClaim, Now: time.Now}
	if c.CAFile != "" {
		b, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, fault.Because(err, op, fault.Invalid, "oidc.ca_file can't be read: %s", c.CAFile)
		}
		if o.Roots = x509.NewCertPool(); !o.Roots.AppendCertsFromPEM(b) {
			return nil, fault.New(op, fault.Invalid, "oidc.ca_file holds no certificate: %s", c.CAFile)
		}
	}
	for _, r := range c.Roles {
		if err := fleet.Rank(r.Role).Check(); err != nil {
			return nil, err
		}
		o.Roles = append(o.Roles, login.Role{Group: r.Group, Rank: fleet.Rank(r.Role)})
	}
	return &Login{Verifier: login.New(o), Scopes: c.Scopes, Life: c.Life}, nil
}

func (b operatorBootstrap) offersLogin() error {
	if b.Server.Options.Login == nil {
		return fault.New("controlplane.Login", fault.NotFound, "this control plane has no login: ask an admin for an invitation")
	}
	return nil
}

// LoginOptions tells a stranger which issuer to log in at.
func (b operatorBootstrap) LoginOptions(_ context.Context, req *connect.Request[controlv1.LoginOptionsRequest]) (*connect.Response[controlv1.LoginOptionsResponse], error) {
	if !b.refusals.Heard(req.Peer().Addr) {
		return nil, refusal.Busy()
	}
	if err := b.offersLogin(); err != nil {
		return nil, err
	}
	l := b.Server.Options.Login
	return connect.NewResponse(&controlv1.LoginOptionsResponse{Issuer: l.Verifier.Issuer, ClientId: l.Verifier.ClientID, Scopes: l.Scopes}), nil
}

// Login trades an ID token for a certificate of some hours. Each refusal is on record with the reason that the caller is told.
func (b operatorBootstrap) Login(ctx context.Context, req *connect.Request[controlv1.LoginRequest]) (*connect.Response[controlv1.LoginResponse], error) {
	return refusal.Answer(ctx, b.refusals, req, "operator.login", b.login)
}

func (b operatorBootstrap) login(ctx context.Context, m *controlv1.LoginRequest) (*controlv1.LoginResponse, string, error) {
	const op = "controlplane.Login"
	if !b.logins.Allow() {
		return nil, "", refusal.Busy()
	}
	if err := b.offersLogin(); err != nil {
		return nil, "", err
	}
	_, spki, err := authority.KeyOf(op, m.GetCsr())
	if err != nil {
		return nil, "", err
	}
	l := b.Server.Options.Login
	p, err := l.Verifier.Verify(ctx, m.GetIdToken(), login.Nonce(spki))
	if err != nil {
		return nil, "", err
	}
	if err := b.replica.Read(ctx); err != nil {
		return nil, p.Name, fault.At(op, "", err)
	}
	name, banned := b.replica.View().OperatorName(p.Subject, p.Name)
	if banned { // nothing is signed for one who is refused
		return nil, name, fault.New(op, fault.Denied, "operator %q is banned", name)
	}
	cert, _, err := authority.Certify(ctx, b.authority, m.GetCsr(), fleet.Operator, name, l.Life, func(is authority.Certificate) ledger.Change[book.State, book.Nothing] {
		return book.LoginOperator{Name: name, Role: p.Rank, Subject: p.Subject, Claim: p.Claim, Token: p.Token, TokenTill: p.Till,
			Serial: is.Serial, Till: is.Till, Issuer: is.Issuer, Bundle: m.GetBundleHeld()}
	})
	if err != nil {
		return nil, name, err
	}
	b.log.Info("an operator logged in", "operator", name, "role", p.Rank)
	return &controlv1.LoginResponse{Certificate: cert, Name: name, Role: string(p.Rank)}, name, nil
}
