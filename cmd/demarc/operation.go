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
					fmt.Fprintf(w, "%s\t%s\t%s\n", o.GetId(), o.GetState(), o.GetReason())
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
			return a.emit(o, func(w io.Writer) { fmt.Fprintf(w, "%s\t%s\t%s\n", o.GetId(), o.GetState(), o.GetReason()) })
		})
	show.Flags().StringVar(&to, "appliance", "", "of whom")
	output := a.online(&cobra.Command{Use: "output ID", Short: "Read the output that the customer released", Args: exactly(1, "the operation's id")},
		func(ctx context.Context, v *vendor, args []string) error { return a.readOutput(ctx, v, to, args[0]) })
	output.Flags().StringVar(&to, "appliance", "", "of whom")
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

// opened decrypts an output and compares it with what the appliance signed for.
func opened(hidden, sealedResult []byte, id age.Identity) (operation.Output, operation.Result, error) {
	const op = "demarc.output"
	res, err := seal.Peek[operation.Result](sealedResult)
	if err != nil {
		return operation.Output{}, res, err
	}
	r, err := age.Decrypt(bytes.NewReader(hidden), id)
	if err != nil {
		return operation.Output{}, res, fault.Because(err, op, fault.Denied, "the output is not encrypted to this key, or damaged")
	}
	plain, err := io.ReadAll(io.LimitReader(r, 8<<20))
	if err != nil {
		return operation.Output{}, res, fault.At(op, fault.Invalid, err)
	}
	out, err := operation.ParseOutput(plain)
	if err != nil {
		return out, res, err
	}
	return out, res, out.Matches(res)
}

func (a *app) readOutput(ctx context.Context, v *vendor, to, id string) error {
	o, err := v.oneOperation(ctx, to, id)
	if err != nil {
		return err
	}
	if len(o.GetOutput()) == 0 {
		return fault.New("demarc.output", fault.Denied, "the customer has not released the output of %s: it is %s %s", id, o.GetState(), o.GetReason())
	}
	key, err := v.recipient()
	if err != nil {
		return err
	}
	out, res, err := opened(o.GetOutput(), statement(o.GetStatements(), operation.TypeResult), key)
	if err != nil {
		return err
	}
	return a.printOutput(out, res)
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
