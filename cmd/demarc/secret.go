// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// secrets is the commands about the vendor's secrets. No value is an argument, which other users of the machine could read,
// and none is ever printed.
func (a *app) secrets() *cobra.Command {
	var from string
	put := a.online(&cobra.Command{Use: "put NAME --from FILE", Short: "Seal a secret in the book, or another value in its place", Args: exactly(1, "the secret's name"),
		Long: "put sends a value to a node over mutual TLS. The node seals it with the kek before anything is stored; no log, entry or answer\n" +
			"has it in the clear, and no command prints it again. A node's file names it, for instance with tailnet_secret.",
		Example: "  demarc control-plane secret put tailnet-oauth --from tailnet-oauth.txt\n  pass show tailnet | demarc control-plane secret put tailnet-oauth --from -"},
		func(ctx context.Context, v *vendor, args []string) error {
			value, err := a.readSecret(from)
			if err != nil {
				return err
			}
			req := &controlv1.PutSecretRequest{RequestId: draw(), Name: args[0], Value: value}
			if _, err := askKeys(ctx, v, func(ctx context.Context, c controlv1connect.KeyServiceClient) (*controlv1.PutSecretResponse, error) {
				return wire(c.PutSecret(ctx, connect.NewRequest(req)))
			}); err != nil {
				return err
			}
			return a.say(map[string]any{"secret": args[0]}, "secret %s is sealed in the book", args[0])
		})
	put.Flags().StringVar(&from, "from", "", "the file that holds the value, or - for standard input")
	put.PreRunE = func(_ *cobra.Command, args []string) error {
		if err := fleet.CheckName("secret", args[0]); err != nil {
			return usage("%s", fault.Text(err))
		}
		if from == "" {
			return usage("name the file that holds the value with --from FILE, or - for standard input")
		}
		return nil
	}
	list := a.online(&cobra.Command{Use: "list", Short: "List the secrets that were put: names, when, by whom", Args: exactly(0, "no arguments"), Example: "  demarc control-plane secret list"},
		func(ctx context.Context, v *vendor, _ []string) error {
			m, err := askKeys(ctx, v, func(ctx context.Context, c controlv1connect.KeyServiceClient) (*controlv1.ListSecretsResponse, error) {
				return wire(c.ListSecrets(ctx, connect.NewRequest(&controlv1.ListSecretsRequest{})))
			})
			if err != nil {
				return err
			}
			return a.emit(m, func(w io.Writer) {
				fmt.Fprintln(w, "SECRET\tSINCE\tBY")
				for _, s := range m.GetSecrets() {
					fmt.Fprintf(w, "%s\t%s\t%s\n", s.GetName(), moment(s.GetSinceUnix()), shortly(s.GetBy()))
				}
			})
		})
	forget := a.online(&cobra.Command{Use: "forget NAME", Short: "Take a secret out of the book", Args: exactly(1, "the secret's name"),
		Long:    "forget takes a secret out of the book. Old log entries, snapshots and backups keep it, sealed: revoke it where it is good, too.",
		Example: "  demarc control-plane secret forget tailnet-oauth"},
		func(ctx context.Context, v *vendor, args []string) error {
			req := &controlv1.ForgetSecretRequest{RequestId: draw(), Name: args[0]}
			if _, err := askKeys(ctx, v, func(ctx context.Context, c controlv1connect.KeyServiceClient) (*controlv1.ForgetSecretResponse, error) {
				return wire(c.ForgetSecret(ctx, connect.NewRequest(req)))
			}); err != nil {
				return err
			}
			return a.say(map[string]string{"forgotten": args[0]}, "secret %s is forgotten", args[0])
		})
	return group("secret", "The vendor's secrets, sealed in the book", put, list, forget)
}

func (a *app) readSecret(from string) ([]byte, error) {
	if from != "-" {
		return readBounded(from, identity.MaxSecret)
	}
	b, err := io.ReadAll(io.LimitReader(a.in, identity.MaxSecret+1))
	if err != nil {
		return nil, fault.Because(err, "demarc.secret", fault.NotFound, "the value can't be read from standard input")
	}
	if len(b) == 0 || len(b) > identity.MaxSecret {
		return nil, usage("a secret has 1 to %d bytes", identity.MaxSecret)
	}
	return b, nil
}
