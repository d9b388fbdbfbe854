// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/ed25519"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/seal"
)

// RecoveryKey is the key that proves a recovery at this moment.
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

// RecoverAdmin implements the way back of [book.RecoverAdmin]. Each refusal is on record with the reason that the caller is told.
func (b operatorBootstrap) RecoverAdmin(ctx context.Context, req *connect.Request[controlv1.RecoverAdminRequest]) (*connect.Response[controlv1.RecoverAdminResponse], error) {
	return Answer(ctx, b.refusals, req, "operator.recover", ByName(b.recover))
}

func (b operatorBootstrap) recover(ctx context.Context, m *controlv1.RecoverAdminRequest) (*controlv1.RecoverAdminResponse, error) {
	const op = "controlplane.RecoverAdmin"
	if err := b.replica.Read(ctx); err != nil {
		return nil, fault.At(op, "", err)
	}
	_, nonces, err := b.authority.Secrets()
	if err != nil {
		return nil, err
	}
	till, err := identity.CheckNonce(nonces, m.GetNonce(), b.replica.Now())
	if err != nil {
		return nil, err
	}
	page := b.replica.View()
	proof, err := b.authority.RecoveryKey()
	if err != nil {
		return nil, err
	}
	what := identity.Recovery{TrustDomain: page.TrustDomain, Name: m.GetName(), Node: m.GetNode(), Nonce: m.GetNonce(), CSR: m.GetCsr()}
	if err := what.Check(proof.Public().(ed25519.PublicKey), m.GetProof()); err != nil {
		return nil, err
	}
	if err := page.TakesAdmin(op, m.GetName()); err != nil { // nothing is signed for a name that is refused
		return nil, err
	}
	key, _, err := KeyOf(op, m.GetCsr())
	if err != nil {
		return nil, err
	}
	cert, _, err := Certify(ctx, b.authority, m.GetCsr(), fleet.Operator, m.GetName(), b.LeafLife, func(is Certificate) ledger.Change[book.State, book.Nothing] {
		return book.RecoverAdmin{Name: m.GetName(), Node: m.GetNode(), Nonce: m.GetNonce(), NonceTill: till, Key: key, Serial: is.Serial, Till: is.Till, Issuer: is.Issuer,
			Bundle: m.GetBundleHeld()}
	})
	if err != nil {
		return nil, err
	}
	b.log.Warn("an admin was made by recovery, with the key-encryption key and the files of a node", "operator", m.GetName(), "node", m.GetNode())
	return &controlv1.RecoverAdminResponse{Certificate: cert}, nil
}

// Recoverer is what the files of a node give to whoever may recover an admin.
type Recoverer struct {
	TrustDomain string
	Node        string
	Nodes       []string           // host:port of the control plane, this node's first
	Key         ed25519.PrivateKey // see [identity.RecoveryKey]
	LogKey      []byte             // PEM; by it the control plane is recognized
}

// OpenRecoverer opens what a node keeps beside its log with the key-encryption key. The node may be running.
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
	k, err := openCredentials(b, cfg.TrustDomain, keks)
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
