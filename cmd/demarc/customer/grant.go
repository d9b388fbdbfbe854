// SPDX-License-Identifier: Apache-2.0

package customer

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
)

func grantCommand(a *cli.App) *cobra.Command {
	var life *time.Duration
	var uses *int
	var ops, services []string
	var k keyFlags
	var c *cobra.Command
	c = a.Local(&cobra.Command{
		Use:       "grant PHASE",
		Short:     "Allow the vendor the acts of a phase",
		Args:      cli.OneOf("a phase", phaseNames()...),
		ValidArgs: phaseNames(),
		Long: "The phases are " + strings.Join(phaseNames(), ", ") + ". Each is separate: none includes another.\n\n" +
			"A grant ends: after --for, or when it is revoked. The one exception is observe, which is on by default: granted without\n" +
			"--for and --uses it is on again until it is revoked.",
		Example: "  demarc grant deploy --for 720h --key globex.key\n" +
			"  demarc grant operate.read --uses 1 --operation state --key globex.key",
	},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			signer, err := k.signer(a)
			if err != nil {
				return err
			}
			name, err := applianceName(ctx, l)
			if err != nil {
				return err
			}
			now := time.Now().UTC()
			g := grant.Grant{Appliance: name, Phase: fleet.Phase(args[0]), Scope: grant.Scope{Operations: ops, Services: services},
				From: now.Add(-time.Minute), Uses: grant.Count(*uses), Nonce: client.NewID()}
			until := "it is revoked"
			if g.Phase != fleet.Observe || g.Uses > 0 || c.Flags().Changed("for") {
				g.Until = now.Add(*life)
				until = g.Until.Format(time.RFC3339)
			}
			m, err := send(ctx, l, g, signer, nil)
			if err != nil {
				return err
			}
			return a.Say(m, "%s is granted until %s; take it back with: demarc revoke %s", args[0], until, args[0])
		})
	life = cli.ConsentVar(c.Flags(), "for", cli.GrantLife, "how long")
	uses = cli.CountVar(c.Flags(), "uses", grant.MaxCount, "how many times; left out, any number")
	c.Flags().StringArrayVar(&ops, "operation", nil, "this operation only")
	c.Flags().StringArrayVar(&services, "service", nil, "this service only")
	k.add(c.Flags())
	return c
}

func phaseNames() []string {
	var out []string
	for _, p := range fleet.Phases() {
		out = append(out, string(p))
	}
	return out
}

func revokeCommand(a *cli.App) *cobra.Command {
	var all bool
	var receipt string
	var k keyFlags
	c := a.Local(&cobra.Command{
		Use:       "revoke [PHASE | GRANT]",
		Short:     "Take consent back, at once",
		ValidArgs: phaseNames(),
		Long:      "revoke answers when the last act is refused and what ran under it is ended, and reports how long that took.",
		Example: "  demarc revoke operate.read --key globex.key\n" +
			"  demarc revoke --all --key globex.key",
	},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			if all == (len(args) == 1) || len(args) > 1 {
				return cli.Usage("name one phase or grant, or --all")
			}
			signer, err := k.signer(a)
			if err != nil {
				return err
			}
			name, err := applianceName(ctx, l)
			if err != nil {
				return err
			}
			r := grant.Revoke{Appliance: name, All: all, At: time.Now().UTC(), Nonce: client.NewID()}
			if !all {
				if slices.Contains(phaseNames(), args[0]) {
					r.Phase = fleet.Phase(args[0])
				} else {
					r.Grant = args[0]
				}
			}
			m, err := send(ctx, l, r, signer, nil)
			if err != nil {
				return err
			}
			if receipt != "" {
				if err := cli.Create(receipt, m.GetReceipt(), 0o600); err != nil {
					return err
				}
			}
			return a.Say(m, "revoked: the last act was refused after %.3f ms", float64(m.GetTookMicros())/1000)
		})
	c.Flags().BoolVar(&all, "all", false, "everything")
	c.Flags().StringVar(&receipt, "receipt", "", "file for the appliance's signed receipt")
	k.add(c.Flags())
	return c
}

func accessCommand(a *cli.App) *cobra.Command {
	show := func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
		phase := "" // all
		if len(args) == 1 {
			phase = args[0]
		}
		m, err := client.Do(ctx, l.Access, &localv1.AccessRequest{Phase: phase})
		if err != nil {
			return err
		}
		return a.Emit(m, func(w io.Writer) {
			printBookTime(w, m.GetBookTime())
			fmt.Fprintln(w, "PHASE\tALLOWED\tUNTIL\tUSES\tWHY")
			for _, x := range m.GetAccess() {
				until, uses := "-", "-"
				if x.GetAllowed() {
					until, uses = endOf(x.GetUntilUnix()), usesOf(x.GetUsesLeft())
				}
				fmt.Fprintf(w, "%s\t%v\t%s\t%s\t%s\n", x.GetPhase(), x.GetAllowed(), until, uses, x.GetWhy())
				for _, r := range x.GetReach() {
					scope := grant.Scope{Operations: r.GetOperations(), Services: r.GetServices()}
					from := ""
					if r.GetFromUnix() > time.Now().Unix() {
						from = "from " + endOf(r.GetFromUnix())
					}
					fmt.Fprintf(w, "\t%s\t%s\t%s\t%s\n", from, endOf(r.GetUntilUnix()), usesOf(r.GetUsesLeft()), scope)
				}
				if phase != "" {
					for _, by := range x.GetBy() {
						fmt.Fprintf(w, "\t\t\t\tby %s\n", by)
					}
				}
			}
		})
	}
	c := a.Local(&cobra.Command{
		Use:   "access",
		Short: "Show what the vendor can do right now, why, and until when",
		Args:  cli.Exactly(0, "no arguments"),
	}, show)
	c.AddCommand(a.Local(&cobra.Command{
		Use:       "explain PHASE",
		Short:     "Name the grants and denies that decide a phase",
		Args:      cli.OneOf("a phase", phaseNames()...),
		ValidArgs: phaseNames(),
	}, show))
	return c
}

// endOf spells a time, or that there is none.
func endOf(unix int64) string {
	if unix == 0 {
		return "revoked"
	}
	return time.Unix(unix, 0).UTC().Format(time.RFC3339)
}

// usesOf spells a number of uses.
func usesOf(n int64) string {
	if n < 0 {
		return "any"
	}
	return strconv.FormatInt(n, 10)
}
