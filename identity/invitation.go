// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// Bounds of an invitation.
const (
	InviteSecret  = 32                  // bytes that the inviter draws
	MaxInvitation = 8 << 10             // bytes of the line
	MaxInviteLife = 14 * 24 * time.Hour // an invitation that lies about for longer is asked for again
	maxNodes      = 16
)

const invitationIntro = "demarc-invitation-1."

// Invitation is what one person hands to another so that they become an operator. Whoever has it first is in: it goes over
// a channel that the inviter trusts. The control plane never has the secret: it has the digest of the public key that the
// secret gives, and the invited proves to hold the private one, for a key of their own that never leaves their machine.
type Invitation struct {
	TrustDomain string     `json:"trust_domain"`
	Name        string     `json:"name"`
	Role        fleet.Rank `json:"role"`
	Nodes       []string   `json:"nodes"`   // host:port of the control plane
	LogKey      string     `json:"log_key"` // PEM; the CAs that it signed are trusted, and no others
	Secret      []byte     `json:"secret"`
	Until       time.Time  `json:"until"`
}

// Check tells whether an invitation is whole.
func (i Invitation) Check() error {
	const op = "identity.Invitation"
	if err := CheckTrustDomain(i.TrustDomain); err != nil {
		return err
	}
	if err := fleet.CheckName("operator", i.Name); err != nil {
		return err
	}
	if err := i.Role.Check(); err != nil {
		return err
	}
	if _, err := seal.ParseKey([]byte(i.LogKey)); err != nil {
		return err
	}
	if n := len(i.Nodes); n == 0 || n > maxNodes {
		return fault.New(op, fault.Invalid, "the invitation names %d nodes: 1 to %d are needed", n, maxNodes)
	}
	for _, n := range i.Nodes {
		if host, port, err := net.SplitHostPort(n); err != nil || host == "" || port == "" {
			return fault.New(op, fault.Invalid, "the invitation names the node %q, which is not HOST:PORT", fault.Clip(n))
		}
	}
	if len(i.Secret) != InviteSecret || i.Until.IsZero() {
		return fault.New(op, fault.Invalid, "the invitation is not whole: ask for another")
	}
	return nil
}

// Encode spells the invitation as one line.
func (i Invitation) Encode() (string, error) {
	if err := i.Check(); err != nil {
		return "", err
	}
	b, err := json.Marshal(i)
	if err != nil {
		return "", fault.At("identity.Invitation", fault.Internal, err)
	}
	return invitationIntro + base64.RawURLEncoding.EncodeToString(b), nil
}

// ParseInvitation reads the line of [Invitation.Encode]; white space around it and line ends within are not looked at.
func ParseInvitation(line []byte) (Invitation, error) {
	const op = "identity.ParseInvitation"
	if len(line) > MaxInvitation {
		return Invitation{}, fault.New(op, fault.Invalid, "the invitation has %d bytes, the limit is %d", len(line), MaxInvitation)
	}
	s, ok := strings.CutPrefix(strings.Join(strings.Fields(string(line)), ""), invitationIntro)
	if !ok {
		return Invitation{}, fault.New(op, fault.Invalid, "this is no invitation: it begins with %s", invitationIntro)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil {
		return Invitation{}, fault.New(op, fault.Invalid, "the invitation is cut short or altered: ask for it again")
	}
	var i Invitation
	if err := seal.StrictJSON(b, &i); err != nil {
		return Invitation{}, fault.Because(err, op, fault.Invalid, "the invitation is cut short or altered: ask for it again")
	}
	return i, i.Check()
}

// InviteKey is the key pair that an invitation's secret gives.
func InviteKey(secret []byte) (ed25519.PrivateKey, error) {
	const op = "identity.InviteKey"
	if len(secret) != InviteSecret {
		return nil, fault.New(op, fault.Invalid, "the secret of an invitation has %d bytes, this one has %d", InviteSecret, len(secret))
	}
	seed, err := hkdf.Key(sha256.New, secret, nil, "demarc-invitation-key/1", ed25519.SeedSize)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// SignInvite proves to hold an invitation, for one key of one name.
func SignInvite(key ed25519.PrivateKey, trustDomain, name string, csrDER []byte) []byte {
	return ed25519.Sign(key, invited(trustDomain, name, csrDER))
}

// CheckInvite checks the proof of [SignInvite]. That the verifier is that of an invitation is for the book to say.
func CheckInvite(verifier []byte, trustDomain, name string, csrDER, proof []byte) error {
	const op = "identity.CheckInvite"
	if len(verifier) != ed25519.PublicKeySize || len(proof) != ed25519.SignatureSize {
		return fault.New(op, fault.Invalid, "the proof is not that of an invitation")
	}
	if !ed25519.Verify(verifier, invited(trustDomain, name, csrDER), proof) {
		return fault.New(op, fault.Denied, "the proof is not of this invitation, this name and this key")
	}
	return nil
}

// invited is what is signed.
func invited(trustDomain, name string, csrDER []byte) []byte {
	sum := sha256.Sum256(csrDER)
	return spell("demarc-operator-accept/1\n", []byte(trustDomain), []byte(name), sum[:])
}
