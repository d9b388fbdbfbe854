// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"encoding/binary"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
)

// What members ask each other by the protocol of package forward. A request that came by this way is never forwarded again.
const (
	kindPropose   forward.Kind = 'p' // a proposal; the machine's answer
	kindReadIndex forward.Kind = 'r' // nothing; an index, 8 bytes
	kindStatus    forward.Kind = 's' // JSON: where the caller is; how the answerer is
	kindMembers   forward.Kind = 'c' // nothing; the members, as JSON
	kindChange    forward.Kind = 'm' // a change of the members, as JSON; nothing
)

// serve answers a request of a member.
func (n *Node) serve(ctx context.Context, peer string, kind forward.Kind, payload []byte) ([]byte, error) {
	const op = "raft.serve"
	switch kind {
	case kindPropose:
		if len(payload) > MaxProposal {
			return nil, fault.New(op, fault.Invalid, "the proposal is too large")
		}
		answer, err := n.propose(ctx, payload)
		if len(answer) > MaxProposal {
			err = fault.New(op, fault.Unsure, "it has happened, and the machine's answer is too large to be sent")
		}
		return answer, err
	case kindReadIndex:
		index, err := n.readIndex(ctx)
		return binary.BigEndian.AppendUint64(nil, index), err
	case kindStatus, kindMembers, kindChange, forward.Removed:
		return n.serveMembers(ctx, peer, kind, payload)
	}
	return nil, fault.New(op, fault.Invalid, "a request of kind %q", kind)
}

func (n *Node) dialForward(ctx context.Context, id string) (forward.Conn, error) {
	c, err := n.net.reach(ctx, id, ProtoForward)
	if err != nil {
		return nil, err
	}
	return c, nil
}
