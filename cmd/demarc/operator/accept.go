// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

func acceptCommand(a *cli.App) *cobra.Command {
	var out string
	c := &cobra.Command{
		Use:   "accept INVITATION --out FILE.yaml",
		Short: "Become an operator by an invitation",
		Args:  cli.Exactly(1, "the invitation's file, or - for standard input"),
		Long: "accept draws your keys here, proves to the control plane that you hold the invitation, and writes your operator's file\n" +
			"with the certificate, readable by you only. No key leaves this machine, and neither does the invitation's secret. The\n" +
			"control plane is recognized by the key that the invitation names. An accept that was cut short continues when it is\n" +
			"run again.",
		Example: "  demarc operator accept ben.invitation --out ~/demarc/ben.yaml",
	}
	c.Flags().StringVar(&out, "out", "", "the operator's file to write; the others go beside it")
	c.RunE = func(c *cobra.Command, args []string) error {
		if out == "" {
			return cli.Usage("name the operator's file with --out FILE.yaml")
		}
		i, err := readInvitation(a, args[0])
		if err != nil {
			return err
		}
		ctx, cancel := a.Bounded(c)
		defer cancel()
		f, err := newFiles(out)
		if err != nil {
			return err
		}
		got, err := f.accept(ctx, i)
		if err != nil {
			return err
		}
		return a.Emit(f.document(i.Name, got), func(w io.Writer) {
			fmt.Fprintf(w, "you are operator %s with the role %s until %s\n  export DEMARC_CONTEXT=%s\n  demarc status\n",
				i.Name, got.role, got.leaf.NotAfter.UTC().Format(time.DateOnly), out)
			f.forCustomers(w, i.Name, got)
		})
	}
	return c
}

func readInvitation(a *cli.App, from string) (identity.Invitation, error) {
	var b []byte
	var err error
	if from == "-" {
		b, err = io.ReadAll(io.LimitReader(a.In, identity.MaxInvitation+1))
	} else {
		b, err = cli.ReadFile(from, identity.MaxInvitation)
	}
	if err != nil {
		return identity.Invitation{}, fault.Because(err, "demarc.invitation", fault.NotFound,
			"the invitation can't be read: name its file, or - for standard input")
	}
	return identity.ParseInvitation(b)
}

// accept proves to the control plane that an invitation is held, and writes the files of the operator.
func (f files) accept(ctx context.Context, i identity.Invitation) (issued, error) {
	invite, err := identity.InviteKey(i.Secret)
	if err != nil {
		return issued{}, err
	}
	key, err := f.key()
	if err != nil {
		return issued{}, err
	}
	csr, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return issued{}, err
	}
	var roots client.SignedBundle
	req := &controlv1.AcceptInvitationRequest{Name: i.Name, Csr: csr, Verifier: invite.Public().(ed25519.PublicKey),
		Proof: identity.SignInvite(invite, i.TrustDomain, i.Name, csr)}
	cp := client.ControlPlane{TrustDomain: i.TrustDomain, Nodes: i.Nodes, LogKey: []byte(i.LogKey)}
	m, err := client.CallAnonymous(ctx, cp, func(ctx context.Context, c client.Anonymous) (*controlv1.AcceptInvitationResponse, error) {
		roots, req.BundleHeld = c.Roots, c.Roots.Number
		return client.Do(ctx, c.AcceptInvitation, req)
	})
	if err != nil {
		if fault.Of(err) == fault.Denied || fault.Of(err) == fault.Expired || fault.Of(err) == fault.Invalid {
			_ = os.Remove(f.path("key")) // it got no certificate and never will
		}
		return issued{}, err
	}
	got, err := checkIssued(m.GetCertificate(), roots, m.GetRole(), key, cp, i.Name)
	if err != nil {
		return issued{}, err
	}
	return got, f.write(cp, i.Name, got)
}
