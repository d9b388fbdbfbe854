// SPDX-License-Identifier: Apache-2.0

// Package fleet is the nouns: appliance, customer, principal, phase, posture, digest.
//
// Each noun has a type of its own, so that one can't be passed for another, and one spelling that every
// document, log and wire message shares.
package fleet

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// The kinds of name. Names match [NamePattern].
type (
	ApplianceID string
	CustomerID  string
	RequestID   string // chosen by the caller, unique for one principal; at most 64 bytes
	Serial      string // names a certificate and its key; see identity.SerialOf
)

// NamePattern is what a name may look like: a DNS label.
const NamePattern = `^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`

var name = regexp.MustCompile(NamePattern)

// CheckName tells whether s may name a customer, an appliance, a node or an operator.
func CheckName(what, s string) error {
	if !name.MatchString(s) {
		return fault.New("fleet.CheckName", fault.Invalid, "%s name %q: use 1 to 63 lower-case letters, digits and inner hyphens", what,
			fault.Clip(s))
	}
	return nil
}

// Digest is the content address of bytes: "sha256:" and 64 lower-case hex digits.
type Digest string

// DigestOf gives the digest of b.
func DigestOf(b []byte) Digest {
	h := sha256.Sum256(b)
	return Digest("sha256:" + hex.EncodeToString(h[:]))
}

// Check tells whether d is spelled as a digest.
func (d Digest) Check() error {
	s, ok := strings.CutPrefix(string(d), "sha256:")
	if ok && len(s) == 64 && strings.ToLower(s) == s {
		if _, err := hex.DecodeString(s); err == nil {
			return nil
		}
	}
	return fault.New("fleet.Digest", fault.Invalid, "%q is not a digest of the form sha256:<64 hex digits>", fault.Clip(string(d)))
}

// Short is the first twelve hex digits, for people.
func (d Digest) Short() string {
	s := strings.TrimPrefix(string(d), "sha256:")
	return s[:min(12, len(s))]
}

// Role is the class of a principal: the second part of its SPIFFE ID's path.
type Role string

// The closed set of roles that a certificate can prove.
const (
	Node      Role = "node"
	Operator  Role = "operator"
	Appliance Role = "appliance"
)

// Principal is a proven caller: a SPIFFE ID, spiffe://<trust domain>/{node,operator,appliance}/<name>,
// or customer:<key id> in the customer's own book, or "local" for the owner of the appliance's socket.
// The empty principal is nobody.
type Principal string

// Local is whoever holds the appliance's own socket: the customer's administrator on that host.
const Local Principal = "local"

// PrincipalOf spells a principal.
func PrincipalOf(trustDomain string, r Role, name string) Principal {
	return Principal("spiffe://" + trustDomain + "/" + string(r) + "/" + name)
}

// Split takes a SPIFFE principal apart; ok is false for any other spelling.
func (p Principal) Split() (trustDomain string, r Role, id string, ok bool) {
	rest, found := strings.CutPrefix(string(p), "spiffe://")
	parts := strings.Split(rest, "/")
	if !found || len(parts) != 3 || parts[0] == "" || !name.MatchString(parts[2]) {
		return "", "", "", false
	}
	r = Role(parts[1])
	if r != Node && r != Operator && r != Appliance {
		return "", "", "", false
	}
	return parts[0], r, parts[2], true
}

// Phase is a tier of the vendor's access. Observe is on by default; each other is off until the customer grants it.
type Phase string

// The closed set of phases.
const (
	Install      Phase = "install"
	Observe      Phase = "observe"
	Deploy       Phase = "deploy"
	OperateRead  Phase = "operate.read"
	OperateWrite Phase = "operate.write"
	OperateAdmin Phase = "operate.admin"
)

// Phases lists every phase, from the least power to the most within operate.
func Phases() []Phase {
	return []Phase{Install, Observe, Deploy, OperateRead, OperateWrite, OperateAdmin}
}

// Check tells whether p is in the closed set.
func (p Phase) Check() error {
	if slices.Contains(Phases(), p) {
		return nil
	}
	return fault.New("fleet.Phase", fault.Invalid, "%q is not a phase: use install, observe, deploy, operate.read, operate.write or "+
		"operate.admin", fault.Clip(string(p)))
}

// Bounds in time of the documents that let the vendor act.
const (
	MaxConsent = 90 * 24 * time.Hour // how long a grant, an approval or a request may be in force
	MaxSkew    = 2 * time.Minute     // how far the clocks of the parties may differ before one's word contradicts another's
)

// Exposure is how wide a door may be, from narrow to wide.
type Exposure string

// The closed set of exposures.
const (
	Closed    Exposure = "closed"
	Private   Exposure = "private"
	Allowlist Exposure = "allowlist"
	Public    Exposure = "public"
)

// Exposures lists every exposure from the narrowest to the widest.
func Exposures() []Exposure { return []Exposure{Closed, Private, Allowlist, Public} }

// Check tells whether e is in the closed set.
func (e Exposure) Check() error {
	if slices.Contains(Exposures(), e) {
		return nil
	}
	return fault.New("fleet.Exposure", fault.Invalid, "%q is not a posture: use closed, private, allowlist or public", fault.Clip(string(e)))
}

// Narrower reports whether e lets in less than f.
func (e Exposure) Narrower(f Exposure) bool {
	return slices.Index(Exposures(), e) < slices.Index(Exposures(), f)
}

// Posture is the customer's choice of who may reach the application.
type Posture struct {
	Exposure Exposure       `json:"exposure"`
	Allow    []netip.Prefix `json:"allow,omitempty"` // for allowlist only, at most 256
}

// Check tells whether the posture is whole: an allowlist names at least one network, no other exposure names any.
func (p Posture) Check() error {
	const op = "fleet.Posture"
	if err := p.Exposure.Check(); err != nil {
		return err
	}
	if p.Exposure == Allowlist {
		if len(p.Allow) == 0 || len(p.Allow) > 256 {
			return fault.New(op, fault.Invalid, "allowlist: name 1 to 256 networks, for instance 192.0.2.0/24")
		}
	} else if len(p.Allow) != 0 {
		return fault.New(op, fault.Invalid, "%s: networks belong to the posture allowlist only", p.Exposure)
	}
	for _, n := range p.Allow {
		if !n.IsValid() || n != n.Masked() {
			return fault.New(op, fault.Invalid, "allowlist: %s is not a network in its canonical form", n)
		}
		if n.Addr().Is4In6() { // addresses are compared as IPv4, so that it would let nobody in
			plain := netip.PrefixFrom(n.Addr().Unmap(), max(0, n.Bits()-96))
			return fault.New(op, fault.Invalid, "allowlist: %s is IPv4 written as IPv6: write %s", n, plain)
		}
	}
	return nil
}

// Kinds of runtime that can carry an application.
const (
	RuntimeProcess    = "process"
	RuntimeDocker     = "docker"
	RuntimeKubernetes = "kubernetes"
)

// State of a deployment as both sides name it.
type State string

// The closed set of deployment states.
const (
	StateOffered   State = "offered"   // published, no approval yet
	StateWaiting   State = "waiting"   // approved, and something is missing; the reason says what
	StateDeploying State = "deploying" // being made so
	StateDeployed  State = "deployed"  // running and healthy
	StateDegraded  State = "degraded"  // running and not healthy
	StateFailed    State = "failed"    // given up; the last good release runs on where there was one
)
