// SPDX-License-Identifier: Apache-2.0

package cluster

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
	"github.com/demarc-dev/demarc/identity"
)

// secretCommand is the commands about the vendor's secrets. No value is an argument, which other users of the machine could read,
// and none is ever printed.
func secretCommand(a *cli.App) *cobra.Command {
	var from string
	put := a.Online(&cobra.Command{
		Use:   "put NAME --from FILE",
		Short: "Seal a secret in the book, or another value in its place",
		Args:  cli.Exactly(1, "the secret's name"),
		Long: "put sends a value to a node over mutual TLS. The node seals it with the kek before anything is stored; no log, entry\n" +
			"or answer has it in the clear, and no command prints it again. A node's file names it, for instance with\n" +
			"tailnet_secret.",
		Example: "  demarc control-plane secret put tailnet-oauth --from tailnet-oauth.txt\n" +
			"  pass show tailnet | demarc control-plane secret put tailnet-oauth --from -",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			value, err := readSecret(a, from)
			if err != nil {
				return err
			}
			req := &controlv1.PutSecretRequest{RequestId: client.NewID(), Name: args[0], Value: value}
			if _, err := client.Call(ctx, v, client.Node.PutSecret, req); err != nil {
				return err
			}
			return a.Say(map[string]any{"secret": args[0]}, "secret %s is sealed in the book", args[0])
		})
	put.Flags().StringVar(&from, "from", "", "the file that holds the value, or - for standard input")
	put.PreRunE = func(_ *cobra.Command, args []string) error {
		if err := fleet.CheckName("secret", args[0]); err != nil {
			return cli.Usage("%s", fault.Text(err))
		}
		if from == "" {
			return cli.Usage("name the file that holds the value with --from FILE, or - for standard input")
		}
		return nil
	}
	list := a.Online(&cobra.Command{
		Use:     "list",
		Short:   "List the secrets that were put: names, when, by whom",
		Args:    cli.Exactly(0, "no arguments"),
		Example: "  demarc control-plane secret list",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			m, err := client.Call(ctx, v, client.Node.ListSecrets, &controlv1.ListSecretsRequest{})
			if err != nil {
				return err
			}
			return a.Emit(m, func(w io.Writer) {
				fmt.Fprintln(w, "SECRET\tSINCE\tBY")
				for _, s := range m.GetSecrets() {
					fmt.Fprintf(w, "%s\t%s\t%s\n", s.GetName(), cli.Minute(s.GetSinceUnix()), cli.Principal(s.GetBy()))
				}
			})
		})
	forget := a.Online(&cobra.Command{
		Use:   "forget NAME",
		Short: "Take a secret out of the book",
		Args:  cli.Exactly(1, "the secret's name"),
		Long: "forget takes a secret out of the book. Old log entries, snapshots and backups keep it, sealed: revoke it wherever it is\n" +
			"valid, too.",
		Example: "  demarc control-plane secret forget tailnet-oauth",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			req := &controlv1.ForgetSecretRequest{RequestId: client.NewID(), Name: args[0]}
			if _, err := client.Call(ctx, v, client.Node.ForgetSecret, req); err != nil {
				return err
			}
			return a.Say(map[string]string{"forgotten": args[0]}, "secret %s is forgotten", args[0])
		})
	return cli.Group("secret", "The vendor's secrets, sealed in the book", put, list, forget)
}

func readSecret(a *cli.App, from string) ([]byte, error) {
	if from != "-" {
		return cli.ReadFile(from, identity.MaxSecret)
	}
	b, err := io.ReadAll(io.LimitReader(a.In, identity.MaxSecret+1))
	if err != nil {
		return nil, fault.Because(err, "demarc.secret", fault.NotFound, "the value can't be read from standard input")
	}
	if len(b) == 0 || len(b) > identity.MaxSecret {
		return nil, cli.Usage("a secret has 1 to %d bytes", identity.MaxSecret)
	}
	return b, nil
}
