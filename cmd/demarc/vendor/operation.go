// SPDX-License-Identifier: Apache-2.0

package vendor

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/cmd/demarc/evidence"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// operationCommand is the vendor's side; the customer's is consent.
func operationCommand(a *cli.App) *cobra.Command {
	var to, file, reason string
	var vars []string
	var valid *time.Duration
	request := a.Online(&cobra.Command{
		Use:   "request",
		Short: "Ask a customer for an operation",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "request signs a request for one operation of the release that runs at an appliance, and sends it. Nothing runs before\n" +
			"the customer has granted the template's tier and approved this very request.",
		Example: "  demarc operation request --appliance eu-1 --template app/operations/state.yaml --var section=summary --reason 'ticket 4711'",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			return requestOperation(ctx, a, v, to, file, reason, vars, *valid)
		})
	f := request.Flags()
	f.StringVar(&to, "appliance", "", "of whom")
	f.StringVar(&file, "template", "", "the template, as it is in the release")
	f.StringVar(&reason, "reason", "", "for the person who approves")
	f.StringArrayVar(&vars, "var", nil, "NAME=VALUE")
	valid = cli.ConsentVar(f, "good-for", cli.ApprovalLife, "how long the request may be approved and begun")

	list := a.Online(&cobra.Command{
		Use:   "list",
		Short: "List the operations asked of an appliance",
		Args:  cli.Exactly(0, "no arguments"),
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			all, err := operations(ctx, v, to, "")
			if err != nil {
				return err
			}
			return a.Emit(all, func(w io.Writer) {
				fmt.Fprintln(w, "ID\tSTATE\tREASON")
				for _, o := range all {
					fmt.Fprintf(w, "%s\t%s\t%s\n", o.GetId(), o.GetState(), outcome(o))
				}
			})
		})
	list.Flags().StringVar(&to, "appliance", "", "of whom")
	show := a.Online(&cobra.Command{
		Use:   "show ID",
		Short: "Show the state of an operation, and why",
		Args:  cli.Exactly(1, "the operation's id"),
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			o, err := oneOperation(ctx, v, to, args[0])
			if err != nil {
				return err
			}
			return a.Emit(o, func(w io.Writer) { fmt.Fprintf(w, "%s\t%s\t%s\n", o.GetId(), o.GetState(), outcome(o)) })
		})
	show.Flags().StringVar(&to, "appliance", "", "of whom")
	var out outputFlags
	output := a.Online(&cobra.Command{
		Use:   "output ID",
		Short: "Read the output that the customer released",
		Args:  cli.Exactly(1, "the operation's id"),
		Long: "output verifies the documents of the operation before it shows anything: your request, by your own key, and the\n" +
			"result, by the key that the appliance enrolled with. With the customer's key, which the customer hands you in person,\n" +
			"it verifies the approval and the release too.",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			return readOutput(ctx, a, v, out, args[0])
		})
	output.Flags().StringVar(&out.to, "appliance", "", "of whom")
	output.Flags().StringVar(&out.appliance, "appliance-key", "",
		"FILE: public key of the appliance's log, by default the one that it enrolled with")
	output.Flags().StringArrayVar(&out.customers, "customer-key", nil,
		"FILE: public key of the customer, who approves and releases; repeat for each")
	for _, c := range []*cobra.Command{request, list, show, output} {
		c.PreRunE = func(c *cobra.Command, _ []string) error {
			if c.Flag("appliance").Value.String() == "" {
				return cli.Usage("name the appliance with --appliance NAME")
			}
			return nil
		}
	}
	return cli.Group("operation", "Operations that the vendor asks for", request, list, show, output)
}

func requestOperation(ctx context.Context, a *cli.App, v *client.Client, to, file, reason string, vars []string,
	valid time.Duration) error {
	const op = "demarc.request"
	b, err := os.ReadFile(file)
	if err != nil {
		return cli.Usage("--template: %v", err)
	}
	t, err := operation.ParseTemplate(b)
	if err != nil {
		return err
	}
	values := map[string]string{}
	for _, s := range vars {
		k, val, ok := strings.Cut(s, "=")
		if !ok {
			return cli.Usage("--var %q: write NAME=VALUE", s)
		}
		if _, twice := values[k]; twice {
			return cli.Usage("--var %s is set twice", k)
		}
		values[k] = val
	}
	argv, err := t.Argv(values)
	if err != nil {
		return err
	}
	x, err := appliance(ctx, v, to)
	if err != nil {
		return err
	}
	if x.GetRelease() == "" {
		return fault.New(op, fault.Conflict, "nothing runs on appliance %q yet: an operation needs a release", to)
	}
	key, err := v.RequestSigner()
	if err != nil {
		return err
	}
	id, err := v.Recipient()
	if err != nil {
		return err
	}
	now := time.Now().UTC()
	r := operation.Request{
		ID: "op-" + client.NewID()[:12], Appliance: fleet.ApplianceID(to), Operator: fleet.PrincipalOf(v.TrustDomain, fleet.Operator, v.Name),
		Template: t.Name, TemplateDigest: t.Digest(), Release: fleet.Digest(x.GetRelease()), Vars: values, Reason: reason,
		Recipient: id.Recipient().String(), At: now, NotAfter: now.Add(valid), Nonce: client.NewID(),
	}
	if err := r.Check(); err != nil {
		return err
	}
	sealed, err := seal.Seal(r, key)
	if err != nil {
		return err
	}
	m, err := client.Call(ctx, v, client.Node.RequestOperation,
		&controlv1.RequestOperationRequest{RequestId: client.NewID(), Appliance: to, Request: sealed})
	if err != nil {
		return err
	}
	return a.Say(m, "asked for %q as %s; the customer decides (they type: demarc consent approve %s)", argv, m.GetId(), m.GetId())
}

func operations(ctx context.Context, v *client.Client, to, id string) ([]*controlv1.Operation, error) {
	m, err := client.Call(ctx, v, client.Node.ListOperations, &controlv1.ListOperationsRequest{Appliance: to, Id: id})
	return m.GetOperations(), err
}

func oneOperation(ctx context.Context, v *client.Client, to, id string) (*controlv1.Operation, error) {
	all, err := operations(ctx, v, to, id)
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, fault.New("demarc.operation", fault.NotFound, "no operation %q was asked of appliance %q", id, to)
	}
	return all[0], nil
}

// outputFlags are the keys by which an operator verifies an operation's documents.
type outputFlags struct {
	to, appliance string
	customers     []string
}

func readOutput(ctx context.Context, a *cli.App, v *client.Client, f outputFlags, id string) error {
	o, err := oneOperation(ctx, v, f.to, id)
	if err != nil {
		return err
	}
	if len(o.GetOutput()) == 0 {
		return fault.New("demarc.output", fault.Denied, "the customer has not released the output of %s: it is %s %s", id, o.GetState(),
			outcome(o))
	}
	k, err := outputKeys(ctx, v, f)
	if err != nil {
		return err
	}
	c, err := evidence.Verify(o.GetRequest(), o.GetStatements(), k)
	if err != nil {
		return err
	}
	if c.Request.ID != id || string(c.Request.Appliance) != f.to {
		return fault.New("demarc.output", fault.Denied, "the documents are of operation %s of appliance %s", c.Request.ID, c.Request.Appliance)
	}
	key, err := v.Recipient()
	if err != nil {
		return err
	}
	out, err := evidence.Open(o.GetOutput(), c, key)
	if err != nil {
		return err
	}
	if k.CustomerUnknown {
		fmt.Fprintln(a.Errs, "the approval and the release were not compared with the customer's key: give it with --customer-key FILE")
	}
	return evidence.Print(a, out, *c.Result)
}

// outputKeys are the operator's own key, which the request must bear, the appliance's, from a flag or as it was enrolled, and the
// customer's if flags name them.
func outputKeys(ctx context.Context, v *client.Client, f outputFlags) (operation.Keys, error) {
	requests, err := v.RequestSigner()
	if err != nil {
		return operation.Keys{}, err
	}
	own, err := seal.KeyOf(requests.Public())
	if err != nil {
		return operation.Keys{}, err
	}
	k := operation.Keys{Operators: []seal.Key{own}, CustomerUnknown: len(f.customers) == 0}
	for _, file := range f.customers {
		c, err := cli.ReadKey(file)
		if err != nil {
			return k, err
		}
		k.Customers = append(k.Customers, c)
	}
	var its seal.Key
	if f.appliance != "" {
		its, err = cli.ReadKey(f.appliance)
	} else {
		x, e := appliance(ctx, v, f.to)
		if e != nil {
			return k, e
		}
		its, err = seal.ParseKey(x.GetLogKey())
	}
	k.Appliance = []seal.Key{its}
	return k, err
}
