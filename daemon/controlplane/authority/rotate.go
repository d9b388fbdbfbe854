// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"crypto/rand"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// GetKeys tells which key seals, and which ones each node holds.
func (s *Service) GetKeys(ctx context.Context, _ *connect.Request[controlv1.GetKeysRequest]) (*connect.Response[controlv1.GetKeysResponse], error) {
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	page := s.replica.View()
	out := &controlv1.GetKeysResponse{Key: page.KEK, Sealed: page.SealedCount()}
	for _, n := range s.replica.NodeNames() {
		out.Nodes = append(out.Nodes, &controlv1.KeyHolder{Node: n, Keys: page.Holds(n)})
	}
	out.Unsettled = page.UnsettledNodes(s.replica.NodeNames())
	return connect.NewResponse(out), nil
}

// RotateKey seals everything with the next key, once each node holds it. The nodes drop the old one by themselves.
func (s *Service) RotateKey(ctx context.Context, req *connect.Request[controlv1.RotateKeyRequest]) (*connect.Response[controlv1.RotateKeyResponse], error) {
	const op = "controlplane.RotateKey"
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	page := s.replica.View()
	to := req.Msg.GetTo()
	if page.KEK == "" {
		return nil, fault.New(op, fault.Unavailable, "the book does not name its key yet: try again in a few seconds")
	}
	if to != "" && to == page.KEK {
		return connect.NewResponse(&controlv1.RotateKeyResponse{Key: to, Sealed: page.SealedCount()}), nil // a repeated call, or one that came second
	}
	if to == "" {
		others := page.OtherKEKs(s.replica.NodeNames())
		if len(others) != 1 {
			return nil, fault.New(op, fault.Conflict, "the nodes hold %d keys beside the one in use: put the next one beside kek_file on each, with .next at the end of its name", len(others))
		}
		to = others[0]
	}
	if names := page.NodesWithoutKEK(s.replica.NodeNames(), to); len(names) > 0 {
		return nil, fault.New(op, fault.Conflict, "%d do not hold key %s, and could not open the keys: %s", len(names), fault.Clip(to), book.JoinNames(names))
	}
	c, err := s.reseal(page, to)
	if err != nil {
		return nil, err
	}
	if _, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(req.Msg.GetRequestId()), c); err != nil {
		return nil, err
	}
	return connect.NewResponse(&controlv1.RotateKeyResponse{Key: to, Sealed: page.SealedCount()}), nil
}

// reseal opens everything with the key in use and seals it with another.
func (s *Service) reseal(page book.State, to string) (book.RotateKEK, error) {
	c := book.RotateKEK{From: page.KEK, To: to, Nodes: s.replica.NodeNames(), CAs: map[fleet.Digest][]byte{}}
	old, err := s.store.keyring.Get(page.KEK)
	if err != nil {
		return c, err
	}
	next, err := s.store.keyring.Get(to)
	if err != nil {
		return c, err
	}
	for _, slot := range page.Slots {
		if slot.SealedKey == nil {
			continue
		}
		ca, err := identity.OpenAuthority(slot.CertDER, slot.SealedKey, old.Key)
		if err != nil {
			return c, err
		}
		if c.CAs[slot.ID()], err = ca.SealKey(next.Key, rand.Reader); err != nil {
			return c, err
		}
	}
	for _, one := range page.Secrets {
		b, err := identity.OpenSecret(one.Name, one.Sealed, old.Key)
		if err != nil {
			return c, err
		}
		sealed, err := identity.SealSecret(one.Name, b, next.Key, rand.Reader)
		if err != nil {
			return c, err
		}
		c.Secrets = append(c.Secrets, book.Secret{Name: one.Name, Sealed: sealed})
	}
	return c, nil
}
