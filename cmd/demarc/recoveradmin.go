// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

func (a *app) recoverAdmin() *cobra.Command {
	var config, dir, out string
	c := &cobra.Command{Use: "recover-admin NAME --config NODE.YAML --out FILE.yaml", Short: "Become an admin where no admin is left who can call, at a node's own files", Args: exactly(1, "the admin's name"),
		Long: "recover-admin is for when every admin's certificate has run out or is lost. It reads the kek and the data directory that a node's file\n" +
			"names, on the machine of that node, and proves to the running control plane that it holds both: neither alone is enough, and neither\nleaves this machine. " +
			"The admin is new, or takes the place of the one of that name, whose certificates pass no more; a banned name stays\nbanned. It is in the audit log as operator.recover/1. Nodes may run while it is done, and a majority of them must.",
		Example: "  demarc control-plane recover-admin ann --config acme/cp-1/node.yaml --out ann.yaml"}
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := fleet.CheckName("operator", args[0]); err != nil {
			return usage("%s", fault.Text(err))
		}
		if out == "" {
			return usage("name the operator's file with --out FILE.yaml")
		}
		cfg, err := nodeFile(config, dir)
		if err != nil {
			return err
		}
		with, err := authority.OpenRecoverer(cfg)
		if err != nil {
			return err
		}
		d, err := newDesk(out)
		if err != nil {
			return err
		}
		ctx, cancel := a.bounded(c)
		defer cancel()
		got, err := d.recover(ctx, with, args[0])
		if err != nil {
			return err
		}
		return a.emit(d.accepted(args[0], got), func(w io.Writer) {
			fmt.Fprintf(w, "you are operator %s with the role %s until %s\n  export DEMARC_CONTEXT=%s\n  demarc operator list\n", args[0], got.role, got.leaf.NotAfter.UTC().Format(time.DateOnly), out)
		})
	}
	c.Flags().StringVar(&config, "config", "", "the node's file")
	c.Flags().StringVar(&dir, "dir", "", "the node's data directory, in place of that in its file")
	c.Flags().StringVar(&out, "out", "", "the operator's file to write; the others go beside it")
	return c
}

// recover proves to hold the key-encryption key and a node's sealed keys, for a key that is drawn here.
func (d desk) recover(ctx context.Context, with authority.Recoverer, name string) (granted, error) {
	key, err := d.key()
	if err != nil {
		return granted{}, err
	}
	csr, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return granted{}, err
	}
	var held answered
	m, err := asStranger(ctx, with.TrustDomain, with.Nodes, with.LogKey, func(ctx context.Context, c stranger) (*controlv1.RecoverAdminResponse, error) {
		held = c.held
		fresh, err := wire(c.Challenge(ctx, connect.NewRequest(&boundaryv1.ChallengeRequest{})))
		if err != nil {
			return nil, err
		}
		what := identity.Recovery{TrustDomain: with.TrustDomain, Name: name, Node: with.Node, Nonce: fresh.GetNonce(), CSR: csr}
		return wire(c.RecoverAdmin(ctx, connect.NewRequest(&controlv1.RecoverAdminRequest{Name: name, Node: with.Node, Nonce: what.Nonce, Csr: csr, Proof: what.Sign(with.Key), BundleHeld: held.Number})))
	})
	if err != nil {
		return granted{}, err
	}
	got, err := checkGranted(m.GetCertificate(), held, string(fleet.Admin), key, with.TrustDomain, name)
	if err != nil {
		return granted{}, err
	}
	return got, d.write(operator{TrustDomain: with.TrustDomain, Name: name, Nodes: with.Nodes}, got, with.LogKey)
}
