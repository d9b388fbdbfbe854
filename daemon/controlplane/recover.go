// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/ed25519"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/refusal"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// RecoverAdmin implements the way back of [book.RecoverAdmin]. Each refusal is on record with the reason that the caller is told.
func (b operatorBootstrap) RecoverAdmin(ctx context.Context, req *connect.Request[controlv1.RecoverAdminRequest]) (*connect.Response[controlv1.RecoverAdminResponse], error) {
	return refusal.Answer(ctx, b.refusals, req, "operator.recover", refusal.ByName(b.recover))
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
	key, _, err := authority.KeyOf(op, m.GetCsr())
	if err != nil {
		return nil, err
	}
	cert, _, err := authority.Certify(ctx, b.authority, m.GetCsr(), fleet.Operator, m.GetName(), b.LeafLife, func(is authority.Certificate) ledger.Change[book.State, book.Nothing] {
		return book.RecoverAdmin{Name: m.GetName(), Node: m.GetNode(), Nonce: m.GetNonce(), NonceTill: till, Key: key, Serial: is.Serial, Till: is.Till, Issuer: is.Issuer,
			Bundle: m.GetBundleHeld()}
	})
	if err != nil {
		return nil, err
	}
	b.log.Warn("an admin was made by recovery, with the key-encryption key and the files of a node", "operator", m.GetName(), "node", m.GetNode())
	return &controlv1.RecoverAdminResponse{Certificate: cert}, nil
}
