// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/x509"
	"slices"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/raft"
)

// CertifyMember issues another certificate to a member.
func (c cluster) CertifyMember(ctx context.Context, req *connect.Request[controlv1.CertifyMemberRequest]) (*connect.Response[controlv1.CertifyMemberResponse], error) {
	const op = "controlplane.CertifyMember"
	m, err := c.membership()
	if err != nil {
		return nil, err
	}
	all, err := c.seen(ctx, m)
	if err != nil {
		return nil, err
	}
	name := req.Msg.GetName()
	if !slices.ContainsFunc(all.Members, func(x raft.MemberState) bool { return x.ID == name }) {
		return nil, fault.New(op, fault.NotFound, "node %q is not a member: a new one is added with demarc control-plane add", fault.Clip(name))
	}
	is, err := c.authority.Issue(req.Msg.GetCsr(), fleet.Node, name, c.LeafLife)
	if err != nil {
		return nil, err
	}
	// The certificate is drawn anew in each try, and the last one that was answered counts: no request id makes two of them one.
	_, err = book.Submit(ctx, c.Server.replica, api.From(ctx).Principal, "", book.CertifyNode{Name: name, Serial: is.Serial, From: is.From, Till: is.Till, Issuer: is.Issuer, Reason: req.Msg.GetReason()})
	if err != nil {
		return nil, err
	}
	cas, _, err := c.authority.NewestBundle(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&controlv1.CertifyMemberResponse{Certificate: is.Leaf.Raw, Bundle: cas, Members: c.members(all, c.replica.View())}), nil
}

// recheck ends open connections of nodes whose certificates were made worthless, or whose CA was retired, as soon as this node's book
// says so.
func (n *node) recheck(ctx context.Context, ready func()) error {
	ready()
	var seen book.Version
	for {
		changed := n.book.Changed()
		page := n.book.View()
		if now := page.PassesVersion(); now != seen {
			n.raft.EvictRevoked(func(id string, leaf *x509.Certificate) error {
				if cut, err := page.RefusesNode("controlplane.raft", id, identity.SerialOf(leaf), leaf.NotBefore); cut {
					return err
				}
				return page.RefusesRetired("controlplane.raft", leaf)
			})
			seen = now
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}
