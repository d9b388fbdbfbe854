// SPDX-License-Identifier: Apache-2.0

package book

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"slices"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// Consensus puts changes into one sequence: raft in a cluster, anything that does so in a test.
type Consensus interface {
	ledger.Proposer
	// Read returns once the book's view is at least as new as everything that was answered before the call.
	Read(ctx context.Context) error
	// Leader names the node that leads now, "" if there is none.
	Leader() string
}

// Replica is this node's copy of the book, and the way to change the book. Its methods may be called concurrently.
type Replica struct {
	Node      string // name of this node
	Book      *ledger.Book[State]
	Consensus Consensus
	Clock     func() time.Time // stamps changes

	First []Member        // the nodes of the configuration file
	IDs   func() []string // names of the members in this node's log; nil or empty: First are all there are
}

// Member is one node of the control plane, and its addresses.
type Member struct{ Name, Raft, API string }

// Roster lists the members. Their addresses are those that each put into the book, else those of the configuration file.
func (r *Replica) Roster() []Member {
	if r.IDs == nil {
		return r.First
	}
	ids := r.IDs()
	if len(ids) == 0 {
		return r.First
	}
	st := r.View()
	out := make([]Member, 0, len(ids))
	for _, id := range ids {
		m := Member{Name: id}
		if i := slices.IndexFunc(r.First, func(m Member) bool { return m.Name == id }); i >= 0 {
			m = r.First[i]
		}
		if p, ok := st.Peer(id); ok && p.API != "" {
			m.Raft, m.API = p.Raft, p.API
		}
		out = append(out, m)
	}
	return out
}

// NodeNames lists the names of the members in order: a request has the same body at whichever node it is repeated.
func (r *Replica) NodeNames() []string {
	var out []string
	for _, m := range r.Roster() {
		out = append(out, m.Name)
	}
	slices.Sort(out)
	return out
}

// View is the newest state that this node has. It never changes.
func (r *Replica) View() State { return r.Book.View() }

// Changed is closed at the next change of the state.
func (r *Replica) Changed() <-chan struct{} { return r.Book.Changed() }

// Log is the audit log of this node's copy.
func (r *Replica) Log() audit.Log { return r.Book.Log() }

// Now is the time that this node stamps changes with.
func (r *Replica) Now() time.Time { return r.Clock() }

// Read returns once the view is at least as new as everything that was answered before the call. It contacts the leader; without one it
// fails with fault.Unavailable.
func (r *Replica) Read(ctx context.Context) error { return r.Consensus.Read(ctx) }

// Leader names the node that leads now, "" if there is none.
func (r *Replica) Leader() string { return r.Consensus.Leader() }

// Self is the principal of this node.
func (r *Replica) Self() fleet.Principal {
	return fleet.PrincipalOf(r.View().TrustDomain, fleet.Node, r.Node)
}

// Submit stamps a change and puts it into the book. Without a request id it draws one: then the request can't be repeated.
func Submit[R any](ctx context.Context, r *Replica, by fleet.Principal, id fleet.RequestID, c ledger.Change[State, R]) (R, error) {
	if id == "" {
		id = DrawRequestID()
	}
	if len(id) > 64 {
		var zero R
		return zero, fault.New("controlplane.submit", fault.Invalid, "a request id has at most 64 bytes")
	}
	return ledger.Submit(ctx, r.Consensus, ledger.Meta{At: r.Now().UTC(), By: by, Request: id}, c)
}

// DrawRequestID returns a random request id.
func DrawRequestID() fleet.RequestID {
	var b [16]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails
	return fleet.RequestID(hex.EncodeToString(b[:]))
}
