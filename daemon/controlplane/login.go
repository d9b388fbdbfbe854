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
	"github.com/demarc-dev/demarc/daemon/controlplane/login"
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

// LoginOperator records that a person logged in, as whom, and with which certificate. The token is spent.
type LoginOperator struct {
	Name      string       `json:"name"`
	Role      fleet.Rank   `json:"role"`
	Subject   fleet.Digest `json:"subject"`
	Claim     string       `json:"claim"`
	Token     fleet.Digest `json:"token"`
	TokenTill time.Time    `json:"token_till"`
	Serial    fleet.Serial `json:"serial"`
	Till      time.Time    `json:"till"`
	Issuer    fleet.Digest `json:"issuer"`
	Bundle    uint64       `json:"bundle,omitempty"` // that it verified before it asked
}

// Kind names the change in the log.
func (LoginOperator) Kind() string { return "operator.login/1" }

// Apply spends the token and makes the certificate the current one: another that the person had is worth nothing any more.
func (c LoginOperator) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "operator.login"
	if err := s.issues(op, c.Issuer); err != nil {
		return Nothing{}, err
	}
	if err := fleet.CheckName("operator", c.Name); err != nil {
		return Nothing{}, err
	}
	if err := c.Role.Check(); err != nil {
		return Nothing{}, err
	}
	if c.Serial == "" || c.Token.Check() != nil || c.Subject.Check() != nil {
		return Nothing{}, fault.New(op, fault.Invalid, "a serial, a token and a subject are needed")
	}
	spent := "oidc/" + string(c.Token)
	if _, used := s.nonces.Get(spent); used {
		return Nothing{}, fault.New(op, fault.Denied, "this token was used before: log in again")
	}
	for it := s.nonces.Iterator(); !it.Done(); {
		if k, till, _ := it.Next(); till.Before(m.At) {
			s.nonces = s.nonces.Delete(k)
		}
	}
	if name, banned := s.OperatorName(c.Subject, c.Name); banned {
		return Nothing{}, fault.New(op, fault.Denied, "operator %q is banned", name)
	} else if name != c.Name {
		return Nothing{}, fault.New(op, fault.Unavailable, "this person is operator %q here: log in again", name)
	}
	o, known := s.operators.Get(c.Name)
	switch {
	case known && o.Status == BannedOperator:
		return Nothing{}, fault.New(op, fault.Denied, "operator %q is banned", c.Name)
	case known && (o.Via != ViaOIDC || o.Subject != c.Subject):
		return Nothing{}, fault.New(op, fault.Conflict, "the name %q is another operator's: have an admin remove that one", c.Name)
	case !known:
		s.dropLapsed(m.At)
		if s.operators.Len() >= MaxOperators {
			return Nothing{}, fault.New(op, fault.Busy, "the book has %d operators: have an admin remove some", MaxOperators)
		}
		o = Operator{Name: c.Name, Status: ActiveOperator, Via: ViaOIDC, Since: m.At, By: m.By, Subject: c.Subject}
	}
	s.nonces = s.nonces.Set(spent, c.TokenTill)
	o.Role, o.Claim, o.Seen, o.Bundle = c.Role, c.Claim, m.At, max(o.Bundle, min(c.Bundle, s.Bundle()))
	o.Current, o.CurrentTill, o.CurrentIssuer = c.Serial, c.Till, c.Issuer
	s.operators = s.operators.Set(c.Name, o)
	return Nothing{}, nil
}

// OperatorName gives the name of the operator who logs in with a subject, and whether it is banned: the name of its first login, whatever the
// issuer calls the person now; called for one who was never here.
func (s State) OperatorName(subject fleet.Digest, called string) (name string, banned bool) {
	name = called
	for it := s.operators.Iterator(); !it.Done(); {
		if _, o, _ := it.Next(); o.Subject == subject && o.Subject != "" {
			if o.Status == BannedOperator {
				return o.Name, true
			}
			name = o.Name
		}
	}
	return name, false
}

// dropLapsed forgets those who logged in once and not for 90 days, where the book is full of operators. A ban is kept.
func (s *State) dropLapsed(at time.Time) {
	if s.operators.Len() < MaxOperators {
		return
	}
	for _, o := range s.Operators() {
		if o.Via == ViaOIDC && o.Status == ActiveOperator && o.CurrentTill.Before(at.Add(-90*24*time.Hour)) {
			s.operators = s.operators.Delete(o.Name)
		}
	}
}

func (b operatorBootstrap) offersLogin() error {
	if b.Server.Options.Login == nil {
		return fault.New("controlplane.Login", fault.NotFound, "this control plane has no login: ask an admin for an invitation")
	}
	return nil
}

// LoginOptions tells a stranger which issuer to log in at.
func (b operatorBootstrap) LoginOptions(_ context.Context, req *connect.Request[controlv1.LoginOptionsRequest]) (*connect.Response[controlv1.LoginOptionsResponse], error) {
	if !b.heard(req.Peer().Addr) {
		return nil, tooMany()
	}
	if err := b.offersLogin(); err != nil {
		return nil, err
	}
	l := b.Server.Options.Login
	return connect.NewResponse(&controlv1.LoginOptionsResponse{Issuer: l.Verifier.Issuer, ClientId: l.Verifier.ClientID, Scopes: l.Scopes}), nil
}

// Login trades an ID token for a certificate of some hours. Each refusal is on record with the reason that the caller is told.
func (b operatorBootstrap) Login(ctx context.Context, req *connect.Request[controlv1.LoginRequest]) (*connect.Response[controlv1.LoginResponse], error) {
	return answer(ctx, b.Server, req, "operator.login", b.login)
}

func (b operatorBootstrap) login(ctx context.Context, m *controlv1.LoginRequest) (*controlv1.LoginResponse, string, error) {
	const op = "controlplane.Login"
	if !b.logins.Allow() {
		return nil, "", tooMany()
	}
	if err := b.offersLogin(); err != nil {
		return nil, "", err
	}
	_, spki, err := keyOf(op, m.GetCsr())
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
	cert, _, err := certify(ctx, b.Server, m.GetCsr(), fleet.Operator, name, l.Life, func(is issued) ledger.Change[State, Nothing] {
		return LoginOperator{Name: name, Role: p.Rank, Subject: p.Subject, Claim: p.Claim, Token: p.Token, TokenTill: p.Till,
			Serial: is.Serial, Till: is.Till, Issuer: is.Issuer, Bundle: m.GetBundleHeld()}
	})
	if err != nil {
		return nil, name, err
	}
	b.log.Info("an operator logged in", "operator", name, "role", p.Rank)
	return &controlv1.LoginResponse{Certificate: cert, Name: name, Role: string(p.Rank)}, name, nil
}
