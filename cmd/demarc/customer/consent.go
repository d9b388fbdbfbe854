// SPDX-License-Identifier: Apache-2.0

package customer

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/cmd/demarc/evidence"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// consentCommand is the customer's side of operations.
func consentCommand(a *cli.App) *cobra.Command {
	list := a.Local(&cobra.Command{
		Use:   "list",
		Short: "List what the vendor asked for",
		Args:  cli.Exactly(0, "no arguments"),
	},
		func(ctx context.Context, l localv1connect.LocalClient, _ []string) error {
			m, err := client.Do(ctx, l.ListOperations, &localv1.ListOperationsRequest{})
			if err != nil {
				return err
			}
			return a.Emit(m, func(w io.Writer) {
				fmt.Fprintln(w, "ID\tSTATE\tCOMMAND\tREASON")
				for _, o := range m.GetOperations() {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", o.GetId(), o.GetState(), strings.Join(o.GetArgv(), " "), o.GetReason())
				}
			})
		})
	show := a.Local(&cobra.Command{
		Use:   "show ID",
		Short: "Show the request, its operator and reason, and exactly what would run",
		Args:  cli.Exactly(1, "the operation's id"),
	},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			o, r, err := findRequest(ctx, l, args[0])
			if err != nil {
				return err
			}
			return a.Emit(o, func(w io.Writer) {
				printRequest(w, o, r)
			})
		})
	return cli.Group("consent", "What the vendor asked for, and the customer decides", list, show,
		decideCommand(a, operation.DecisionApprove, "Let an operation run, once"),
		decideCommand(a, operation.DecisionReject, "Refuse an operation"),
		outputCommand(a),
		releaseCommand(a, operation.DecisionRelease, "Let the output of an operation out, to the operator who asked"),
		releaseCommand(a, operation.DecisionWithhold, "Keep the output of an operation in"),
		cancelCommand(a))
}

// printRequest prints all that a person needs to see before approving.
func printRequest(w io.Writer, o *localv1.Operation, r operation.Request) {
	effects := "none is declared: it reads its own files"
	if len(o.GetEffects()) > 0 {
		effects = strings.Join(o.GetEffects(), "; ")
	}
	if o.GetAbout() == "" {
		effects = "not known: the release that carries the template is not here any more"
	}
	fmt.Fprintf(w, "operation\t%s, %s\nasked by\t%s at %s\nreason\t%s\ntemplate\t%s: %s\n", o.GetId(), o.GetState(), r.Operator,
		r.At.Format(time.RFC3339), r.Reason, r.Template, o.GetAbout())
	fmt.Fprintf(w, "command\t%q\nin service\t%s\nneeds\t%s\neffects\t%s\nmay take\t%s\n", o.GetArgv(), o.GetService(), o.GetTier(), effects,
		time.Duration(o.GetLimitSeconds())*time.Second)
	fmt.Fprintf(w, "output to\t%s, if you release it\ngood until\t%s\n", r.Recipient, r.NotAfter.Format(time.RFC3339))
}

// findRequest finds one operation and its request. The appliance checked the request's signature when it came in.
func findRequest(ctx context.Context, l localv1connect.LocalClient, id string) (*localv1.Operation, operation.Request, error) {
	m, err := findOperation(ctx, l, id)
	if err != nil {
		return nil, operation.Request{}, err
	}
	o := m.GetOperations()[0]
	if len(o.GetRequest()) == 0 {
		return nil, operation.Request{}, fault.New("demarc.consent", fault.Conflict,
			"operation %q was refused before it was shown to anyone: %s", id, o.GetReason())
	}
	r, err := seal.Peek[operation.Request](o.GetRequest())
	return o, r, err
}

// findOperation gets exactly one, with the keys by which its statements are verified.
func findOperation(ctx context.Context, l localv1connect.LocalClient, id string) (*localv1.ListOperationsResponse, error) {
	m, err := client.Do(ctx, l.ListOperations, &localv1.ListOperationsRequest{Id: id})
	if err == nil && len(m.GetOperations()) != 1 {
		return nil, fault.New("demarc.consent", fault.NotFound, "no operation %q: demarc consent list", id)
	}
	return m, err
}

// keysOf reads the keys of an answer, by party. The customer's own key is among them, or the appliance lies about the party that decides.
func keysOf(m *localv1.ListOperationsResponse) (operation.Keys, error) {
	var k operation.Keys
	for _, party := range []struct {
		to  *[]seal.Key
		pem [][]byte
	}{{&k.Operators, m.GetOperatorKeys()}, {&k.Customers, m.GetCustomerKeys()}, {&k.Appliance, [][]byte{m.GetLogKey()}}} {
		for _, pem := range party.pem {
			key, err := seal.ParseKey(pem)
			if err != nil {
				return k, err
			}
			*party.to = append(*party.to, key)
		}
	}
	return k, nil
}

func decideCommand(a *cli.App, decision, short string) *cobra.Command {
	var reason string
	var valid *time.Duration
	var k keyFlags
	c := a.Local(&cobra.Command{
		Use:   decision + " ID",
		Short: short,
		Args:  cli.Exactly(1, "the operation's id"),
		Example: "  demarc consent " +
			decision +
			" op-1 --key globex.key",
	},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			o, r, err := findRequest(ctx, l, args[0])
			if err != nil {
				return err
			}
			signer, err := k.signer(a)
			if err != nil {
				return err
			}
			doc := operation.Approval{ID: o.GetId(), Appliance: r.Appliance, Request: fleet.DigestOf(o.GetRequest()), Decision: decision,
				Reason: reason, At: time.Now().UTC(), Nonce: client.NewID()}
			if decision == operation.DecisionApprove {
				doc.Argv, doc.NotAfter = o.GetArgv(), doc.At.Add(*valid)
			}
			m, err := send(ctx, l, doc, signer, nil)
			if err != nil {
				return err
			}
			return a.Say(m, "%s: %s %q", decision, o.GetId(), o.GetArgv())
		})
	c.Flags().StringVar(&reason, "reason", "", "for the vendor")
	if decision == operation.DecisionApprove {
		valid = cli.ConsentVar(c.Flags(), "good-for", cli.ApprovalLife, "within which it must begin")
	}
	k.add(c.Flags())
	return c
}

// openOutput opens the output of an operation that waits for the customer, once its documents are verified.
func openOutput(ctx context.Context, a *cli.App, l localv1connect.LocalClient, id string, k *keyFlags) (operation.Output, operation.Chain,
	[]byte, error) {
	fail := func(err error) (operation.Output, operation.Chain, []byte, error) {
		return operation.Output{}, operation.Chain{}, nil, err
	}
	m, err := findOperation(ctx, l, id)
	if err != nil {
		return fail(err)
	}
	o := m.GetOperations()[0]
	sealed := evidence.Statement(o.GetStatements(), operation.TypeResult)
	if sealed == nil || len(o.GetOutput()) == 0 {
		return fail(fault.New("demarc.consent", fault.Conflict, "operation %s is %s: there is no output", id, o.GetState()))
	}
	keys, err := keysOf(m)
	if err != nil {
		return fail(err)
	}
	c, err := evidence.Verify(o.GetRequest(), o.GetStatements(), keys)
	if err != nil {
		return fail(err)
	}
	if c.Request.ID != id {
		return fail(fault.New("demarc.consent", fault.Denied, "the documents are of operation %s", c.Request.ID))
	}
	key, err := k.reader(a)
	if err != nil {
		return fail(err)
	}
	out, err := evidence.Open(o.GetOutput(), c, key)
	return out, c, sealed, err
}

func outputCommand(a *cli.App) *cobra.Command {
	var k keyFlags
	c := a.Local(&cobra.Command{
		Use:   "output ID",
		Short: "Read the output of an operation before anyone else does",
		Args:  cli.Exactly(1, "the operation's id"),
	},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			out, c, _, err := openOutput(ctx, a, l, args[0], &k)
			if err != nil {
				return err
			}
			return evidence.Print(a, out, *c.Result)
		})
	k.add(c.Flags())
	return c
}

func releaseCommand(a *cli.App, decision, short string) *cobra.Command {
	var reason string
	var k keyFlags
	c := a.Local(&cobra.Command{
		Use:   decision + " ID",
		Short: short,
		Args:  cli.Exactly(1, "the operation's id"),
		Long: short +
			".\n\n" +
			"The output is opened here, compared with what the appliance signed for, and encrypted anew to the operator who asked:\n" +
			"neither the appliance nor the control plane sees it in clear.",
		Example: "  demarc consent " +
			decision +
			" op-1 --key globex.key",
	},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			out, c, sealed, err := openOutput(ctx, a, l, args[0], &k)
			if err != nil {
				return err
			}
			signer, err := k.signer(a)
			if err != nil {
				return err
			}
			doc := operation.Release{ID: c.Request.ID, Appliance: c.Request.Appliance, Result: fleet.DigestOf(sealed), Decision: decision,
				Reason: reason, At: time.Now().UTC(), Nonce: client.NewID()}
			var hidden []byte
			if decision == operation.DecisionRelease {
				if hidden, err = encryptTo(c.Request.Recipient, out.Encode()); err != nil {
					return err
				}
				doc.Output = fleet.DigestOf(hidden)
			}
			m, err := send(ctx, l, doc, signer, hidden)
			if err != nil {
				return err
			}
			return a.Say(m, "%s: the output of %s, %d bytes", decision, c.Request.ID, len(out.Stdout)+len(out.Stderr))
		})
	c.Flags().StringVar(&reason, "reason", "", "for the vendor")
	k.add(c.Flags())
	return c
}

func encryptTo(recipient string, plain []byte) ([]byte, error) {
	const op = "demarc.encrypt"
	to, err := age.ParseX25519Recipient(recipient)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the request names no age recipient for its output")
	}
	var b bytes.Buffer
	w, err := age.Encrypt(&b, to)
	if err == nil {
		_, err = w.Write(plain)
	}
	if err == nil {
		err = w.Close()
	}
	return b.Bytes(), fault.At(op, fault.Internal, err)
}

func cancelCommand(a *cli.App) *cobra.Command {
	var k keyFlags
	c := a.Local(&cobra.Command{
		Use:   "cancel ID",
		Short: "Call an operation off, and kill it if it runs",
		Args:  cli.Exactly(1, "the operation's id"),
	},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			o, r, err := findRequest(ctx, l, args[0])
			if err != nil {
				return err
			}
			signer, err := k.signer(a)
			if err != nil {
				return err
			}
			m, err := send(ctx, l, operation.Cancel{ID: o.GetId(), Appliance: r.Appliance, Request: fleet.DigestOf(o.GetRequest()),
				At: time.Now().UTC(), Nonce: client.NewID()}, signer, nil)
			if err != nil {
				return err
			}
			return a.Say(m, "%s is cancelled", o.GetId())
		})
	k.add(c.Flags())
	return c
}
