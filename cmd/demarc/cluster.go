// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// askCluster is ask for what concerns the nodes themselves.
func askCluster[Req, Res any](ctx context.Context, v *vendor, call func(controlv1connect.ClusterClient, context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	return ask(ctx, v, func(ctx context.Context, _ controlv1connect.ControlClient) (*Res, error) {
		return wire(call(v.clusters[v.at], ctx, connect.NewRequest(req)))
	})
}

// clusterCommands are those of control-plane that concern its nodes.
func (a *app) clusterCommands() []*cobra.Command {
	return []*cobra.Command{a.members(), a.addNode(), a.certifyNode(), a.promote(), a.demote(), a.removeNode(), a.replaceNode(), a.transfer(), a.autopilot(), a.snapshot(), a.recover(), a.recoverAdmin()}
}

func (a *app) members() *cobra.Command {
	return a.online(&cobra.Command{Use: "members", Short: "List the nodes: who votes, who leads, who is behind, who is silent", Args: exactly(0, "no arguments"),
		Long:    "members asks the leader for the configuration in its log and what it knows of each node at this moment; LACKS is how\nmany artifacts of releases a node does not have yet, CLOCK by how much a node's clock is ahead of what a majority of the voters' clocks says. A node whose role is \"-\" is expected, and is not in the cluster. Names of removed nodes are never used again.",
		Example: "  demarc control-plane members\n  demarc control-plane members --output json"},
		func(ctx context.Context, v *vendor, _ []string) error {
			m, err := askCluster(ctx, v, controlv1connect.ClusterClient.ListMembers, &controlv1.ListMembersRequest{})
			if err != nil {
				return err
			}
			return a.emit(m, func(w io.Writer) {
				fmt.Fprintln(w, "NODE\tROLE\tLEADS\tHEARD\tSILENT\tBEHIND\tLACKS\tCLOCK\tRAFT\tAPI\tBUILD")
				for _, n := range m.GetMembers() {
					silent := "never heard"
					if n.GetSilentMs() >= 0 {
						silent = (time.Duration(n.GetSilentMs()) * time.Millisecond).Round(time.Second / 10).String()
					}
					fmt.Fprintf(w, "%s\t%s\t%v\t%v\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n", n.GetName(), orDash(n.GetRole()), n.GetLeads(), n.GetHeard(), silent, n.GetLag(), lacksOf(n), clockOf(n), n.GetRaftAddress(), n.GetApiAddress(), orDash(n.GetBuild()))
				}
				for _, n := range m.GetMembers() {
					if len(n.GetLacks()) > 0 {
						fmt.Fprintf(w, "node %s does not know: %s\n", n.GetName(), strings.Join(n.GetLacks(), ", "))
					}
				}
				for _, n := range m.GetRemoved() {
					fmt.Fprintf(w, "removed\t%s\n", n)
				}
			})
		})
}

// lacksOf spells how many artifacts of releases a node does not have.
func lacksOf(n *controlv1.ClusterMember) string {
	if n.ArtifactsMissing == nil {
		return "-"
	}
	return strconv.FormatUint(uint64(n.GetArtifactsMissing()), 10)
}

// clockOf spells how a node's clock stands.
func clockOf(n *controlv1.ClusterMember) string {
	if n.ClockAheadMs == nil {
		return "-"
	}
	return (time.Duration(n.GetClockAheadMs()) * time.Millisecond).Round(time.Second / 10).String()
}

type addOptions struct {
	dir, addr, kek string
	nonVoter       bool
}

func (a *app) addNode() *cobra.Command {
	var in addOptions
	c := a.online(&cobra.Command{Use: "add NAME", Short: "Add a node: its identity, its file, and its place in the cluster as a non-voter", Args: exactly(1, "the node's name"),
		Long: "add makes the folder NAME inside --dir, with a certificate and a file for demarcd, and adds the node as a non-voter. Start demarcd\n" +
			"with that file: it catches up. Then promote it, or let it take the place of another one with replace. A name that was removed is\nnever used again.",
		Example: "  demarc control-plane add cp-4 --dir acme --addr 10.0.0.4:7444,cp-4.acme.example:7443\n  demarcd run -c acme/cp-4/node.yaml\n  demarc control-plane promote cp-4\n\n" +
			"  demarc control-plane add edge-1 --dir acme --addr 10.0.1.1:7444,edge-1.acme.example:7443 --non-voter"},
		func(ctx context.Context, v *vendor, args []string) error { return a.add(ctx, v, args[0], in) })
	f := c.Flags()
	f.StringVar(&in.dir, "dir", "", "the folder that init made, with the kek; the node's own folder is made inside")
	f.StringVar(&in.addr, "addr", "", "RAFT_HOST:PORT,API_HOST:PORT[,METRICS_HOST:PORT]")
	f.StringVar(&in.kek, "kek-file", "", "the key-encryption key, where it is not DIR/kek")
	f.BoolVar(&in.nonVoter, "non-voter", false, "it never votes: it holds channels of appliances and forwards changes to the leader")
	return c
}

func (a *app) add(ctx context.Context, v *vendor, name string, in addOptions) error {
	const op = "demarc.add"
	if in.dir == "" || in.addr == "" {
		return usage("give --dir and --addr")
	}
	spec := initOptions{nodes: []string{name + "=" + in.addr}}
	nodes, err := spec.specs()
	if err != nil {
		return err
	}
	n, f := nodes[0], folder{in.dir}
	if in.kek == "" {
		in.kek = f.path("kek")
	}
	if _, err := os.Stat(in.kek); err != nil {
		return fault.Because(err, op, fault.NotFound, "the key-encryption key is not there: %s (see --kek-file)", in.kek)
	}
	if _, err := os.Lstat(f.path(name)); !errors.Is(err, fs.ErrNotExist) {
		return fault.New(op, fault.Conflict, "%s is there already: nothing is overwritten", f.path(name))
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	csr, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return err
	}
	m, err := askCluster(ctx, v, controlv1connect.ClusterClient.AddMember, &controlv1.AddMemberRequest{RequestId: draw(), Name: n.name, RaftAddress: n.raft, ApiAddress: n.api, NonVoter: in.nonVoter, Csr: csr})
	if err != nil {
		return err
	}
	pemKey, err := keyPEM(key)
	if err != nil {
		return err
	}
	var bundle bytes.Buffer
	for _, der := range m.GetBundle() {
		if err := pem.Encode(&bundle, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			return fault.At(op, fault.Internal, err)
		}
	}
	file, err := joinFile(v.TrustDomain, f.path(name), in, n, m.GetMembers())
	if err != nil {
		return err
	}
	err = errors.Join(f.write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.GetCertificate()}), 0o644, name, "cert.pem"), f.write(pemKey, 0o600, name, "cert.key"),
		f.write(bundle.Bytes(), 0o644, name, "bundle.pem"), f.write(file, 0o644, name, "node.yaml"))
	if err != nil {
		return err
	}
	doc := map[string]any{"node": name, "file": f.path(name, "node.yaml"), "role": "non-voter"}
	return a.emit(doc, func(w io.Writer) {
		fmt.Fprintf(w, "node %s is added as a non-voter; start it, with the kek beside its folder as %s says:\n  demarcd run -c %s\n", name, f.path(name, "node.yaml"), f.path(name, "node.yaml"))
		if !in.nonVoter {
			fmt.Fprintf(w, "then:\n  demarc control-plane promote %s\n", name)
		}
		fmt.Fprintf(w, "operators reach it at %s: add that to nodes of their files\n", n.api)
	})
}

// joinFile is the file of a node that joins.
func joinFile(domain, dir string, in addOptions, n nodeSpec, members []*controlv1.ClusterMember) ([]byte, error) {
	kek, err := filepath.Abs(in.kek)
	if err != nil {
		return nil, fault.At("demarc.add", fault.Internal, err)
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fault.At("demarc.add", fault.Internal, err)
	}
	if rel, err := filepath.Rel(abs, kek); err == nil {
		kek = rel
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "version: %s\nrole: %s\nname: %s\ntrust_domain: %s\ndir: data\nlisten: %q\nraft: {listen: %q}\njoin: true\nvoter: %v\ncluster:\n",
		configs.Version, configs.RoleControl, n.name, domain, bind(n.api), bind(n.raft), !in.nonVoter)
	fmt.Fprintf(&b, "  - {name: %s, raft: %q, api: %q}\n", n.name, n.raft, n.api)
	for _, m := range members {
		if m.GetRole() != "" && m.GetName() != n.name && m.GetApiAddress() != "" {
			fmt.Fprintf(&b, "  - {name: %s, raft: %q, api: %q}\n", m.GetName(), m.GetRaftAddress(), m.GetApiAddress())
		}
	}
	fmt.Fprintf(&b, "kek_file: %q\ncertificate: {file: cert.pem, key: cert.key, bundle: bundle.pem}\nmetrics: {listen: %q}\n", kek, n.metrics)
	_, err = configs.Parse(filepath.Join(dir, "node.yaml"), b.Bytes(), nil)
	return b.Bytes(), err
}

func (a *app) promote() *cobra.Command {
	return a.online(&cobra.Command{Use: "promote NAME", Short: "Make a non-voter that has caught up a voter", Args: exactly(1, "the node's name"),
		Long:    "promote waits until the node has all that the leader has, and refuses where it does not come that far in time or where too few\nvoters would be in reach.",
		Example: "  demarc control-plane promote cp-4"},
		func(ctx context.Context, v *vendor, args []string) error {
			if _, err := askCluster(ctx, v, controlv1connect.ClusterClient.PromoteMember, &controlv1.PromoteMemberRequest{RequestId: draw(), Name: args[0]}); err != nil {
				return err
			}
			return a.say(map[string]string{"voter": args[0]}, "node %s votes", args[0])
		})
}

func (a *app) demote() *cobra.Command {
	return a.online(&cobra.Command{Use: "demote NAME", Short: "Make a voter a non-voter", Args: exactly(1, "the node's name"),
		Long:    "demote leaves the node in the cluster: it has the same book, and votes no more. A leader hands leadership over first.",
		Example: "  demarc control-plane demote cp-1"},
		func(ctx context.Context, v *vendor, args []string) error {
			if _, err := askCluster(ctx, v, controlv1connect.ClusterClient.DemoteMember, &controlv1.DemoteMemberRequest{RequestId: draw(), Name: args[0]}); err != nil {
				return err
			}
			return a.say(map[string]string{"non_voter": args[0]}, "node %s votes no more", args[0])
		})
}

func (a *app) removeNode() *cobra.Command {
	var reason string
	c := a.online(&cobra.Command{Use: "remove NAME", Short: "Remove a node for good: its certificate is refused from then on", Args: exactly(1, "the node's name"),
		Long: "remove takes the node out of the cluster, dead or alive; a leader hands leadership over first. It is refused where too few voters\n" +
			"would be in reach. The node is told and stops; its name is never used again. Whoever may have read its disk and the kek has what\nissues certificates: then replace the CA too (demarc ca).",
		Example: "  demarc control-plane remove cp-1 --reason \"host is gone\""},
		func(ctx context.Context, v *vendor, args []string) error {
			if _, err := askCluster(ctx, v, controlv1connect.ClusterClient.RemoveMember, &controlv1.RemoveMemberRequest{RequestId: draw(), Name: args[0], Reason: reason}); err != nil {
				return err
			}
			return a.say(map[string]string{"removed": args[0]}, "node %s is removed", args[0])
		})
	c.Flags().StringVar(&reason, "reason", "", "for the record")
	return c
}

func (a *app) replaceNode() *cobra.Command {
	var by, reason string
	c := a.online(&cobra.Command{Use: "replace OLD --by NEW", Short: "Promote a non-voter that has caught up, then remove the old node for good", Args: exactly(1, "the old node's name"),
		Example: "  demarc control-plane add cp-4 --dir acme --addr 10.0.0.4:7444,cp-4.acme.example:7443\n  demarcd run -c acme/cp-4/node.yaml\n  demarc control-plane replace cp-1 --by cp-4"},
		func(ctx context.Context, v *vendor, args []string) error {
			if by == "" {
				return usage("name the new node with --by")
			}
			if _, err := askCluster(ctx, v, controlv1connect.ClusterClient.ReplaceMember, &controlv1.ReplaceMemberRequest{RequestId: draw(), Old: args[0], By: by, Reason: reason}); err != nil {
				return err
			}
			return a.say(map[string]string{"removed": args[0], "voter": by}, "node %s is removed, and %s votes", args[0], by)
		})
	c.Flags().StringVar(&by, "by", "", "the new node, which was added and runs")
	c.Flags().StringVar(&reason, "reason", "", "for the record")
	return c
}

func (a *app) transfer() *cobra.Command {
	var to string
	c := a.online(&cobra.Command{Use: "transfer-leadership", Short: "Make another voter lead", Args: exactly(0, "no arguments"),
		Example: "  demarc control-plane transfer-leadership\n  demarc control-plane transfer-leadership --to cp-2"},
		func(ctx context.Context, v *vendor, _ []string) error {
			m, err := askCluster(ctx, v, controlv1connect.ClusterClient.TransferLeadership, &controlv1.TransferLeadershipRequest{RequestId: draw(), To: to})
			if err != nil {
				return err
			}
			return a.say(m, "node %s leads", m.GetLeader())
		})
	c.Flags().StringVar(&to, "to", "", "the voter; left out, the one that is furthest")
	return c
}

func (a *app) autopilot() *cobra.Command {
	show := a.online(&cobra.Command{Use: "show", Short: "Show what the leader may do by itself", Args: exactly(0, "no arguments"), Example: "  demarc control-plane autopilot show"},
		func(ctx context.Context, v *vendor, _ []string) error {
			m, err := askCluster(ctx, v, controlv1connect.ClusterClient.ListMembers, &controlv1.ListMembersRequest{})
			if err != nil {
				return err
			}
			p := m.GetAutopilot()
			return a.emit(p, func(w io.Writer) {
				fmt.Fprintf(w, "remove dead voters\t%v\nafter a silence of\t%s\nvoters that stay at least\t%d\nwithout a replacement\t%v\npromote stable non-voters\t%v\nafter\t%s\n", p.GetRemoveDead(),
					time.Duration(p.GetDeadAfter())*time.Second, p.GetFloor(), p.GetWithoutReplacement(), p.GetPromoteStable(), time.Duration(p.GetStabilization())*time.Second)
			})
		})
	var p controlv1.Autopilot
	var dead, stable *time.Duration
	var floor *int
	set := a.online(&cobra.Command{Use: "set", Short: "Set all of what the leader may do by itself", Args: exactly(0, "no arguments"),
		Long: "set replaces the whole policy: what is not given has its default, and the default does nothing. A dead voter is removed only where\n" +
			"a majority of all voters is heard from, at least --floor voters stay, and these are alive or a stable non-voter stands ready.",
		Example: "  demarc control-plane autopilot set --remove-dead --promote-stable\n  demarc control-plane autopilot set"},
		func(ctx context.Context, v *vendor, _ []string) error {
			p.DeadAfter, p.Stabilization, p.Floor = int64(*dead/time.Second), int64(*stable/time.Second), uint32(*floor)
			if _, err := askCluster(ctx, v, controlv1connect.ClusterClient.SetAutopilot, &controlv1.SetAutopilotRequest{RequestId: draw(), Autopilot: &p}); err != nil {
				return err
			}
			return a.say(map[string]bool{"remove_dead": p.GetRemoveDead(), "promote_stable": p.GetPromoteStable()}, "autopilot removes dead voters: %v, promotes stable non-voters: %v", p.GetRemoveDead(), p.GetPromoteStable())
		})
	f := set.Flags()
	f.BoolVar(&p.RemoveDead, "remove-dead", false, "remove voters that have been silent for too long")
	dead = spanVar(f, "dead-after", 24*time.Hour, time.Minute, 366*24*time.Hour, "of silence")
	floor = countVar(f, "floor", 1000, "voters that stay at least")
	*floor = 3
	f.BoolVar(&p.WithoutReplacement, "without-replacement", false, "remove also where none stands ready to take the place")
	f.BoolVar(&p.PromoteStable, "promote-stable", false, "promote non-voters that are wanted as voters")
	stable = spanVar(f, "stable-after", 10*time.Second, time.Second, 24*time.Hour, "without a gap, before a non-voter is promoted")
	return group("autopilot", "What the leader may do by itself with its members", show, set)
}

// nodeFile reads the file of a stopped node.
func nodeFile(path, dir string) (*configs.Control, error) {
	if path == "" {
		return nil, usage("name the node's file with --config FILE")
	}
	c, err := configs.Load(path, nil)
	if err != nil {
		return nil, err
	}
	cfg, ok := c.(*configs.Control)
	if !ok {
		return nil, fault.New("demarc.config", fault.Invalid, "%s is not the file of a node of a control plane", path)
	}
	if dir != "" {
		cfg.Dir = dir
	}
	return cfg, fleet.CheckName("node", cfg.Name)
}
