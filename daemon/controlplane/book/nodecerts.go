// SPDX-License-Identifier: Apache-2.0

package book

import (
	"slices"
	"time"

	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// NodeCerts is the certificates of one node. A node that holds the key-encryption key issues its own and records them. As for appliances,
// the current and the previous certificate are valid; open connections may still use the previous one. Earlier ones are refused in the
// handshake. After [CertifyNode] no earlier certificate is valid, and open connections end.
//
// A certificate that is not on record is valid, unless it is from before the last [CertifyNode]: this node's book may be behind, and the
// peer that it would refuse could be the leader that it must learn from. Only a holder of the CA's key can issue one.
type NodeCerts struct {
	Floor   time.Time       `json:"floor,omitzero"` // of the last CertifyNode: unrecorded certificates from before it are refused
	Current NodeCert        `json:"current"`
	Before  NodeCert        `json:"before,omitzero"`
	Refused []RefusedSerial `json:"refused,omitempty"` // replaced whole; each until it expires, within bounds
}

// NodeCert is a certificate of a node on record.
type NodeCert struct {
	Serial fleet.Serial `json:"serial"`
	Till   time.Time    `json:"till"`
	File   bool         `json:"file,omitempty"` // it was issued as a file, and not made in the node's memory
}

// RefusedSerial is the serial of a certificate that is no longer valid.
type RefusedSerial struct {
	NodeCert
	Cut bool `json:"cut,omitempty"` // by [CertifyNode]: open connections end too
}

// maxRefused bounds the refused serials of certificates that a node made in its memory, one for each restart. Serials of files are stored
// until they expire; only [CertifyNode] adds those.
const maxRefused = 32

// Certs returns the certificates of a node that are on record.
func (s State) Certs(node string) (NodeCerts, bool) { return s.certs.Get(node) }

// RefusesNode returns why a certificate of a node is not valid, nil if it is; cut reports whether open connections with it end. begins is
// the start of its validity, zero if not known.
func (s State) RefusesNode(op, name string, serial fleet.Serial, begins time.Time) (cut bool, err error) {
	if p, _ := s.peers.Get(name); p.Removed {
		return true, removedNode(op, name)
	}
	c, _ := s.certs.Get(name)
	for _, r := range c.Refused {
		if r.Serial == serial {
			return r.Cut, replacedNode(op, name, serial)
		}
	}
	if !begins.IsZero() && begins.Before(c.Floor) && serial != c.Current.Serial && serial != c.Before.Serial {
		return true, replacedNode(op, name, serial)
	}
	return false, nil
}

func replacedNode(op, name string, serial fleet.Serial) error {
	return fault.New(op, fault.Denied, "certificate %s of node %q was replaced: where its disk is an old copy or lost, give it "+
		"another one with demarc control-plane certify", fault.Clip(string(serial)), fault.Clip(name))
}

// refuse adds certificates to those that are no longer valid, and drops expired ones.
func (c *NodeCerts) refuse(now time.Time, cut bool, certs ...NodeCert) {
	out := slices.Clone(c.Refused)
	for _, one := range certs {
		if one.Serial != "" {
			out = append(out, RefusedSerial{one, cut})
		}
	}
	out = slices.DeleteFunc(out, func(r RefusedSerial) bool { return r.Till.Before(now) })
	memory := 0
	for i := len(out) - 1; i >= 0; i-- {
		if out[i].File || out[i].Cut {
			continue
		}
		if memory++; memory > maxRefused {
			out = slices.Delete(out, i, i+1)
		}
	}
	c.Refused = out
}

// NodeLeaf records the certificate that a node issued to itself, and uses from now on.
type NodeLeaf struct {
	Name string   `json:"name"`
	Leaf NodeCert `json:"leaf"`
	File NodeCert `json:"file,omitzero"` // the one of its file, with which it started
}

func (NodeLeaf) Kind() string { return "node.leaf/1" }

// Apply accepts it only from the node itself. It records the certificate of the file too, so that the file is refused once it is two
// behind.
func (c NodeLeaf) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "node.leaf"
	if m.By != fleet.PrincipalOf(s.TrustDomain, fleet.Node, c.Name) {
		return Nothing{}, fault.New(op, fault.Denied, "%s speaks for node %q", fault.Clip(string(m.By)), fault.Clip(c.Name))
	}
	if c.Leaf.Serial == "" || len(c.Leaf.Serial) > MaxText || len(c.File.Serial) > MaxText || c.Leaf.File {
		return Nothing{}, fault.New(op, fault.Invalid, "node %q has no certificate of its own to put on record", c.Name)
	}
	if _, err := s.RefusesNode(op, c.Name, c.Leaf.Serial, time.Time{}); err != nil {
		return Nothing{}, err
	}
	was, is := s.certs.Get(c.Name)
	if !is && s.certs.Len() >= MaxPeers {
		return Nothing{}, fault.New(op, fault.Conflict, "the book knows the certificates of %d nodes already", s.certs.Len())
	}
	if was.Current.Serial == c.Leaf.Serial {
		return Nothing{}, nil
	}
	if c.File.Serial != "" {
		c.File.File = true
		_, refused := s.RefusesNode(op, c.Name, c.File.Serial, time.Time{})
		switch known := c.File.Serial == was.Current.Serial || c.File.Serial == was.Before.Serial || refused != nil; {
		case known:
		case was.Current.Serial == "":
			was.Current = c.File
		default:
			was.refuse(m.At, false, c.File)
		}
	}
	was.refuse(m.At, false, was.Before)
	was.Before, was.Current = was.Current, c.Leaf
	s.certs = s.certs.Set(c.Name, was)
	return Nothing{}, nil
}

// CertifyNode issues another certificate to a node under its stable name. No earlier certificate of it is valid from then on.
type CertifyNode struct {
	Name   string       `json:"name"`
	Serial fleet.Serial `json:"serial"`
	From   time.Time    `json:"from"` // when it begins
	Till   time.Time    `json:"till"`
	Issuer fleet.Digest `json:"issuer"`
	Reason string       `json:"reason,omitempty"`
}

func (CertifyNode) Kind() string { return "node.certify/1" }

// Apply refuses a removed name.
func (c CertifyNode) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "node.certify"
	if err := fleet.CheckName("node", c.Name); err != nil {
		return Nothing{}, err
	}
	if err := s.issues(op, c.Issuer); err != nil {
		return Nothing{}, err
	}
	if _, err := s.RefusesNode(op, c.Name, c.Serial, time.Time{}); err != nil {
		return Nothing{}, err
	}
	was, is := s.certs.Get(c.Name)
	switch {
	case c.Serial == "" || c.From.IsZero() || c.Till.IsZero():
		return Nothing{}, fault.New(op, fault.Invalid, "no certificate")
	case len(c.Reason) > channel.MaxSentence:
		return Nothing{}, fault.New(op, fault.Invalid, "the reason has more than %d bytes", channel.MaxSentence)
	case !is && s.certs.Len() >= MaxPeers:
		return Nothing{}, fault.New(op, fault.Conflict, "the book knows the certificates of %d nodes already", s.certs.Len())
	}
	was.refuse(m.At, true, was.Before, was.Current)
	for i := range was.Refused { // refuse made a new slice
		was.Refused[i].Cut = true
	}
	if len(was.Refused) > 8*maxRefused {
		return Nothing{}, fault.New(op, fault.Conflict,
			"node %q was given too many certificates that have not run out: remove it and add another", c.Name)
	}
	was.Current, was.Before = NodeCert{Serial: c.Serial, Till: c.Till, File: true}, NodeCert{}
	if c.From.After(was.Floor) {
		was.Floor = c.From
	}
	s.certs = s.certs.Set(c.Name, was)
	s.nodes, s.keks = s.nodes.Delete(c.Name), s.keks.Delete(c.Name) // what it acknowledged was on the disk that is lost
	return Nothing{}, nil
}
