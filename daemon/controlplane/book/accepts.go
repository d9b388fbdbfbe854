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

// RefusesIssuer refuses certificates of a retired CA. A CA that the book does not know is not refused: this node may be behind, and the
// handshake has already checked the certificate against the trusted CAs.
func (s State) RefusesIssuer(op string, issuer fleet.Digest) error {
	for _, one := range s.Slots {
		if one.Stage == identity.Retired && one.ID() == issuer {
			return retiredCA(op, issuer)
		}
	}
	return nil
}

// RefusesRetired is [State.RefusesIssuer] for a certificate without its chain: it looks for a retired CA that signed it.
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
	return fault.New(op, fault.Denied, "the certificate is of CA %s, which was retired: an appliance proves its platform identity "+
		"again, a node makes its next certificate by itself, an operator logs in again or asks an admin for an invitation", issuer.Short())
}

// StillAccepts returns nil if an open connection of an authenticated peer may stay open in this state, else the reason. A connection ends
// if its certificate is of a retired CA; that of a node or an operator also ends if its certificate is no longer valid. An appliance may
// use the connections that it opened until it is banned, even if its certificate has been replaced since.
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

// RefusesConnection checks a verified connection again once it is registered with those that changes of the book close: a change before
// that is seen here, and a later one closes the connection.
func (s State) RefusesConnection(state tls.ConnectionState) error {
	p, serial, err := identity.PrincipalOf(&state)
	if err != nil {
		return nil // no certificate: an anonymous caller
	}
	_, role, name, _ := p.Split()
	if role == fleet.Node {
		if _, err := s.RefusesNode("controlplane.node", name, serial, state.VerifiedChains[0][0].NotBefore); err != nil {
			return err
		}
	}
	return s.StillAccepts(p, serial, identity.IssuerOf(&state))
}

// Accepts returns nil if a certificate of the appliance is valid now: its serial is the current or the next one.
func (a Appliance) Accepts(serial fleet.Serial) error {
	switch {
	case a.Status == Banned:
		return fault.New("controlplane.admit", fault.Denied, "appliance %q is banned", a.Name)
	case a.Status != Enrolled:
		return fault.New("controlplane.admit", fault.Denied, "appliance %q has not enrolled", a.Name)
	case serial == "" || (serial != a.Current && serial != a.Next):
		return fault.New("controlplane.admit", fault.Denied,
			"this certificate of appliance %q is not its valid one: another has taken its place", a.Name)
	}
	return nil
}

// AcceptsOperator returns nil if a certificate of an operator is accepted in this state. issuer is "" if it is not known. While the book
// has no operators, any is accepted: the first caller is adopted.
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
