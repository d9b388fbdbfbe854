// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"
	"filippo.io/age"
	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// operation is the vendor's side; the customer's is consent.
func (a *app) operation() *cobra.Command {
	var to, file, reason string
	var vars []string
	var good *time.Duration
	request := a.online(&cobra.Command{Use: "request", Short: "Ask a customer for an operation", Args: exactly(0, "no arguments"),
		Long:    "request signs a request for one operation of the release that runs at an appliance, and sends it. Nothing runs before the customer has\ngranted the template's tier and approved this very request.",
		Example: "  demarc operation request --appliance eu-1 --template app/operations/state.yaml --var section=summary --reason 'ticket 4711'"},
		func(ctx context.Context, v *vendor, _ []string) error {
			return a.requestOperation(ctx, v, to, file, reason, vars, *good)
		})
	f := request.Flags()
	f.StringVar(&to, "appliance", "", "of whom")
	f.StringVar(&file, "template", "", "the template, as it is in the release")
	f.StringVar(&reason, "reason", "", "for the person who approves")
	f.StringArrayVar(&vars, "var", nil, "NAME=VALUE")
	good = consentVar(f, "good-for", approvalLife, "how long the request may be approved and begun")

	list := a.online(&cobra.Command{Use: "list", Short: "List the operations asked of an appliance", Args: exactly(0, "no arguments")},
		func(ctx context.Context, v *vendor, _ []string) error {
			all, err := v.operations(ctx, to, "")
			if err != nil {
				return err
			}
			return a.emit(all, func(w io.Writer) {
				fmt.Fprintln(w, "ID\tSTATE\tREASON")
				for _, o := range all {
					fmt.Fprintf(w, "%s\t%s\t%s\n", o.GetId(), o.GetState(), became(o))
				}
			})
		})
	list.Flags().StringVar(&to, "appliance", "", "of whom")
	show := a.online(&cobra.Command{Use: "show ID", Short: "Show what became of an operation", Args: exactly(1, "the operation's id")},
		func(ctx context.Context, v *vendor, args []string) error {
			o, err := v.oneOperation(ctx, to, args[0])
			if err != nil {
				return err
			}
			return a.emit(o, func(w io.Writer) { fmt.Fprintf(w, "%s\t%s\t%s\n", o.GetId(), o.GetState(), became(o)) })
		})
	show.Flags().StringVar(&to, "appliance", "", "of whom")
	var out outputFlags
	output := a.online(&cobra.Command{Use: "output ID", Short: "Read the output that the customer released", Args: exactly(1, "the operation's id"),
		Long: "output verifies the documents of the operation before it shows anything: your request, by your own key, and the result, by the key that the\nappliance enrolled with. With the customer's key, which the customer gives you in person, it verifies the approval and the release too."},
		func(ctx context.Context, v *vendor, args []string) error { return a.readOutput(ctx, v, out, args[0]) })
	output.Flags().StringVar(&out.to, "appliance", "", "of whom")
	output.Flags().StringVar(&out.appliance, "appliance-key", "", "FILE: public key of the appliance's log, by default the one that it enrolled with")
	output.Flags().StringArrayVar(&out.customers, "customer-key", nil, "FILE: public key of the customer, who approves and releases; repeat for each")
	return group("operation", "Operations that the vendor asks for", request, list, show, output)
}

func (a *app) requestOperation(ctx context.Context, v *vendor, to, file, reason string, vars []string, good time.Duration) error {
	const op = "demarc.request"
	b, err := os.ReadFile(file)
	if err != nil {
		return usage("--template: %v", err)
	}
	t, err := operation.ParseTemplate(b)
	if err != nil {
		return err
	}
	values := map[string]string{}
	for _, s := range vars {
		k, val, ok := strings.Cut(s, "=")
		if !ok {
			return usage("--var %q: write NAME=VALUE", s)
		}
		values[k] = val
	}
	argv, err := t.Argv(values)
	if err != nil {
		return err
	}
	x, err := v.appliance(ctx, to)
	if err != nil {
		return err
	}
	if x.GetRelease() == "" {
		return fault.New(op, fault.Conflict, "nothing runs on appliance %q yet: an operation needs a release", to)
	}
	key, err := signer("request_key", v.RequestKey)
	if err != nil {
		return err
	}
	id, err := v.recipient()
	if err != nil {
		return err
	}
	now := time.Now().UTC()
	r := operation.Request{ID: "op-" + draw()[:12], Appliance: fleet.ApplianceID(to), Operator: fleet.PrincipalOf(v.TrustDomain, fleet.Operator, v.Name), Template: t.Name,
		TemplateDigest: t.Digest(), Release: fleet.Digest(x.GetRelease()), Vars: values, Reason: reason, Recipient: id.Recipient().String(), At: now, NotAfter: now.Add(good), Nonce: draw()}
	if err := r.Check(); err != nil {
		return err
	}
	sealed, err := seal.Seal(r, key)
	if err != nil {
		return err
	}
	req := draw()
	m, err := ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.RequestOperationResponse, error) {
		return wire(c.RequestOperation(ctx, connect.NewRequest(&controlv1.RequestOperationRequest{RequestId: req, Appliance: to, Request: sealed})))
	})
	if err != nil {
		return err
	}
	return a.say(m, "asked for %q as %s; the customer decides (they type: demarc consent approve %s)", argv, m.GetId(), m.GetId())
}

// recipient reads the key that opens released output.
func (o operator) recipient() (*age.X25519Identity, error) {
	const op = "demarc.recipient"
	b, err := os.ReadFile(o.RecipientKey)
	if err != nil {
		return nil, fault.Because(err, op, fault.NotFound, "recipient_key can't be read: %s", o.RecipientKey)
	}
	id, err := age.ParseX25519Identity(strings.TrimSpace(string(b)))
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "%s holds no age key", o.RecipientKey)
	}
	return id, nil
}

func (v *vendor) operations(ctx context.Context, to, id string) ([]*controlv1.Operation, error) {
	m, err := ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.ListOperationsResponse, error) {
		return wire(c.ListOperations(ctx, connect.NewRequest(&controlv1.ListOperationsRequest{Appliance: to, Id: id})))
	})
	return m.GetOperations(), err
}

func (v *vendor) oneOperation(ctx context.Context, to, id string) (*controlv1.Operation, error) {
	all, err := v.operations(ctx, to, id)
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, fault.New("demarc.operation", fault.NotFound, "no operation %q was asked of appliance %q", id, to)
	}
	return all[0], nil
}

// statement finds one of a kind among sealed statements.
func statement(all [][]byte, kind string) []byte {
	for _, s := range all {
		if k, err := operation.Kind(s); err == nil && k == kind {
			return s
		}
	}
	return nil
}

// chain verifies the statements of an operation up to the one that is wanted, before anything of its output is opened.
func chain(request []byte, statements [][]byte, k operation.Keys) (operation.Chain, error) {
	c, err := operation.VerifyChain(request, statement(statements, operation.TypeApproval), statement(statements, operation.TypeResult),
		statement(statements, operation.TypeRelease), k)
	if err != nil {
		return c, fault.Because(err, "demarc.chain", fault.Denied, "the documents of the operation can't be trusted, nothing is shown: %s", fault.Text(err))
	}
	if c.Result == nil {
		return c, fault.New("demarc.chain", fault.Conflict, "operation %s is %s: it has no result", c.Request.ID, c.State)
	}
	return c, nil
}

// opened decrypts an output and compares it with what the appliance signed for in the result of a verified chain.
func opened(hidden []byte, c operation.Chain, id age.Identity) (operation.Output, error) {
	const op = "demarc.output"
	r, err := age.Decrypt(bytes.NewReader(hidden), id)
	if err != nil {
		return operation.Output{}, fault.Because(err, op, fault.Denied, "the output is not encrypted to this key, or damaged")
	}
	plain, err := io.ReadAll(io.LimitReader(r, 8<<20))
	if err != nil {
		return operation.Output{}, fault.At(op, fault.Denied, err)
	}
	if c.Release != nil {
		return operation.VerifyOutput(c, hidden, plain)
	}
	out, err := operation.ParseOutput(plain)
	if err != nil {
		return out, err
	}
	if err := out.Matches(*c.Result); err != nil {
		return operation.Output{}, err
	}
	return out, nil
}

// outputFlags are the keys by which an operator verifies an operation's documents.
type outputFlags struct {
	to, appliance string
	customers     []string
}

func (a *app) readOutput(ctx context.Context, v *vendor, f outputFlags, id string) error {
	o, err := v.oneOperation(ctx, f.to, id)
	if err != nil {
		return err
	}
	if len(o.GetOutput()) == 0 {
		return fault.New("demarc.output", fault.Denied, "the customer has not released the output of %s: it is %s %s", id, o.GetState(), became(o))
	}
	k, err := v.outputKeys(ctx, f)
	if err != nil {
		return err
	}
	c, err := chain(o.GetRequest(), o.GetStatements(), k)
	if err != nil {
		return err
	}
	if c.Request.ID != id || string(c.Request.Appliance) != f.to {
		return fault.New("demarc.output", fault.Denied, "the documents are of operation %s of appliance %s", c.Request.ID, c.Request.Appliance)
	}
	key, err := v.recipient()
	if err != nil {
		return err
	}
	out, err := opened(o.GetOutput(), c, key)
	if err != nil {
		return err
	}
	if k.CustomerUnknown {
		fmt.Fprintln(a.errs, "the approval and the release were not compared with the customer's key: give it with --customer-key FILE")
	}
	return a.printOutput(out, *c.Result)
}

// outputKeys are the operator's own key, which the request must bear, the appliance's, given or as it was enrolled, and the
// customer's where they are given.
func (v *vendor) outputKeys(ctx context.Context, f outputFlags) (operation.Keys, error) {
	requests, err := signer("request_key", v.RequestKey)
	if err != nil {
		return operation.Keys{}, err
	}
	own, err := seal.KeyOf(requests.Public())
	if err != nil {
		return operation.Keys{}, err
	}
	k := operation.Keys{Operators: []seal.Key{own}, CustomerUnknown: len(f.customers) == 0}
	for _, file := range f.customers {
		c, err := publicKey(file)
		if err != nil {
			return k, err
		}
		k.Customers = append(k.Customers, c)
	}
	var its seal.Key
	if f.appliance != "" {
		its, err = publicKey(f.appliance)
	} else {
		x, e := v.appliance(ctx, f.to)
		if e != nil {
			return k, e
		}
		its, err = seal.ParseKey(x.GetLogKey())
	}
	k.Appliance = []seal.Key{its}
	return k, err
}

func (a *app) printOutput(out operation.Output, res operation.Result) error {
	doc := map[string]any{"id": res.ID, "exit": res.Exit, "stdout": string(out.Stdout), "stderr": string(out.Stderr), "truncated": out.Truncated, "argv": res.Argv}
	return a.emit(doc, func(w io.Writer) {
		fmt.Fprintf(w, "%s", out.Stdout)
		if len(out.Stderr) > 0 {
			fmt.Fprintf(w, "stderr: %s", out.Stderr)
		}
		if res.Exit != 0 || out.Truncated {
			fmt.Fprintf(w, "exit %d, truncated %v\n", res.Exit, out.Truncated)
		}
	})
}
