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

// NodeCerts is the certificates of one node. A node that holds the key-encryption key makes its own and puts them on record. Two
// pass, as for appliances: the one in use, and the one before it, which connections that are open have shown. Those before are
// refused in the handshake. After [CertifyNode] nothing from before it passes, and open connections end.
//
// One that is not on record passes, unless it is from before the last [CertifyNode]: this node's book may be behind, and a peer that
// it refused for that could be the leader that would tell it. Only who has the key of the CA can make one.
type NodeCerts struct {
	Floor   time.Time       `json:"floor,omitzero"` // of the last CertifyNode: what is not on record and begins before it is refused
	Current NodeCert        `json:"current"`
	Before  NodeCert        `json:"before,omitzero"`
	Refused []RefusedSerial `json:"refused,omitempty"` // replaced whole; until each has run out, within bounds
}

// NodeCert is a certificate of a node on record.
type NodeCert struct {
	Serial fleet.Serial `json:"serial"`
	Till   time.Time    `json:"till"`
	File   bool         `json:"file,omitempty"` // it was given out as a file, and not made in the node's own memory
}

// RefusedSerial is one that passes no more.
type RefusedSerial struct {
	NodeCert
	Cut bool `json:"cut,omitempty"` // by [CertifyNode]: open connections end too
}

// maxRefused bounds the refused serials of a node that were in its memory only: those of restarts. Files are kept until they have
// run out, and are bounded by who may certify.
const maxRefused = 32

// Certs tells the certificates of a node that are on record.
func (s State) Certs(node string) (NodeCerts, bool) { return s.certs.Get(node) }

// RefusesNode tells why a certificate of a node, with when it begins (zero: not known), does not pass, and whether open connections
// with it end.
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
	return fault.New(op, fault.Denied, "certificate %s of node %q was replaced: where its disk is an old copy or lost, give it another one with demarc control-plane certify", fault.Clip(string(serial)), fault.Clip(name))
}

// refuse puts certificates among those that pass no more, and forgets what has run out.
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

// NodeLeaf records the certificate that a node made for itself, and shows from now on.
type NodeLeaf struct {
	Name string   `json:"name"`
	Leaf NodeCert `json:"leaf"`
	File NodeCert `json:"file,omitzero"` // the one of its file, with which it came
}

// Kind names the change in the log.
func (NodeLeaf) Kind() string { return "node.leaf/1" }

// Apply takes it from the node itself. The one of the file goes on record with it, so that it is refused once it is two behind.
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

// CertifyNode gives a node another certificate under its stable name. Nothing that it had before passes from then on.
type CertifyNode struct {
	Name   string       `json:"name"`
	Serial fleet.Serial `json:"serial"`
	From   time.Time    `json:"from"` // when it begins
	Till   time.Time    `json:"till"`
	Issuer fleet.Digest `json:"issuer"`
	Reason string       `json:"reason,omitempty"`
}

// Kind names the change in the log.
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
	for i := range was.Refused { // refuse has made it another slice
		was.Refused[i].Cut = true
	}
	if len(was.Refused) > 8*maxRefused {
		return Nothing{}, fault.New(op, fault.Conflict, "node %q was given too many certificates that have not run out: remove it and add another", c.Name)
	}
	was.Current, was.Before = NodeCert{Serial: c.Serial, Till: c.Till, File: true}, NodeCert{}
	if c.From.After(was.Floor) {
		was.Floor = c.From
	}
	s.certs = s.certs.Set(c.Name, was)
	s.nodes, s.keks = s.nodes.Delete(c.Name), s.keks.Delete(c.Name) // what it said of its disk is of the one that is lost
	return Nothing{}, nil
}
