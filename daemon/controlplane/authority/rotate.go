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

// GetKeys returns which key seals, and which keys each node has.
func (s *Service) GetKeys(ctx context.Context,
	_ *connect.Request[controlv1.GetKeysRequest]) (*connect.Response[controlv1.GetKeysResponse], error) {
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	st := s.replica.View()
	out := &controlv1.GetKeysResponse{Key: st.KEK, Sealed: st.SealedCount()}
	for _, n := range s.replica.NodeNames() {
		out.Nodes = append(out.Nodes, &controlv1.KeyHolder{Node: n, Keys: st.Holds(n)})
	}
	out.Unsettled = st.UnsettledNodes(s.replica.NodeNames())
	return connect.NewResponse(out), nil
}

// RotateKey seals everything with the next key, once each node has it. The nodes drop the old one by themselves.
func (s *Service) RotateKey(ctx context.Context,
	req *connect.Request[controlv1.RotateKeyRequest]) (*connect.Response[controlv1.RotateKeyResponse], error) {
	const op = "controlplane.RotateKey"
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	st := s.replica.View()
	to := req.Msg.GetTo()
	if st.KEK == "" {
		return nil, fault.New(op, fault.Unavailable, "the book does not name its key yet: try again in a few seconds")
	}
	if to != "" && to == st.KEK {
		// a repeated call, or the second of two
		return connect.NewResponse(&controlv1.RotateKeyResponse{Key: to, Sealed: st.SealedCount()}), nil
	}
	if to == "" {
		others := st.OtherKEKs(s.replica.NodeNames())
		if len(others) != 1 {
			return nil, fault.New(op, fault.Conflict, "the nodes hold %d keys beside the one in use: put the next one beside kek_file on "+
				"each, with .next at the end of its name", len(others))
		}
		to = others[0]
	}
	if names := st.NodesWithoutKEK(s.replica.NodeNames(), to); len(names) > 0 {
		return nil, fault.New(op, fault.Conflict,
			"%d do not hold key %s, and could not open the keys: %s", len(names), fault.Clip(to), book.JoinNames(names))
	}
	c, err := s.reseal(st, to)
	if err != nil {
		return nil, err
	}
	if _, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(req.Msg.GetRequestId()), c); err != nil {
		return nil, err
	}
	return connect.NewResponse(&controlv1.RotateKeyResponse{Key: to, Sealed: st.SealedCount()}), nil
}

// reseal opens everything with the key in use and seals it with another.
func (s *Service) reseal(st book.State, to string) (book.RotateKEK, error) {
	c := book.RotateKEK{From: st.KEK, To: to, Nodes: s.replica.NodeNames(), CAs: map[fleet.Digest][]byte{}}
	old, err := s.store.keyring.Get(st.KEK)
	if err != nil {
		return c, err
	}
	next, err := s.store.keyring.Get(to)
	if err != nil {
		return c, err
	}
	for _, slot := range st.Slots {
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
	for _, one := range st.Secrets {
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
