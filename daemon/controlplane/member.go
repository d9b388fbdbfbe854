// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/tls"
	"net"
	"path/filepath"
	"slices"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/raft"
)

func (n *node) raftConfig(ln net.Listener) raft.Config {
	nodesOnly := func(p fleet.Principal, _ fleet.Serial) error {
		td, role, _, ok := p.Split()
		if !ok || td != n.cfg.TrustDomain || role != fleet.Node {
			return fault.New("controlplane.raft", fault.Denied, "%s is not a node of this control plane", fault.Clip(string(p)))
		}
		return nil
	}
	cfg := raft.Config{Dir: filepath.Join(n.cfg.Dir, "raft"), Machine: book.Gate{Book: n.book, Cluster: n.voting}, Join: n.cfg.Join, Begin: func() error { return n.mayBegin(time.Now()) },
		Listener: ln, Logger: n.log, Registerer: n.reg.Registerer(), Peer: n.peer, About: n.server.About,
		ServerTLS: identity.Server(n.files.ToPeers(), nodesOnly, true, raft.ProtoRaft, raft.ProtoForward),
		ClientTLS: n.toPeer}
	for _, m := range n.cfg.Cluster {
		cfg.First = append(cfg.First, raft.Member{ID: m.Name, Addr: m.Raft})
		if m.Name == n.cfg.Name {
			cfg.Self = raft.Member{ID: m.Name, Addr: m.Raft}
		}
	}
	return cfg
}

// toPeer is the TLS to another node: it must be that node that answers, with a certificate that was not replaced.
func (n *node) toPeer(id string) *tls.Config {
	conf := identity.Client(n.files.ToPeers(), identity.WantNode(n.cfg.TrustDomain, id))
	verify := conf.VerifyConnection
	conf.VerifyConnection = func(s tls.ConnectionState) error {
		if err := verify(s); err != nil {
			return err
		}
		leaf := s.PeerCertificates[0] // verify has read it
		_, err := n.book.View().RefusesNode("controlplane.raft", id, identity.SerialOf(leaf), leaf.NotBefore)
		return err
	}
	return conf
}

// voting is the cluster as the gate asks it; nil while it is not there.
func (n *node) voting() book.Voting {
	if !n.up.Load() {
		return nil
	}
	return n.raft
}

// peer names who calls at the listener of the nodes, and refuses a node that was removed and a certificate that was replaced. One
// that is not known here yet passes: it may have been added since.
func (n *node) peer(s tls.ConnectionState) (string, error) {
	p, _, err := identity.PrincipalOf(&s)
	if err != nil {
		return "", err
	}
	_, _, id, _ := p.Split()
	page := n.book.View()
	err = page.RefusesConnection(s)
	if x, _ := page.Peer(id); x.Removed {
		err = fault.Because(raft.ErrRemoved, "controlplane.raft", fault.Denied, "%s", fault.Text(err))
	}
	return id, err
}

// IDs implements [Membership].
func (n *node) IDs() []string {
	if !n.up.Load() {
		return nil
	}
	return n.raft.IDs()
}

// Members implements [Membership].
func (n *node) Members(ctx context.Context) (raft.Cluster, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	return n.raft.Members(ctx)
}

// Change implements [Membership].
func (n *node) Change(ctx context.Context, c raft.Change) error {
	ctx, cancel := context.WithTimeout(ctx, 25*time.Second)
	defer cancel()
	return n.raft.Change(ctx, c)
}

// Replace implements [Membership].
func (n *node) Replace(ctx context.Context, old, by string) error {
	ctx, cancel := context.WithTimeout(ctx, 45*time.Second)
	defer cancel()
	return n.raft.Replace(ctx, old, by)
}

// snapshot has the disk hold a snapshot of the log up to an index.
func (n *node) snapshot(_ context.Context, index uint64) error { return n.raft.SnapshotAt(index) }

func (n *node) waitsFor() string {
	if n.cfg.Join && len(n.IDs()) == 0 {
		return "waiting to be added: demarc control-plane add, if that was not done"
	}
	return "waiting for a majority of the nodes"
}

// introduce puts on record where this node serves and which changes it knows, where that is not on record.
func (n *node) introduce(ctx context.Context, ready func()) error {
	ready()
	self := n.cfg.Self()
	is := book.NodeIs{Name: n.cfg.Name, Raft: self.Raft, API: n.cfg.Advertise, Voter: n.cfg.Voter, Build: n.build, Knows: n.book.Kinds()}
	for wait := time.Second; ; {
		p, _ := n.book.View().Peer(n.cfg.Name)
		done := p.Removed || p.Raft == is.Raft && p.API == is.API && p.Voter == is.Voter && p.Build == is.Build && slices.Equal(p.Knows, is.Knows)
		if done {
			<-ctx.Done()
			return nil
		}
		if _, err := book.Submit(ctx, n.server.replica, n.server.replica.Self(), "", is); err != nil {
			if ctx.Err() == nil {
				n.log.Info("where this node serves is not on record yet", "err", fault.Text(err))
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(wait):
			}
			wait = min(2*wait, time.Minute)
		}
	}
}
