// SPDX-License-Identifier: Apache-2.0

// Package cluster is the commands by which an admin runs a control plane: its nodes, CAs, keys, secrets and snapshots.
package cluster

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
)

// Commands are the commands of demarc control-plane that are here.
func Commands(a *cli.App) []*cobra.Command {
	return append([]*cobra.Command{
		membersCommand(a), promoteCommand(a), demoteCommand(a), removeCommand(a), replaceCommand(a), transferCommand(a), autopilotCommand(a),
		snapshotCommand(a), recoverCommand(a), secretCommand(a),
	}, kekCommands(a)...)
}

func membersCommand(a *cli.App) *cobra.Command {
	return a.Online(&cobra.Command{
		Use:   "members",
		Short: "List the nodes: who votes, who leads, who is behind, who is silent",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "members asks the leader for the configuration in its log and what it knows of each node at this moment; LACKS is how\n" +
			"many artifacts of releases a node does not have yet, CLOCK by how much a node's clock is ahead of what a majority of\n" +
			"the voters' clocks says. A node whose role is \"-\" is expected, and is not in the cluster. Names of removed nodes are\n" +
			"never used again.",
		Example: "  demarc control-plane members\n" +
			"  demarc control-plane members --output json",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			m, err := client.Call(ctx, v, client.Node.ListMembers, &controlv1.ListMembersRequest{})
			if err != nil {
				return err
			}
			return a.Emit(m, func(w io.Writer) {
				fmt.Fprintln(w, "NODE\tROLE\tLEADS\tHEARD\tSILENT\tBEHIND\tLACKS\tCLOCK\tRAFT\tAPI\tBUILD")
				for _, n := range m.GetMembers() {
					silent := "never heard"
					if n.GetSilentMs() >= 0 {
						silent = (time.Duration(n.GetSilentMs()) * time.Millisecond).Round(time.Second / 10).String()
					}
					fmt.Fprintf(w, "%s\t%s\t%v\t%v\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n", n.GetName(), cli.OrDash(n.GetRole()), n.GetLeads(), n.GetHeard(),
						silent, n.GetLag(), missingArtifacts(n), clockOffset(n), n.GetRaftAddress(), n.GetApiAddress(), cli.OrDash(n.GetBuild()))
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

// missingArtifacts spells how many artifacts of releases a node does not have.
func missingArtifacts(n *controlv1.ClusterMember) string {
	if n.ArtifactsMissing == nil {
		return "-"
	}
	return strconv.FormatUint(uint64(n.GetArtifactsMissing()), 10)
}

// clockOffset spells by how much a node's clock is ahead.
func clockOffset(n *controlv1.ClusterMember) string {
	if n.ClockAheadMs == nil {
		return "-"
	}
	return (time.Duration(n.GetClockAheadMs()) * time.Millisecond).Round(time.Second / 10).String()
}

func promoteCommand(a *cli.App) *cobra.Command {
	return a.Online(&cobra.Command{
		Use:   "promote NAME",
		Short: "Make a non-voter that has caught up a voter",
		Args:  cli.Exactly(1, "the node's name"),
		Long: "promote waits until the node has all that the leader has, and refuses if it does not come that far in time or if\n" +
			"too few voters would be in reach.",
		Example: "  demarc control-plane promote cp-4",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			if _, err := client.Call(ctx, v, client.Node.PromoteMember,
				&controlv1.PromoteMemberRequest{RequestId: client.NewID(), Name: args[0]}); err != nil {
				return err
			}
			return a.Say(map[string]string{"voter": args[0]}, "node %s votes", args[0])
		})
}

func demoteCommand(a *cli.App) *cobra.Command {
	return a.Online(&cobra.Command{
		Use:     "demote NAME",
		Short:   "Make a voter a non-voter",
		Args:    cli.Exactly(1, "the node's name"),
		Long:    "demote leaves the node in the cluster: it has the same book, and votes no more. A leader hands leadership over first.",
		Example: "  demarc control-plane demote cp-1",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			if _, err := client.Call(ctx, v, client.Node.DemoteMember,
				&controlv1.DemoteMemberRequest{RequestId: client.NewID(), Name: args[0]}); err != nil {
				return err
			}
			return a.Say(map[string]string{"non_voter": args[0]}, "node %s votes no more", args[0])
		})
}

func removeCommand(a *cli.App) *cobra.Command {
	var reason string
	c := a.Online(&cobra.Command{
		Use:   "remove NAME",
		Short: "Remove a node for good: its certificate is refused from then on",
		Args:  cli.Exactly(1, "the node's name"),
		Long: "remove takes the node out of the cluster, dead or alive; a leader hands leadership over first. It is refused if too\n" +
			"few voters would be in reach. The node is told and stops; its name is never used again. Whoever may have read its disk\n" +
			"and the kek has what issues certificates: then replace the CA too (demarc ca).",
		Example: "  demarc control-plane remove cp-1 --reason \"host is gone\"",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			if _, err := client.Call(ctx, v, client.Node.RemoveMember,
				&controlv1.RemoveMemberRequest{RequestId: client.NewID(), Name: args[0], Reason: reason}); err != nil {
				return err
			}
			return a.Say(map[string]string{"removed": args[0]}, "node %s is removed", args[0])
		})
	c.Flags().StringVar(&reason, "reason", "", "for the record")
	return c
}

func replaceCommand(a *cli.App) *cobra.Command {
	var by, reason string
	c := a.Online(&cobra.Command{
		Use:   "replace OLD --by NEW",
		Short: "Promote a non-voter that has caught up, then remove the old node for good",
		Args:  cli.Exactly(1, "the old node's name"),
		Example: "  demarc control-plane add cp-4 --dir acme --addr 10.0.0.4:7444,cp-4.acme.example:7443\n" +
			"  demarcd run -c acme/cp-4/node.yaml\n" +
			"  demarc control-plane replace cp-1 --by cp-4",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			if by == "" {
				return cli.Usage("name the new node with --by")
			}
			if _, err := client.Call(ctx, v, client.Node.ReplaceMember,
				&controlv1.ReplaceMemberRequest{RequestId: client.NewID(), Old: args[0], By: by, Reason: reason}); err != nil {
				return err
			}
			return a.Say(map[string]string{"removed": args[0], "voter": by}, "node %s is removed, and %s votes", args[0], by)
		})
	c.Flags().StringVar(&by, "by", "", "the new node, which was added and runs")
	c.Flags().StringVar(&reason, "reason", "", "for the record")
	return c
}

func transferCommand(a *cli.App) *cobra.Command {
	var to string
	c := a.Online(&cobra.Command{
		Use:   "transfer-leadership",
		Short: "Make another voter lead",
		Args:  cli.Exactly(0, "no arguments"),
		Example: "  demarc control-plane transfer-leadership\n" +
			"  demarc control-plane transfer-leadership --to cp-2",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			m, err := client.Call(ctx, v, client.Node.TransferLeadership, &controlv1.TransferLeadershipRequest{RequestId: client.NewID(), To: to})
			if err != nil {
				return err
			}
			return a.Say(m, "node %s leads", m.GetLeader())
		})
	c.Flags().StringVar(&to, "to", "", "the voter; left out, the one that is furthest")
	return c
}

func autopilotCommand(a *cli.App) *cobra.Command {
	show := a.Online(&cobra.Command{
		Use:     "show",
		Short:   "Show what the leader may do by itself",
		Args:    cli.Exactly(0, "no arguments"),
		Example: "  demarc control-plane autopilot show",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			m, err := client.Call(ctx, v, client.Node.ListMembers, &controlv1.ListMembersRequest{})
			if err != nil {
				return err
			}
			p := m.GetAutopilot()
			return a.Emit(p, func(w io.Writer) {
				fmt.Fprintf(w, "remove dead voters\t%v\nafter a silence of\t%s\nvoters that stay at least\t%d\nwithout a replacement\t%v\n"+
					"promote stable non-voters\t%v\nafter\t%s\n", p.GetRemoveDead(),
					time.Duration(p.GetDeadAfter())*time.Second, p.GetFloor(), p.GetWithoutReplacement(), p.GetPromoteStable(),
					time.Duration(p.GetStabilization())*time.Second)
			})
		})
	var p controlv1.Autopilot
	var dead, stable *time.Duration
	var floor *int
	set := a.Online(&cobra.Command{
		Use:   "set",
		Short: "Set all of what the leader may do by itself",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "set replaces the whole policy: what is not set has its default, and the default does nothing. A dead voter is removed\n" +
			"only if a majority of all voters is heard from, at least --floor voters stay, and these are alive or a stable\n" +
			"non-voter is ready.",
		Example: "  demarc control-plane autopilot set --remove-dead --promote-stable\n" +
			"  demarc control-plane autopilot set",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			p.DeadAfter, p.Stabilization, p.Floor = int64(*dead/time.Second), int64(*stable/time.Second), uint32(*floor)
			if _, err := client.Call(ctx, v, client.Node.SetAutopilot,
				&controlv1.SetAutopilotRequest{RequestId: client.NewID(), Autopilot: &p}); err != nil {
				return err
			}
			return a.Say(map[string]bool{"remove_dead": p.GetRemoveDead(), "promote_stable": p.GetPromoteStable()},
				"autopilot removes dead voters: %v, promotes stable non-voters: %v", p.GetRemoveDead(), p.GetPromoteStable())
		})
	f := set.Flags()
	f.BoolVar(&p.RemoveDead, "remove-dead", false, "remove voters that have been silent for too long")
	dead = cli.SpanVar(f, "dead-after", 24*time.Hour, time.Minute, 366*24*time.Hour, "of silence")
	floor = cli.CountVar(f, "floor", 1000, "voters that stay at least")
	*floor = 3
	f.BoolVar(&p.WithoutReplacement, "without-replacement", false, "remove also if none is ready to take the place")
	f.BoolVar(&p.PromoteStable, "promote-stable", false, "promote non-voters that are wanted as voters")
	stable = cli.SpanVar(f, "stable-after", 10*time.Second, time.Second, 24*time.Hour, "without a gap, before a non-voter is promoted")
	return cli.Group("autopilot", "What the leader may do by itself with its members", show, set)
}
