// SPDX-License-Identifier: Apache-2.0

// Package operator is the commands about the vendor's operators, and the files by which one calls the control plane.
// Package operator is the commands about the vendor's operators, and the files by which one calls the control plane.
package operator

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// Command is demarc operator.
func Command(a *cli.App) *cobra.Command {
	return cli.Group("operator", "The vendor's operators, and yourself as one",
		inviteCommand(a), acceptCommand(a), listCommand(a), showCommand(a), roleCommand(a), banCommand(a), removeCommand(a),
		anchorCommand(a), loginCommand(a), renewCommand(a))
}

const rolesHelp = `Roles, each may do all that the ones before it may:
  viewer    reads: status, appliances, operations, evidence
  deployer  uploads and publishes releases
  operator  registers and bans appliances, requests operations
  admin     operators, CAs, keys`

// operators lists the operators.
func operators(ctx context.Context, v *client.Client) ([]*controlv1.OperatorRecord, error) {
	m, err := client.Call(ctx, v, client.Node.ListOperators, &controlv1.ListOperatorsRequest{})
	return m.GetOperators(), err
}

// names completes the name of an operator.
func names(a *cli.App, c *cobra.Command, args []string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	v, err := a.Client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	defer v.Close()
	all, err := operators(c.Context(), v)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var out []string
	for _, o := range all {
		out = append(out, o.GetName()+"\t"+o.GetRole()+", "+o.GetStatus())
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// roleFlag is --role, checked before a call.
func roleFlag(c *cobra.Command, to *string) {
	c.Flags().StringVar(to, "role", "", "viewer, deployer, operator or admin")
	var names []string
	for _, r := range fleet.Ranks() {
		names = append(names, string(r))
	}
	_ = c.RegisterFlagCompletionFunc("role", cobra.FixedCompletions(names, cobra.ShellCompDirectiveNoFileComp))
	c.PreRunE = func(*cobra.Command, []string) error {
		if err := fleet.Rank(*to).Check(); err != nil {
			return cli.Usage("--role: %s", fault.Text(err))
		}
		return nil
	}
}

// completeName completes the argument of a command that names an operator.
func completeName(a *cli.App, c *cobra.Command) {
	c.ValidArgsFunction = func(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		return names(a, c, args)
	}
}

func inviteCommand(a *cli.App) *cobra.Command {
	var role, out string
	var valid *time.Duration
	c := a.Online(&cobra.Command{
		Use:   "invite NAME",
		Short: "Make an invitation with which one person becomes an operator, once",
		Args:  cli.Exactly(1, "the new operator's name"),
		Long: "invite prints one line. Whoever runs demarc operator accept with it first becomes the operator: hand it over a channel\n" +
			"that you trust. It holds a secret that is drawn here and that the control plane never sees, the addresses of the\n" +
			"control plane, and the key by which the invited recognizes it. An invitation of the same name that nobody accepted is\n" +
			"replaced.\n\n" +
			rolesHelp,
		Example: "  demarc operator invite ben --role deployer --valid 24h --out ben.invitation",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			if err := fleet.CheckName("operator", args[0]); err != nil {
				return cli.Usage("%s", fault.Text(err))
			}
			if out != "" { // before an invitation that is valid is replaced
				if err := cli.CanCreate(out); err != nil {
					return err
				}
			}
			line, i, err := invite(ctx, v, args[0], fleet.Rank(role), *valid)
			if err != nil {
				return err
			}
			if out == "" {
				doc := map[string]any{"operator": i.Name, "role": i.Role, "until_unix": i.Until.Unix(), "invitation": line}
				return a.Emit(doc, func(w io.Writer) { fmt.Fprintln(w, line) })
			}
			if err := cli.Create(out, []byte(line+"\n"), 0o600); err != nil {
				return err
			}
			return a.Say(map[string]any{"operator": i.Name, "role": i.Role, "until_unix": i.Until.Unix(), "file": out},
				"the invitation of %s as %s is in %s, and valid until %s\nthey run: demarc operator accept %s --out %s.yaml",
				i.Name, i.Role, out, i.Until.UTC().Format(time.RFC3339), out, i.Name)
		})
	roleFlag(c, &role)
	valid = cli.SpanVar(c.Flags(), "valid", 24*time.Hour, time.Minute, identity.MaxInviteLife, "how long it is valid, 14 days at most")
	c.Flags().StringVar(&out, "out", "", "file to write it to, readable by you only; by default it is printed")
	return c
}

// invite draws the secret of an invitation and sends the control plane its public half.
func invite(ctx context.Context, v *client.Client, name string, role fleet.Rank, valid time.Duration) (string, identity.Invitation, error) {
	secret := make([]byte, identity.InviteSecret)
	_, _ = rand.Read(secret) // crypto/rand.Read never fails
	key, err := identity.InviteKey(secret)
	if err != nil {
		return "", identity.Invitation{}, err
	}
	req := &controlv1.InviteOperatorRequest{RequestId: client.NewID(), Name: name, Role: string(role),
		Verifier: key.Public().(ed25519.PublicKey), ValidSeconds: int64(valid / time.Second)}
	m, err := client.Call(ctx, v, client.Node.InviteOperator, req)
	if err != nil {
		return "", identity.Invitation{}, err
	}
	i := identity.Invitation{TrustDomain: v.TrustDomain, Name: name, Role: role, Nodes: v.Nodes, LogKey: string(m.GetLogKey()),
		Secret: secret, Until: time.Unix(m.GetExpiresUnix(), 0).UTC()}
	line, err := i.Encode()
	return line, i, err
}

func listCommand(a *cli.App) *cobra.Command {
	return a.Online(&cobra.Command{
		Use:   "list",
		Short: "List the operators, their roles, and invitations that nobody accepted yet",
		Args:  cli.Exactly(0, "no arguments"),
		Example: "  demarc operator list\n" +
			"  demarc operator list --output json",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			all, err := operators(ctx, v)
			if err != nil {
				return err
			}
			return a.Emit(all, func(w io.Writer) {
				fmt.Fprintln(w, "OPERATOR\tROLE\tSTATUS\tUNTIL\tSINCE\tBY")
				for _, o := range all {
					till := o.GetExpiresUnix()
					if o.GetStatus() == "invited" {
						till = o.GetInvitationExpiresUnix()
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", o.GetName(), o.GetRole(), o.GetStatus(), cli.Minute(till), cli.Minute(o.GetSinceUnix()),
						cli.Principal(o.GetBy()))
				}
			})
		})
}

func showCommand(a *cli.App) *cobra.Command {
	c := a.Online(&cobra.Command{
		Use:     "show NAME",
		Short:   "Show one operator",
		Args:    cli.Exactly(1, "the operator's name"),
		Example: "  demarc operator show ben",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			all, err := operators(ctx, v)
			if err != nil {
				return err
			}
			for _, o := range all {
				if o.GetName() != args[0] {
					continue
				}
				return a.Emit(o, func(w io.Writer) {
					fmt.Fprintf(w, "operator\t%s, %s\nrole\t%s\nsince\t%s, by %s (%s)\n", o.GetName(), o.GetStatus(), o.GetRole(),
						cli.Minute(o.GetSinceUnix()), cli.Principal(o.GetBy()), o.GetVia())
					fmt.Fprintf(w, "certificate\t%s until %s\n", cli.OrDash(o.GetSerial()), cli.Minute(o.GetExpiresUnix()))
					fmt.Fprintf(w, "next\t%s\ninvitation until\t%s\nreason\t%s\n", cli.OrDash(o.GetNextSerial()),
						cli.Minute(o.GetInvitationExpiresUnix()), cli.OrDash(o.GetReason()))
				})
			}
			return fault.New("demarc.operator", fault.NotFound, "there is no operator %q: demarc operator list", args[0])
		})
	completeName(a, c)
	return c
}

func roleCommand(a *cli.App) *cobra.Command {
	var role string
	c := a.Online(&cobra.Command{
		Use:   "role NAME --role ROLE",
		Short: "Change what an operator may do, from their next call on",
		Args:  cli.Exactly(1, "the operator's name"),
		Long: "role changes what an operator may do. The last admin keeps the role.\n\n" +
			rolesHelp,
		Example: "  demarc operator role ben --role operator",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			req := &controlv1.SetOperatorRoleRequest{RequestId: client.NewID(), Name: args[0], Role: role}
			_, err := client.Call(ctx, v, client.Node.SetOperatorRole, req)
			if err != nil {
				return err
			}
			return a.Say(map[string]string{"operator": args[0], "role": role}, "operator %s is %s %s now", args[0], article(role), role)
		})
	completeName(a, c)
	roleFlag(c, &role)
	return c
}

func article(word string) string {
	if strings.ContainsAny(word[:1], "aeiou") {
		return "an"
	}
	return "a"
}

func banCommand(a *cli.App) *cobra.Command {
	var reason string
	c := a.Online(&cobra.Command{
		Use:     "ban NAME",
		Short:   "Make every certificate of an operator worthless, and cut their connections",
		Args:    cli.Exactly(1, "the operator's name"),
		Example: "  demarc operator ban ben --reason 'laptop stolen'",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			req := &controlv1.BanOperatorRequest{RequestId: client.NewID(), Name: args[0], Reason: reason}
			_, err := client.Call(ctx, v, client.Node.BanOperator, req)
			if err != nil {
				return err
			}
			return a.Say(map[string]string{"banned": args[0]}, "operator %s is banned", args[0])
		})
	completeName(a, c)
	c.Flags().StringVar(&reason, "reason", "", "for the record")
	return c
}

func removeCommand(a *cli.App) *cobra.Command {
	c := a.Online(&cobra.Command{
		Use:   "remove NAME",
		Short: "Forget an operator, or withdraw an invitation; the name may be invited again",
		Args:  cli.Exactly(1, "the operator's name"),
		Long: "remove forgets an operator: none of their certificates is valid any more. What they did stays in the audit log. One\n" +
			"who lost their file is removed and invited again.",
		Example: "  demarc operator remove ben",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			req := &controlv1.RemoveOperatorRequest{RequestId: client.NewID(), Name: args[0]}
			_, err := client.Call(ctx, v, client.Node.RemoveOperator, req)
			if err != nil {
				return err
			}
			return a.Say(map[string]string{"removed": args[0]}, "operator %s is removed", args[0])
		})
	completeName(a, c)
	return c
}

func renewCommand(a *cli.App) *cobra.Command {
	return a.Online(&cobra.Command{
		Use:   "renew",
		Short: "Replace the operator's certificate and key, in place",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "renew replaces the certificate and the key, in place. The old certificate is valid until the new one is used for the\n" +
			"first time. The bundle, the CAs by which the control plane is recognised, needs no command: every command keeps it up\n" +
			"to date.",
		Example: "  demarc operator renew --context operator.yaml",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			until, err := v.Renew(ctx)
			if err != nil {
				return err
			}
			return a.Say(map[string]any{"operator": v.Name, "until_unix": until.Unix()}, "the certificate of %s is valid until %s", v.Name,
				until.UTC().Format(time.DateOnly))
		})
}
