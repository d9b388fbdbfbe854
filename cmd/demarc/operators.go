// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"io"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

const rolesHelp = `Roles, each may do all that the ones before it may:
  viewer    reads: status, appliances, operations, evidence
  deployer  uploads and publishes releases
  operator  registers and bans appliances, requests operations
  admin     operators, CAs, keys`

// askOperators is ask for the service about operators.
func askOperators[Res any](ctx context.Context, v *vendor, do func(ctx context.Context, c controlv1connect.OperatorServiceClient) (Res, error)) (Res, error) {
	return ask(ctx, v, func(ctx context.Context, _ controlv1connect.ControlClient) (Res, error) {
		return do(ctx, v.operators[v.at])
	})
}

func (v *vendor) operatorRecords(ctx context.Context) ([]*controlv1.OperatorRecord, error) {
	m, err := askOperators(ctx, v, func(ctx context.Context, c controlv1connect.OperatorServiceClient) (*controlv1.ListOperatorsResponse, error) {
		return wire(c.ListOperators(ctx, connect.NewRequest(&controlv1.ListOperatorsRequest{})))
	})
	return m.GetOperators(), err
}

// operatorNames completes the name of an operator.
func (a *app) operatorNames(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	v, err := a.vendor()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	defer v.close()
	all, err := v.operatorRecords(c.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var out []string
	for _, o := range all {
		out = append(out, o.GetName()+"\t"+o.GetRole()+", "+o.GetStatus())
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// roleFlag is --role, checked before anybody is called.
func roleFlag(c *cobra.Command, to *string) {
	c.Flags().StringVar(to, "role", "", "viewer, deployer, operator or admin")
	var names []string
	for _, r := range fleet.Ranks() {
		names = append(names, string(r))
	}
	_ = c.RegisterFlagCompletionFunc("role", cobra.FixedCompletions(names, cobra.ShellCompDirectiveNoFileComp))
	c.PreRunE = func(*cobra.Command, []string) error {
		if err := fleet.Rank(*to).Check(); err != nil {
			return usage("--role: %s", fault.Text(err))
		}
		return nil
	}
}

// operators is the commands about operators but for oneself's renewal.
func (a *app) operators() []*cobra.Command {
	return []*cobra.Command{a.inviteOperator(), a.acceptInvitation(), a.listOperators(), a.showOperator(), a.roleOperator(), a.banOperator(), a.removeOperator(), a.showDoor(), a.loginOperator()}
}

func (a *app) inviteOperator() *cobra.Command {
	var role, out string
	var valid *time.Duration
	c := a.online(&cobra.Command{Use: "invite NAME", Short: "Make an invitation with which one person becomes an operator, once", Args: exactly(1, "the new operator's name"),
		Long: "invite prints one line. Whoever runs demarc operator accept with it first becomes the operator: hand it over a channel that you trust.\n" +
			"It holds a secret that is drawn here and that the control plane never sees, the addresses of the control plane, and the key by which\nthe invited recognizes it. An invitation of the same name that nobody accepted is replaced.\n\n" + rolesHelp,
		Example: "  demarc operator invite ben --role deployer --valid 24h --out ben.invitation"},
		func(ctx context.Context, v *vendor, args []string) error {
			if err := fleet.CheckName("operator", args[0]); err != nil {
				return usage("%s", fault.Text(err))
			}
			if out != "" { // before the invitation that stands is replaced
				if err := creatable(out); err != nil {
					return err
				}
			}
			line, i, err := v.invite(ctx, args[0], fleet.Rank(role), *valid)
			if err != nil {
				return err
			}
			if out == "" {
				doc := map[string]any{"operator": i.Name, "role": i.Role, "until_unix": i.Until.Unix(), "invitation": line}
				return a.emit(doc, func(w io.Writer) { fmt.Fprintln(w, line) })
			}
			if err := create(out, []byte(line+"\n"), 0o600); err != nil {
				return err
			}
			return a.say(map[string]any{"operator": i.Name, "role": i.Role, "until_unix": i.Until.Unix(), "file": out},
				"the invitation of %s as %s is in %s, and good until %s\nthey run: demarc operator accept %s --out %s.yaml", i.Name, i.Role, out, i.Until.UTC().Format(time.RFC3339), out, i.Name)
		})
	roleFlag(c, &role)
	valid = spanVar(c.Flags(), "valid", 24*time.Hour, time.Minute, identity.MaxInviteLife, "how long it is good, 14 days at most")
	c.Flags().StringVar(&out, "out", "", "file to write it to, readable by you only; by default it is printed")
	return c
}

// invite draws the secret of an invitation and tells the control plane its public half.
func (v *vendor) invite(ctx context.Context, name string, role fleet.Rank, valid time.Duration) (string, identity.Invitation, error) {
	secret := make([]byte, identity.InviteSecret)
	_, _ = rand.Read(secret) // crypto/rand.Read never fails
	key, err := identity.InviteKey(secret)
	if err != nil {
		return "", identity.Invitation{}, err
	}
	req := &controlv1.InviteOperatorRequest{RequestId: draw(), Name: name, Role: string(role), Verifier: key.Public().(ed25519.PublicKey), ValidSeconds: int64(valid / time.Second)}
	m, err := askOperators(ctx, v, func(ctx context.Context, c controlv1connect.OperatorServiceClient) (*controlv1.InviteOperatorResponse, error) {
		return wire(c.InviteOperator(ctx, connect.NewRequest(req)))
	})
	if err != nil {
		return "", identity.Invitation{}, err
	}
	i := identity.Invitation{TrustDomain: v.TrustDomain, Name: name, Role: role, Nodes: v.Nodes, LogKey: string(m.GetLogKey()), Secret: secret, Until: time.Unix(m.GetExpiresUnix(), 0).UTC()}
	line, err := i.Encode()
	return line, i, err
}

func (a *app) listOperators() *cobra.Command {
	return a.online(&cobra.Command{Use: "list", Short: "List the operators, their roles, and invitations that nobody accepted yet", Args: exactly(0, "no arguments"),
		Example: "  demarc operator list\n  demarc operator list --output json"},
		func(ctx context.Context, v *vendor, _ []string) error {
			all, err := v.operatorRecords(ctx)
			if err != nil {
				return err
			}
			return a.emit(all, func(w io.Writer) {
				fmt.Fprintln(w, "OPERATOR\tROLE\tSTATUS\tUNTIL\tSINCE\tBY")
				for _, o := range all {
					till := o.GetExpiresUnix()
					if o.GetStatus() == "invited" {
						till = o.GetInvitationExpiresUnix()
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", o.GetName(), o.GetRole(), o.GetStatus(), moment(till), moment(o.GetSinceUnix()), shortly(o.GetBy()))
				}
			})
		})
}

func moment(unix int64) string {
	if unix == 0 {
		return "-"
	}
	return time.Unix(unix, 0).UTC().Format("2006-01-02 15:04")
}

// shortly is a principal without its trust domain.
func shortly(principal string) string {
	if _, role, name, ok := fleet.Principal(principal).Split(); ok {
		return string(role) + "/" + name
	}
	return orDash(principal)
}

func (a *app) showOperator() *cobra.Command {
	c := a.online(&cobra.Command{Use: "show NAME", Short: "Show one operator", Args: exactly(1, "the operator's name"), Example: "  demarc operator show ben"},
		func(ctx context.Context, v *vendor, args []string) error {
			all, err := v.operatorRecords(ctx)
			if err != nil {
				return err
			}
			for _, o := range all {
				if o.GetName() != args[0] {
					continue
				}
				return a.emit(o, func(w io.Writer) {
					fmt.Fprintf(w, "operator\t%s, %s\nrole\t%s\nsince\t%s, by %s (%s)\n", o.GetName(), o.GetStatus(), o.GetRole(), moment(o.GetSinceUnix()), shortly(o.GetBy()), o.GetVia())
					fmt.Fprintf(w, "certificate\t%s until %s\n", orDash(o.GetSerial()), moment(o.GetExpiresUnix()))
					fmt.Fprintf(w, "next\t%s\ninvitation until\t%s\nreason\t%s\n", orDash(o.GetNextSerial()), moment(o.GetInvitationExpiresUnix()), orDash(o.GetReason()))
				})
			}
			return fault.New("demarc.operator", fault.NotFound, "there is no operator %q: demarc operator list", args[0])
		})
	c.ValidArgsFunction = a.operatorNames
	return c
}

func (a *app) roleOperator() *cobra.Command {
	var role string
	c := a.online(&cobra.Command{Use: "role NAME --role ROLE", Short: "Change what an operator may do, from their next call on", Args: exactly(1, "the operator's name"),
		Long: "role changes what an operator may do. The last admin keeps the role.\n\n" + rolesHelp, Example: "  demarc operator role ben --role operator"},
		func(ctx context.Context, v *vendor, args []string) error {
			req := &controlv1.SetOperatorRoleRequest{RequestId: draw(), Name: args[0], Role: role}
			_, err := askOperators(ctx, v, func(ctx context.Context, c controlv1connect.OperatorServiceClient) (*controlv1.SetOperatorRoleResponse, error) {
				return wire(c.SetOperatorRole(ctx, connect.NewRequest(req)))
			})
			if err != nil {
				return err
			}
			return a.say(map[string]string{"operator": args[0], "role": role}, "operator %s is %s %s now", args[0], article(role), role)
		})
	c.ValidArgsFunction = a.operatorNames
	roleFlag(c, &role)
	return c
}

func article(word string) string {
	if strings.ContainsAny(word[:1], "aeiou") {
		return "an"
	}
	return "a"
}

func (a *app) banOperator() *cobra.Command {
	var reason string
	c := a.online(&cobra.Command{Use: "ban NAME", Short: "Make every certificate of an operator worthless, and cut their connections", Args: exactly(1, "the operator's name"),
		Example: "  demarc operator ban ben --reason 'laptop stolen'"},
		func(ctx context.Context, v *vendor, args []string) error {
			req := &controlv1.BanOperatorRequest{RequestId: draw(), Name: args[0], Reason: reason}
			_, err := askOperators(ctx, v, func(ctx context.Context, c controlv1connect.OperatorServiceClient) (*controlv1.BanOperatorResponse, error) {
				return wire(c.BanOperator(ctx, connect.NewRequest(req)))
			})
			if err != nil {
				return err
			}
			return a.say(map[string]string{"banned": args[0]}, "operator %s is banned", args[0])
		})
	c.ValidArgsFunction = a.operatorNames
	c.Flags().StringVar(&reason, "reason", "", "for the record")
	return c
}

func (a *app) removeOperator() *cobra.Command {
	c := a.online(&cobra.Command{Use: "remove NAME", Short: "Forget an operator, or withdraw an invitation; the name may be invited again", Args: exactly(1, "the operator's name"),
		Long:    "remove forgets an operator: none of their certificates passes any more. What they did stays in the audit log.\nOne who lost their file is removed and invited again.",
		Example: "  demarc operator remove ben"},
		func(ctx context.Context, v *vendor, args []string) error {
			req := &controlv1.RemoveOperatorRequest{RequestId: draw(), Name: args[0]}
			_, err := askOperators(ctx, v, func(ctx context.Context, c controlv1connect.OperatorServiceClient) (*controlv1.RemoveOperatorResponse, error) {
				return wire(c.RemoveOperator(ctx, connect.NewRequest(req)))
			})
			if err != nil {
				return err
			}
			return a.say(map[string]string{"removed": args[0]}, "operator %s is removed", args[0])
		})
	c.ValidArgsFunction = a.operatorNames
	return c
}
