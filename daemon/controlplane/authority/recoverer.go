// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"crypto/ed25519"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// Recoverer is what the recovery of an admin needs from the files of a node.
type Recoverer struct {
	TrustDomain string
	Node        string
	Nodes       []string           // host:port of the control plane, this node's first
	Key         ed25519.PrivateKey // see [identity.RecoveryKey]
	LogKey      []byte             // PEM; identifies the control plane
}

// OpenRecoverer opens the saved credentials of a node with the key-encryption key. The node may be running.
func OpenRecoverer(cfg *configs.Control) (Recoverer, error) {
	const op = "controlplane.OpenRecoverer"
	var r Recoverer
	keks, err := KEKFiles{cfg.KEKFile}.Read()
	if err != nil {
		return r, err
	}
	path := filepath.Join(cfg.Dir, CredentialsFile)
	b, err := os.ReadFile(path)
	if err != nil {
		kind := fault.Unavailable
		if errors.Is(err, fs.ErrNotExist) {
			kind = fault.NotFound
		}
		return r, fault.Because(err, op, kind, "the sealed keys of the node can't be read: %s (it is written once the node has served)", path)
	}
	k, err := OpenCredentials(b, cfg.TrustDomain, keks)
	switch {
	case fault.Of(err) == fault.Denied:
		return r, fault.Because(err, op, fault.Denied, "kek_file does not open the keys of this node: %s", fault.Text(err))
	case err != nil:
		return r, fault.Because(err, op, "", "%s: %s: take the files of another node", path, fault.Text(err))
	}
	held := Keyring{keys: keks}
	one, err := held.Get(k.KEK)
	if err != nil || k.KEK == "" {
		return r, fault.Because(err, op, fault.Denied, "kek_file does not open the keys of the book: key %s seals them", orNone(k.KEK))
	}
	if r.Key, err = identity.RecoveryKey(k.keys.Log, one.Key); err != nil {
		return r, err
	}
	log, err := seal.KeyOf(k.logKey().Public())
	if err != nil {
		return r, err
	}
	r.TrustDomain, r.Node, r.LogKey, r.Nodes = cfg.TrustDomain, cfg.Name, log.PEM(), []string{cfg.Advertise}
	for _, m := range cfg.Cluster {
		if m.Name != cfg.Name {
			r.Nodes = append(r.Nodes, m.API)
		}
	}
	return r, nil
}

func orNone(id string) string {
	if id == "" {
		return "none that is named"
	}
	return id
}

// RecoveryKey is the key that authenticates a recovery now.
func (s *Store) RecoveryKey() (ed25519.PrivateKey, error) {
	log, _, err := s.Secrets()
	if err != nil {
		return nil, err
	}
	k, err := s.keyring.Get(s.replica.View().KEK)
	if err != nil {
		return nil, err
	}
	return identity.RecoveryKey(log.Seed(), k.Key)
}
