// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// RecoverCommand is demarc control-plane recover-admin.
func RecoverCommand(a *cli.App) *cobra.Command {
	var config, dir, out string
	c := &cobra.Command{
		Use:   "recover-admin NAME --config NODE.YAML --out FILE.yaml",
		Short: "Become an admin when no admin is left who can call, at a node's own files",
		Args:  cli.Exactly(1, "the admin's name"),
		Long: "recover-admin is for when every admin's certificate has run out or is lost. It reads the kek and the data directory\n" +
			"that a node's file names, on the machine of that node, and proves to the running control plane that it holds both:\n" +
			"neither alone is enough, and neither leaves this machine. The admin is new, or takes the place of the one of that\n" +
			"name, whose certificates are invalid from then on; a banned name stays banned. It is in the audit log as\n" +
			"operator.recover/1. Nodes may run while it is done, and a majority of them must.",
		Example: "  demarc control-plane recover-admin ann --config acme/cp-1/node.yaml --out ann.yaml",
	}
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := fleet.CheckName("operator", args[0]); err != nil {
			return cli.Usage("%s", fault.Text(err))
		}
		if out == "" {
			return cli.Usage("name the operator's file with --out FILE.yaml")
		}
		cfg, err := cli.ReadNode(config, dir)
		if err != nil {
			return err
		}
		with, err := authority.OpenRecoverer(cfg)
		if err != nil {
			return err
		}
		f, err := newFiles(out)
		if err != nil {
			return err
		}
		ctx, cancel := a.Bounded(c)
		defer cancel()
		got, err := f.recover(ctx, with, args[0])
		if err != nil {
			return err
		}
		return a.Emit(f.document(args[0], got), func(w io.Writer) {
			fmt.Fprintf(w, "you are operator %s with the role %s until %s\n  export DEMARC_CONTEXT=%s\n  demarc operator list\n",
				args[0], got.role, got.leaf.NotAfter.UTC().Format(time.DateOnly), out)
		})
	}
	c.Flags().StringVar(&config, "config", "", "the node's file")
	c.Flags().StringVar(&dir, "dir", "", "the node's data directory, in place of that in its file")
	c.Flags().StringVar(&out, "out", "", "the operator's file to write; the others go beside it")
	return c
}

// recover proves to hold the key-encryption key and a node's sealed keys, for a key that is drawn here.
func (f files) recover(ctx context.Context, with authority.Recoverer, name string) (issued, error) {
	key, err := f.key()
	if err != nil {
		return issued{}, err
	}
	csr, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return issued{}, err
	}
	var roots client.SignedBundle
	cp := client.ControlPlane{TrustDomain: with.TrustDomain, Nodes: with.Nodes, LogKey: with.LogKey}
	m, err := client.CallAnonymous(ctx, cp, func(ctx context.Context, c client.Anonymous) (*controlv1.RecoverAdminResponse, error) {
		roots = c.Roots
		fresh, err := client.Do(ctx, c.Challenge, &boundaryv1.ChallengeRequest{})
		if err != nil {
			return nil, err
		}
		what := identity.Recovery{TrustDomain: with.TrustDomain, Name: name, Node: with.Node, Nonce: fresh.GetNonce(), CSR: csr}
		return client.Do(ctx, c.RecoverAdmin, &controlv1.RecoverAdminRequest{
			Name: name, Node: with.Node, Nonce: what.Nonce, Csr: csr, Proof: what.Sign(with.Key), BundleHeld: roots.Number,
		})
	})
	if err != nil {
		return issued{}, err
	}
	got, err := checkIssued(m.GetCertificate(), roots, string(fleet.Admin), key, cp, name)
	if err != nil {
		return issued{}, err
	}
	return got, f.write(cp, name, got)
}
