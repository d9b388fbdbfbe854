// SPDX-License-Identifier: Apache-2.0

package vendor

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/mesh"
)

func applianceCommand(a *cli.App) *cobra.Command {
	var reason string
	add, expect := registerCommand(a), expectCommand(a)

	list := a.Online(&cobra.Command{
		Use:   "list",
		Short: "List appliances and what runs on them",
		Args:  cli.Exactly(0, "no arguments"),
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			all, err := appliances(ctx, v)
			if err != nil {
				return err
			}
			return a.Emit(all, func(w io.Writer) {
				fmt.Fprintln(w, "APPLIANCE\tCUSTOMER\tPLATFORM\tSTATUS\tONLINE\tTRANSPORT\tVERSION\tSTATE\tPOSTURE\tWHY")
				for _, x := range all {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%v\t%s\t%s\t%s\t%s\t%s\n", x.GetName(), x.GetCustomer(), x.GetPlatform(), x.GetStatus(),
						x.GetOnline(), x.GetRoute(),
						x.GetVersion(), x.GetState(), x.GetPosture(), attention(x))
				}
			})
		})
	show := a.Online(&cobra.Command{
		Use:   "show NAME",
		Short: "Show one appliance: its deployment, health, and which secrets are present",
		Args:  cli.Exactly(1, "the appliance's name"),
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			x, err := appliance(ctx, v, args[0])
			if err != nil {
				return err
			}
			return a.Emit(x, func(w io.Writer) {
				fmt.Fprintf(w, "appliance\t%s of %s, %s\nplatform\t%s\n", x.GetName(), x.GetCustomer(), x.GetStatus(), x.GetPlatform())
				fmt.Fprintf(w, "channel\tonline %v, at node %s by %s\n", x.GetOnline(), x.GetNode(), x.GetRoute())
				fmt.Fprintf(w, "deployment\t%s %s\t%s\n", x.GetVersion(), x.GetState(), sentenceOf(x.GetWhy()))
				if x.GetReason() != "" {
					fmt.Fprintf(w, "banned\t%s\n", x.GetReason())
				}
				if o := x.GetOffer(); o != nil {
					fmt.Fprintf(w, "waits\trelease %s: %s\n", fleet.Digest(o.GetRelease()).Short(), sentenceOf(o.GetWhy()))
				}
				fmt.Fprintf(w, "posture\t%s\n", x.GetPosture())
				for _, r := range x.GetRoads() {
					reason, remedy := mesh.Reason(r.GetReason()).Sentence()
					fmt.Fprintf(w, "transport\t%s\tdoes not work (%s): %s; at the customer: %s\n", r.GetKind(), r.GetReason(), reason, remedy)
				}
				for _, s := range x.GetServices() {
					fmt.Fprintf(w, "service\t%s\thealthy %v, restarts %d\t%s\n", s.GetName(), s.GetHealthy(), s.GetRestarts(), sentenceOf(s.GetWhy()))
				}
				for _, s := range x.GetSecrets() {
					fmt.Fprintf(w, "secret\t%s\tpresent %v\n", s.GetName(), s.GetPresent())
				}
			})
		})
	ban := a.Online(&cobra.Command{
		Use:   "ban NAME",
		Short: "Make every certificate of an appliance worthless, and close its channel",
		Args:  cli.Exactly(1, "the appliance's name"),
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			_, err := client.Call(ctx, v, client.Node.BanAppliance,
				&controlv1.BanApplianceRequest{RequestId: client.NewID(), Name: args[0], Reason: reason})
			if err != nil {
				return err
			}
			return a.Say(map[string]string{"banned": args[0]}, "appliance %s is banned", args[0])
		})
	ban.Flags().StringVar(&reason, "reason", "", "for the record")
	return cli.Group("appliance", "The appliances at the vendor's customers", add, expect, list, show, ban)
}

// appliances lists all appliances.
func appliances(ctx context.Context, v *client.Client) ([]*controlv1.Appliance, error) {
	m, err := client.Call(ctx, v, client.Node.ListAppliances, &controlv1.ListAppliancesRequest{})
	return m.GetAppliances(), err
}

// appliance finds one appliance. The fault is NotFound if it is not registered.
func appliance(ctx context.Context, v *client.Client, name string) (*controlv1.Appliance, error) {
	all, err := appliances(ctx, v)
	if err != nil {
		return nil, err
	}
	return find(all, name)
}

func find(all []*controlv1.Appliance, name string) (*controlv1.Appliance, error) {
	for _, x := range all {
		if x.GetName() == name {
			return x, nil
		}
	}
	return nil, fault.New("demarc.appliance", fault.NotFound, "no appliance %q is registered: demarc appliance list", name)
}
