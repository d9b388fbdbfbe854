// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"io/fs"

	"filippo.io/age"

	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

// Names of the files of an operator's keys.
const (
	SigningKey    = "signing.key"
	ReleasePublic = "signing.pub"
	RequestKey    = "request.key"
	RequestPublic = "request.pub"
	RecipientKey  = "recipient.key"
)

// Keys are an operator's keys beside that of the certificate. Releases and requests have a key each: whoever may sign the one may not
// therefore sign the other.
type Keys struct {
	release, request keyPair
	recipient        []byte
}

type keyPair struct{ private, public []byte }

// KeyFile is one file of an operator's keys.
type KeyFile struct {
	Name  string
	Bytes []byte
	Mode  fs.FileMode
}

// Files returns the files of the keys.
func (k Keys) Files() []KeyFile {
	return []KeyFile{
		{SigningKey, k.release.private, 0o600}, {ReleasePublic, k.release.public, 0o644},
		{RequestKey, k.request.private, 0o600}, {RequestPublic, k.request.public, 0o644},
		{RecipientKey, k.recipient, 0o600},
	}
}

// NewKeys draws the keys of an operator.
func NewKeys() (k Keys, err error) {
	if k.release, err = newKeyPair(); err != nil {
		return k, err
	}
	if k.request, err = newKeyPair(); err != nil {
		return k, err
	}
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return k, fault.At("demarc.keys", fault.Internal, err)
	}
	k.recipient = []byte(id.String() + "\n")
	return k, nil
}

func newKeyPair() (keyPair, error) {
	const op = "demarc.keys"
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return keyPair{}, fault.At(op, fault.Internal, err)
	}
	k, err := seal.KeyOf(pub)
	if err != nil {
		return keyPair{}, err
	}
	private, err := client.KeyPEM(priv)
	return keyPair{private, k.PEM()}, err
}

// ForCustomers is the part of an appliance's file that lets a vendor's keys in: the paths of the public keys for releases and for requests,
// "" for none.
func ForCustomers(release, operator, request string) string {
	out := "  control_plane:\n"
	if release != "" {
		out += fmt.Sprintf("    release_keys: [%q]\n", release)
	}
	if request != "" {
		out += fmt.Sprintf("    operators:\n      - {name: %s, keys: [%q]}\n", operator, request)
	}
	return out
}
