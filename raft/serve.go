// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"encoding/binary"
	"encoding/json"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
)

// What members ask each other by the protocol of package forward. A request that came by this way is never forwarded again.
const (
	kindPropose   forward.Kind = 'p' // a proposal; the machine's answer
	kindReadIndex forward.Kind = 'r' // nothing; an index, 8 bytes
	kindStatus    forward.Kind = 's' // JSON: the address of the caller; the status of the answerer
	kindMembers   forward.Kind = 'c' // nothing; the members, as JSON
	kindChange    forward.Kind = 'm' // a change of the members, as JSON; nothing
)

const maxAddr = 512 // bytes of an address

// handler answers the requests of members.
type handler struct {
	proposals *proposer
	reads     *reader
	members   *membership
	status    *monitor
}

func (h *handler) handle(ctx context.Context, peer string, kind forward.Kind, payload []byte) ([]byte, error) {
	const op = "raft.serve"
	switch kind {
	case kindPropose:
		answer, err := h.proposals.propose(ctx, payload)
		if len(answer) > MaxProposal {
			err = fault.New(op, fault.Unsure, "it has happened, and the machine's answer is too large to be sent")
		}
		return answer, err
	case kindReadIndex:
		index, err := h.reads.index(ctx)
		return binary.BigEndian.AppendUint64(nil, index), err
	case kindStatus:
		return h.exchangeStatus(peer, payload)
	case kindMembers:
		c, err := h.status.cluster()
		if err != nil {
			return nil, err
		}
		return json.Marshal(c)
	case kindChange:
		var c Change
		if err := json.Unmarshal(payload, &c); err != nil || len(c.Addr) > maxAddr {
			return nil, fault.New(op, fault.Invalid, "a change of the members that this build does not understand")
		}
		return nil, h.members.change(ctx, c)
	case forward.Removed:
		if len(payload) != 8 {
			return nil, fault.New(op, fault.Invalid, "a removal without its index")
		}
		h.members.removedBy(peer, binary.BigEndian.Uint64(payload))
		return nil, nil
	}
	return nil, fault.New(op, fault.Invalid, "a request of kind %q", kind)
}

// exchangeStatus notes the address that a member advertises, and answers with this node's status.
func (h *handler) exchangeStatus(peer string, payload []byte) ([]byte, error) {
	var got peerStatus
	if err := json.Unmarshal(payload, &got); err != nil || len(got.Addr) > maxAddr {
		return nil, fault.New("raft.serve", fault.Invalid, "a status that this build does not understand")
	}
	if peer != "" && got.Addr != "" {
		h.members.addrs.advertised(peer, got.Addr)
	}
	return json.Marshal(h.status.own())
}
