// SPDX-License-Identifier: Apache-2.0

// Package vendor is the commands by which a vendor's operator works: customers, appliances, releases, operations, evidence.
package vendor

import (
	"context"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	managementv1 "github.com/demarc-dev/demarc/api/management/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/cmd/demarc/evidence"
)

// Commands are the commands of this package.
func Commands(a *cli.App) []*cobra.Command {
	return []*cobra.Command{
		statusCommand(a), customerCommand(a), applianceCommand(a), releaseCommand(a), operationCommand(a), probeCommand(a), evidenceCommand(a),
		managementCommand(a),
	}
}

func statusCommand(a *cli.App) *cobra.Command {
	return a.Online(&cobra.Command{
		Use:     "status",
		Short:   "Show the control plane's nodes, leader and audit log",
		Args:    cli.Exactly(0, "no arguments"),
		Example: "  demarc status --context operator.yaml",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			m, err := client.Call(ctx, v, client.Node.Status, &controlv1.StatusRequest{})
			if err != nil {
				return err
			}
			return a.Emit(m, func(w io.Writer) {
				fmt.Fprintf(w, "trust domain\t%s%s\nasked\t%s\nleader\t%s\naudit log\t%d entries, root %.16s\n", m.GetTrustDomain(),
					cli.ForDevelopment(m.GetDevelopment()), m.GetNode(), m.GetLeader(), m.GetAuditSize(), m.GetAuditRoot())
				if e := m.GetEpoch(); e != nil {
					fmt.Fprintf(w, "epoch\t%d (%s at %s)\tkept %d entries of the log\t%d appliances have not come back since\n", e.GetNumber(),
						e.GetCause(),
						time.Unix(e.GetBegunUnix(), 0).UTC().Format(time.RFC3339), e.GetLogKept(), e.GetUnmet())
				}
				for _, n := range m.GetMembers() {
					fmt.Fprintf(w, "node\t%s\traft %s\tapi %s\n", n.GetName(), n.GetRaftAddress(), n.GetApiAddress())
				}
			})
		})
}

func customerCommand(a *cli.App) *cobra.Command {
	add := a.Online(&cobra.Command{
		Use:     "add NAME",
		Short:   "Register a customer",
		Args:    cli.Exactly(1, "the customer's name"),
		Example: "  demarc customer add globex",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			_, err := client.Call(ctx, v, client.Node.RegisterCustomer, &controlv1.RegisterCustomerRequest{RequestId: client.NewID(), Name: args[0]})
			if err != nil {
				return err
			}
			return a.Say(map[string]string{"customer": args[0]}, "customer %s is registered", args[0])
		})
	return cli.Group("customer", "The vendor's customers", add)
}

func evidenceCommand(a *cli.App) *cobra.Command {
	var file string
	c := a.Online(&cobra.Command{
		Use:     "export",
		Short:   "Export the vendor's log with its countersignatures",
		Args:    cli.Exactly(0, "no arguments"),
		Example: "  demarc evidence export --out vendor.json",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			return evidence.Save(a, file, func(restart func() io.Writer) error {
				return v.Stream(ctx, func(ctx context.Context, c client.Node, alive func()) error {
					s, err := c.ExportEvidence(ctx, connect.NewRequest(&controlv1.ExportEvidenceRequest{}))
					if err != nil {
						return client.Fault(err)
					}
					return evidence.Receive(s, restart(), alive)
				})
			})
		})
	c.Flags().StringVar(&file, "out", "", "the file to write")
	return cli.Group("evidence", "The vendor's evidence", c)
}

func managementCommand(a *cli.App) *cobra.Command {
	list := &cobra.Command{
		Use:     "list",
		Short:   "List the control planes that this management plane hears of",
		Args:    cli.Exactly(0, "no arguments"),
		Example: "  demarc management list --socket management.sock",
	}
	list.RunE = func(c *cobra.Command, _ []string) error {
		if a.Socket == "" {
			return cli.Usage("name the management plane's socket with --socket PATH")
		}
		ctx, cancel := a.Bounded(c)
		defer cancel()
		m, err := client.Do(ctx, client.Management(a.Socket).List, &managementv1.ListRequest{})
		if err != nil {
			return err
		}
		return a.Emit(m, func(w io.Writer) {
			fmt.Fprintln(w, "CONTROL PLANE\tHEALTH\tNODES\tAPPLIANCES\tONLINE\tCAS\tBUILD")
			for _, p := range m.GetControlPlanes() {
				l := p.GetLast()
				if l == nil {
					fmt.Fprintf(w, "%s\tnever heard\n", p.GetName())
					continue
				}
				fmt.Fprintf(w, "%s\t%s\t%d of %d\t%d\t%d\tbundle %d\t%s\n", p.GetName(), l.GetHealth(), l.GetNodesReachable(), l.GetNodesVoting(),
					l.GetAppliancesRegistered()+l.GetAppliancesEnrolled(), l.GetAppliancesOnline(), p.GetBundle(), l.GetBuild())
			}
		})
	}
	return cli.Group("management", "The management plane, for its operator", list)
}
