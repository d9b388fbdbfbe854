// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"encoding/json"
	"math"
	"net"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/api/channel"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/raft"
)

// Membership is the cluster that this node is a member of.
type Membership interface {
	// IDs lists the members in this node's log.
	IDs() []string
	Members(ctx context.Context) (raft.Cluster, error)
	Change(ctx context.Context, c raft.Change) error
	Replace(ctx context.Context, old, by string) error
}

// cluster serves the operators of the control plane itself.
type cluster struct {
	*Server
	controlv1connect.UnimplementedClusterHandler
}

func (s *Server) membership() (Membership, error) {
	if s.Cluster == nil {
		return nil, fault.New("controlplane.Cluster", fault.Unavailable, "this node is not part of a cluster")
	}
	return s.Cluster, nil
}

// admitNode refuses the certificate of a node that is no member any more, and one that was replaced.
func (s *Server) admitNode(id string, serial fleet.Serial) error {
	const op = "controlplane.Admit"
	if _, err := s.replica.View().RefusesNode(op, id, serial, time.Time{}); err != nil {
		return err
	}
	if s.Cluster == nil {
		return nil
	}
	if ids := s.Cluster.IDs(); len(ids) > 0 && !slices.Contains(ids, id) {
		return fault.New(op, fault.Denied, "node %q is not a member of this control plane", fault.Clip(id))
	}
	return nil
}

// seen is who is a member, once the book of this node has all that was answered before the call.
func (c cluster) seen(ctx context.Context, m Membership) (raft.Cluster, error) {
	if err := c.replica.Read(ctx); err != nil {
		return raft.Cluster{}, err
	}
	return m.Members(ctx)
}

// ListMembers tells who is a member, as the leader sees it at this moment.
func (c cluster) ListMembers(ctx context.Context, _ *connect.Request[controlv1.ListMembersRequest]) (*connect.Response[controlv1.ListMembersResponse], error) {
	m, err := c.membership()
	if err != nil {
		return nil, err
	}
	all, err := c.seen(ctx, m)
	if err != nil {
		return nil, err
	}
	page := c.replica.View()
	out := &controlv1.ListMembersResponse{Leader: all.Leader, Term: all.Term, Autopilot: autopilotToWire(page.Pilot())}
	out.Members = c.members(all, page)
	for _, p := range page.Peers() {
		if p.Removed {
			out.Removed = append(out.Removed, p.Name)
		}
	}
	return connect.NewResponse(out), nil
}

func (s *Server) members(all raft.Cluster, page book.State) []*controlv1.ClusterMember {
	var out []*controlv1.ClusterMember
	where := s.replica.Roster()
	for _, m := range all.Members {
		w := &controlv1.ClusterMember{Name: m.ID, Role: string(m.Role), RaftAddress: m.Addr, Leads: m.ID == all.Leader,
			Heard: m.ID == all.Leader || m.Heard(), SilentMs: m.Silent, Lag: m.Lag, ClockAheadMs: m.ClockOffset}
		if i := slices.IndexFunc(where, func(x book.Member) bool { return x.Name == m.ID }); i >= 0 {
			w.ApiAddress = where[i].API
		}
		p, known := page.Peer(m.ID)
		w.VoterWanted, w.Build = p.Voter || m.Role == raft.Voter, p.Build
		says := book.Facts{Build: p.Build, Knows: p.Knows}
		if m.About != nil && json.Unmarshal(m.About, &says) == nil {
			w.Build = says.Build
			if says.Lacks != nil {
				n := uint32(min(max(*says.Lacks, 0), math.MaxUint32))
				w.ArtifactsMissing = &n
			}
		}
		if known && says.Knows != nil {
			for _, k := range s.replica.Book.Kinds() {
				if !slices.Contains(says.Knows, k) && !slices.Contains(book.FirstKinds(), k) {
					w.Lacks = append(w.Lacks, k)
				}
			}
		}
		out = append(out, w)
	}
	for _, p := range page.Peers() {
		if !p.Removed && !slices.ContainsFunc(out, func(m *controlv1.ClusterMember) bool { return m.GetName() == p.Name }) {
			out = append(out, &controlv1.ClusterMember{Name: p.Name, RaftAddress: p.Raft, ApiAddress: p.API, VoterWanted: p.Voter, Build: p.Build, SilentMs: -1})
		}
	}
	return out
}

func checkAddr(what, addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || host == "" || port == "" || port == "0" || len(addr) > book.MaxText {
		return fault.New("controlplane.AddMember", fault.Invalid, "%s: %q is not HOST:PORT where other nodes reach it", what, fault.Clip(addr))
	}
	return nil
}

// AddMember expects a node, adds it as a non-voter, and issues its first certificate.
func (c cluster) AddMember(ctx context.Context, req *connect.Request[controlv1.AddMemberRequest]) (*connect.Response[controlv1.AddMemberResponse], error) {
	const op = "controlplane.AddMember"
	r := req.Msg
	m, err := c.membership()
	if err != nil {
		return nil, err
	}
	for what, addr := range map[string]string{"its peers' address": r.GetRaftAddress(), "its address for operators and appliances": r.GetApiAddress()} {
		if err := checkAddr(what, addr); err != nil {
			return nil, err
		}
	}
	all, err := c.seen(ctx, m)
	if err != nil {
		return nil, err
	}
	if i := slices.IndexFunc(all.Members, func(x raft.MemberState) bool { return x.ID == r.GetName() }); i >= 0 {
		if x := all.Members[i]; x.Role == raft.Voter || x.Addr != r.GetRaftAddress() {
			return nil, fault.New(op, fault.Conflict, "node %q is a %s already, at %s", x.ID, x.Role, x.Addr)
		}
	}
	is, err := c.authority.Issue(r.GetCsr(), fleet.Node, r.GetName(), c.LeafLife)
	if err != nil {
		return nil, err
	}
	by, id := api.From(ctx).Principal, fleet.RequestID(r.GetRequestId())
	if _, err := book.Submit(ctx, c.Server.replica, by, id, c.replica.View().AddNode(book.AddNode{Name: r.GetName(), Raft: r.GetRaftAddress(), API: r.GetApiAddress(), Voter: !r.GetNonVoter()})); err != nil {
		return nil, err
	}
	if err := m.Change(ctx, raft.Change{Do: raft.Add, ID: r.GetName(), Addr: r.GetRaftAddress()}); err != nil {
		return nil, err
	}
	cas, _, err := c.authority.NewestBundle(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&controlv1.AddMemberResponse{Certificate: is.Leaf.Raw, Bundle: cas, Members: c.members(all, c.replica.View())}), nil
}

// change makes one change and puts on record who asked for it.
func (c cluster) change(ctx context.Context, do, name string) error {
	m, err := c.membership()
	if err != nil {
		return err
	}
	if err := m.Change(ctx, raft.Change{Do: do, ID: name}); err != nil {
		return err
	}
	_, err = book.Submit(ctx, c.Server.replica, api.From(ctx).Principal, "", book.NodeChanged{Do: do, Name: name})
	return err
}

// PromoteMember makes a non-voter that has caught up a voter.
func (c cluster) PromoteMember(ctx context.Context, req *connect.Request[controlv1.PromoteMemberRequest]) (*connect.Response[controlv1.PromoteMemberResponse], error) {
	if err := c.wanted(ctx, req.Msg.GetName()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&controlv1.PromoteMemberResponse{}), c.change(ctx, raft.Promote, req.Msg.GetName())
}

// heardWait is how long a change waits for the leader to hear of a node that has just started.
const heardWait = 5 * time.Second

// heard waits until the leader has heard of a node, for heardWait at most: what it is refused for then, the change itself says.
func (c cluster) heard(ctx context.Context, name string) error {
	m, err := c.membership()
	if err != nil {
		return err
	}
	limit, tick := time.NewTimer(heardWait), time.NewTicker(100*time.Millisecond)
	defer limit.Stop()
	defer tick.Stop()
	for {
		all, err := m.Members(ctx)
		if err != nil {
			return nil // the change asks the leader again, and says what is wrong
		}
		i := slices.IndexFunc(all.Members, func(x raft.MemberState) bool { return x.ID == name })
		if i < 0 || name == all.Leader || all.Members[i].Heard() {
			return nil
		}
		select {
		case <-tick.C:
		case <-limit.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// wanted refuses to make a voter of a node whose file says that it never is one, and waits until it can prove itself without its book:
// a majority that has lost power may need it.
func (c cluster) wanted(ctx context.Context, name string) error {
	if err := c.replica.Read(ctx); err != nil {
		return err
	}
	if p, ok := c.replica.View().Peer(name); ok && !p.Removed && !p.Voter {
		return fault.New("controlplane.Promote", fault.Conflict, "node %q never votes: its file says voter: false, change that and restart it first", name)
	}
	if !slices.Contains(c.replica.NodeNames(), name) {
		return nil // who makes the change says it
	}
	limit := time.NewTimer(readyWait)
	defer limit.Stop()
	for {
		changed := c.replica.Changed()
		err := c.replica.View().ReadyToVote(name)
		if err == nil {
			return c.heard(ctx, name)
		}
		select {
		case <-changed:
		case <-limit.C:
			return err
		case <-ctx.Done():
			return err
		}
	}
}

// readyWait is how long a promotion waits for the node's word.
const readyWait = 15 * time.Second

// DemoteMember makes a voter a non-voter.
func (c cluster) DemoteMember(ctx context.Context, req *connect.Request[controlv1.DemoteMemberRequest]) (*connect.Response[controlv1.DemoteMemberResponse], error) {
	return connect.NewResponse(&controlv1.DemoteMemberResponse{}), c.change(ctx, raft.Demote, req.Msg.GetName())
}

// RemoveMember removes a node for good: its peers and the doors refuse its certificate from then on.
func (c cluster) RemoveMember(ctx context.Context, req *connect.Request[controlv1.RemoveMemberRequest]) (*connect.Response[controlv1.RemoveMemberResponse], error) {
	m, err := c.membership()
	if err != nil {
		return nil, err
	}
	if err := c.replica.Read(ctx); err != nil {
		return nil, err
	}
	err = m.Change(ctx, raft.Change{Do: raft.Remove, ID: req.Msg.GetName()})
	if fault.Of(err) == fault.NotFound {
		_, known := c.replica.View().Peer(req.Msg.GetName())
		if known || slices.ContainsFunc(c.Server.Members, func(m book.Member) bool { return m.Name == req.Msg.GetName() }) {
			err = nil // it is gone from the cluster; that it is gone for good may not be on record yet
		}
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&controlv1.RemoveMemberResponse{}), c.bury(ctx, fleet.RequestID(req.Msg.GetRequestId()), req.Msg.GetName(), req.Msg.GetReason())
}

func (c cluster) bury(ctx context.Context, id fleet.RequestID, name, reason string) error {
	if len(reason) > channel.MaxSentence {
		return fault.New("controlplane.Remove", fault.Invalid, "the reason has more than %d bytes", channel.MaxSentence)
	}
	_, err := book.Submit(ctx, c.Server.replica, api.From(ctx).Principal, id, c.replica.View().RemoveNode(book.RemoveNode{Name: name, Reason: reason}))
	return err
}

// ReplaceMember makes a non-voter take the place of a voter.
func (c cluster) ReplaceMember(ctx context.Context, req *connect.Request[controlv1.ReplaceMemberRequest]) (*connect.Response[controlv1.ReplaceMemberResponse], error) {
	r := req.Msg
	m, err := c.membership()
	if err != nil {
		return nil, err
	}
	if err := c.wanted(ctx, r.GetBy()); err != nil {
		return nil, err
	}
	err = m.Replace(ctx, r.GetOld(), r.GetBy())
	if p, known := c.replica.View().Peer(r.GetOld()); fault.Of(err) == fault.NotFound && known && !slices.Contains(m.IDs(), p.Name) && slices.Contains(m.IDs(), r.GetBy()) {
		err = nil // a try before this one came as far as that
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&controlv1.ReplaceMemberResponse{}), c.bury(ctx, fleet.RequestID(r.GetRequestId()), r.GetOld(), r.GetReason())
}

// TransferLeadership makes another voter lead.
func (c cluster) TransferLeadership(ctx context.Context, req *connect.Request[controlv1.TransferLeadershipRequest]) (*connect.Response[controlv1.TransferLeadershipResponse], error) {
	if err := c.change(ctx, raft.Transfer, req.Msg.GetTo()); err != nil {
		return nil, err
	}
	m, err := c.membership()
	if err != nil {
		return nil, err
	}
	all, err := m.Members(ctx)
	return connect.NewResponse(&controlv1.TransferLeadershipResponse{Leader: all.Leader}), err
}

func autopilotToWire(p book.Autopilot) *controlv1.Autopilot {
	return &controlv1.Autopilot{RemoveDead: p.RemoveDead, DeadAfter: int64(p.DeadAfter / time.Second), Floor: uint32(p.Floor), PromoteStable: p.PromoteStable,
		Stabilization: int64(p.Stabilization / time.Second), WithoutReplacement: p.WithoutReplacement}
}

// SetAutopilot sets what the leader may do by itself.
func (c cluster) SetAutopilot(ctx context.Context, req *connect.Request[controlv1.SetAutopilotRequest]) (*connect.Response[controlv1.SetAutopilotResponse], error) {
	const op = "controlplane.SetAutopilot"
	w := req.Msg.GetAutopilot()
	const year = 366 * 24 * 3600
	if w == nil || w.GetDeadAfter() < 0 || w.GetDeadAfter() > year || w.GetStabilization() < 0 || w.GetStabilization() > year || w.GetFloor() > book.MaxPeers {
		return nil, fault.New(op, fault.Invalid, "times are of 0 seconds to a year, and the floor is at most %d voters", book.MaxPeers)
	}
	p := book.Autopilot{RemoveDead: w.GetRemoveDead(), DeadAfter: time.Duration(w.GetDeadAfter()) * time.Second, Floor: int(w.GetFloor()), PromoteStable: w.GetPromoteStable(),
		Stabilization: time.Duration(w.GetStabilization()) * time.Second, WithoutReplacement: w.GetWithoutReplacement()}
	_, err := book.Submit(ctx, c.Server.replica, api.From(ctx).Principal, fleet.RequestID(req.Msg.GetRequestId()), book.SetAutopilot{Autopilot: p})
	return connect.NewResponse(&controlv1.SetAutopilotResponse{}), err
}
