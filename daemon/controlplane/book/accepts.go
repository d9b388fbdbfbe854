// SPDX-License-Identifier: Apache-2.0

package book

import (
	"crypto/tls"
	"crypto/x509"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// RefusesIssuer refuses certificates of a CA that was retired. One that the book does not know passes: this node may be behind, and the
// handshake has compared the certificate with the CAs that it trusts.
func (s State) RefusesIssuer(op string, issuer fleet.Digest) error {
	for _, one := range s.Slots {
		if one.Stage == identity.Retired && one.ID() == issuer {
			return retiredCA(op, issuer)
		}
	}
	return nil
}

// RefusesRetired is retired for a certificate whose chain is not at hand: it looks for a retired CA that signed it.
func (s State) RefusesRetired(op string, leaf *x509.Certificate) error {
	for _, one := range s.Slots {
		if one.Stage != identity.Retired {
			continue
		}
		if ca, err := x509.ParseCertificate(one.CertDER); err == nil && leaf.CheckSignatureFrom(ca) == nil {
			return retiredCA(op, one.ID())
		}
	}
	return nil
}

func retiredCA(op string, issuer fleet.Digest) error {
	return fault.New(op, fault.Denied, "the certificate is of CA %s, which was retired: an appliance proves its platform identity again, a node makes its next certificate by itself, an operator logs in again or asks an admin for an invitation", issuer.Short())
}

// StillAccepts reports whether an open connection of a proven peer goes on, as this page has it: nobody stays with a certificate of a
// retired CA, and no node or operator with one that passes no more. An appliance makes calls on the connections that it opened until
// it is banned, though another certificate has replaced the one that it showed.
func (s State) StillAccepts(p fleet.Principal, serial fleet.Serial, issuer fleet.Digest) error {
	const op = "controlplane.session"
	if err := s.RefusesIssuer(op, issuer); err != nil {
		return err
	}
	switch _, role, name, _ := p.Split(); role {
	case fleet.Node:
		if cut, err := s.RefusesNode(op, name, serial, time.Time{}); cut {
			return err
		}
		return nil
	case fleet.Appliance:
		if a, err := s.Appliance(fleet.ApplianceID(name)); err == nil && a.Status == Banned {
			return a.Accepts(serial)
		}
		return nil
	}
	return s.AcceptsOperator(p, serial, issuer)
}

// RefusesConnection looks again at a connection whose handshake was verified, once it is among those that changes of the book end: what
// was changed before that is seen here, what is changed after it ends the connection.
func (s State) RefusesConnection(state tls.ConnectionState) error {
	p, serial, err := identity.PrincipalOf(&state)
	if err != nil {
		return nil // it has no certificate: it is nobody here
	}
	_, role, name, _ := p.Split()
	if role == fleet.Node {
		if _, err := s.RefusesNode("controlplane.node", name, serial, state.VerifiedChains[0][0].NotBefore); err != nil {
			return err
		}
	}
	return s.StillAccepts(p, serial, identity.IssuerOf(&state))
}

// Accepts tells whether a certificate of the appliance is good now: its serial is the current or the next one.
func (a Appliance) Accepts(serial fleet.Serial) error {
	switch {
	case a.Status == Banned:
		return fault.New("controlplane.admit", fault.Denied, "appliance %q is banned", a.Name)
	case a.Status != Enrolled:
		return fault.New("controlplane.admit", fault.Denied, "appliance %q has not enrolled", a.Name)
	case serial == "" || (serial != a.Current && serial != a.Next):
		return fault.New("controlplane.admit", fault.Denied, "this certificate of appliance %q is not its valid one: another has taken its place", a.Name)
	}
	return nil
}

// AcceptsOperator reports whether a certificate of an operator may come in, as this page has it. Its issuer is "" if it is not known. While the
// book has no operator any may: the first that calls is adopted.
func (s State) AcceptsOperator(p fleet.Principal, serial fleet.Serial, issuer fleet.Digest) error {
	_, _, name, _ := p.Split()
	o, ok := s.operators.Get(name)
	switch {
	case ok:
		return o.Accepts(serial, issuer)
	case s.operators.Len() == 0:
		return nil
	}
	return UnknownOperator(name)
}
