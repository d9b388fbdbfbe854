// SPDX-License-Identifier: Apache-2.0

// Package customer is the commands of a customer: keys, consent, grants, and everything else about the customer's own appliance.
package customer

import (
	"context"
	"crypto"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// Commands are the commands of this package.
func Commands(a *cli.App) []*cobra.Command {
	return append([]*cobra.Command{keyCommand(a), secretCommand(a), localCommand(a), consentCommand(a)}, verbs(a)...)
}

// localCommand holds everything that a customer tells the appliance.
func localCommand(a *cli.App) *cobra.Command {
	g := cli.Group("local", "The customer's own appliance: everything that the vendor can't call",
		statusCommand(a), pinCommand(a), logCommand(a), evidenceCommand(a))
	g.AddCommand(verbs(a)...)
	return g
}

// verbs are the commands that are there both at the top and under local.
func verbs(a *cli.App) []*cobra.Command {
	return []*cobra.Command{
		reviewCommand(a), approveCommand(a), grantCommand(a), revokeCommand(a), accessCommand(a), postureCommand(a), transportCommand(a),
	}
}

// applianceName returns the appliance's name: documents are bound to it.
func applianceName(ctx context.Context, l localv1connect.LocalClient) (fleet.ApplianceID, error) {
	m, err := client.Do(ctx, l.Status, &localv1.StatusRequest{})
	return fleet.ApplianceID(m.GetAppliance()), err
}

func pinCommand(a *cli.App) *cobra.Command {
	var recipient, with string
	var k keyFlags
	c := a.Local(&cobra.Command{
		Use:   "pin FILE.pub",
		Short: "Pin a key of the customer on the appliance",
		Args:  cli.Exactly(1, "the file of a public key"),
		Long: "The first key is pinned by whoever may open the appliance's socket. Each later one needs the signature of a pinned one\n" +
			"(--endorse-with).",
		Example: "  demarc local pin globex.key.pub --recipient-file globex.key.recipient",
	},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			pem, err := cli.ReadFile(args[0], cli.MaxKeyFile)
			if err != nil {
				return err
			}
			if seal.LooksReadable(pem) {
				return fault.New("demarc.pin", fault.Denied, "%s is a private key that anyone can read: pin the .pub file, and keep the key encrypted",
					args[0])
			}
			req := &localv1.PinRequest{RequestId: client.NewID(), PublicKey: pem}
			if recipient != "" {
				b, err := cli.ReadFile(recipient, 1<<10)
				if err != nil {
					return err
				}
				req.Recipient = strings.TrimSpace(string(b))
			}
			if with != "" {
				if req.Endorsement, err = endorse(ctx, a, l, pem, with, k); err != nil {
					return err
				}
			}
			m, err := client.Do(ctx, l.Pin, req)
			if err != nil {
				return err
			}
			return a.Say(m, "key %s is pinned", m.GetKeyId())
		})
	c.Flags().StringVar(&recipient, "recipient-file", "", "whom output is encrypted to")
	c.Flags().StringVar(&with, "endorse-with", "", "a key that is pinned already")
	k.addPassphrase(c.Flags())
	return c
}

// endorse signs with one key that another key may be pinned.
func endorse(ctx context.Context, a *cli.App, l localv1connect.LocalClient, pem []byte, with string, k keyFlags) ([]byte, error) {
	k.file = with
	signer, err := k.signer(a)
	if err != nil {
		return nil, err
	}
	next, err := seal.ParseKey(pem)
	if err != nil {
		return nil, err
	}
	name, err := applianceName(ctx, l)
	if err != nil {
		return nil, err
	}
	return seal.Seal(operation.Endorsement{Appliance: name, Key: next.ID}, signer)
}

// send signs a document and submits it.
func send[T interface {
	seal.Body
	Check() error
}](ctx context.Context, l localv1connect.LocalClient, doc T, by crypto.Signer, output []byte) (*localv1.SubmitResponse, error) {
	if err := doc.Check(); err != nil {
		return nil, err
	}
	sealed, err := seal.Seal(doc, by)
	if err != nil {
		return nil, err
	}
	return client.Do(ctx, l.Submit, &localv1.SubmitRequest{RequestId: client.NewID(), Document: sealed, Output: output})
}

var exposures = []string{"closed", "private", "allowlist", "public"}

func postureCommand(a *cli.App) *cobra.Command {
	var allow []string
	show := a.Local(&cobra.Command{
		Use:   "show",
		Short: "Show which doors for end users are open, and why others are shut",
		Args:  cli.Exactly(0, "no arguments"),
	},
		func(ctx context.Context, l localv1connect.LocalClient, _ []string) error {
			m, err := client.Do(ctx, l.GetPosture, &localv1.GetPostureRequest{})
			if err != nil {
				return err
			}
			return a.Emit(m, func(w io.Writer) {
				fmt.Fprintf(w, "posture\t%s %s\n", m.GetExposure(), strings.Join(m.GetAllow(), " "))
				for _, d := range m.GetDoors() {
					fmt.Fprintf(w, "door\t%s\ton %s at %s\tfrom %s\ttls %s\tto %s\n", d.GetName(), d.GetSide(), d.GetAddress(),
						strings.Join(d.GetFrom(), " "), d.GetTls(), d.GetTo())
				}
				for _, s := range m.GetShut() {
					fmt.Fprintf(w, "shut\t%s\t%s\n", s.GetPort(), s.GetWhy())
				}
			})
		})
	set := a.Local(&cobra.Command{
		Use:       "set EXPOSURE",
		Short:     "Open and shut doors: closed, private, allowlist or public",
		Args:      cli.OneOf("an exposure", exposures...),
		ValidArgs: exposures,
		Example:   "  demarc posture set allowlist --allow 192.0.2.0/24",
	},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			m, err := client.Do(ctx, l.SetPosture, &localv1.SetPostureRequest{RequestId: client.NewID(), Exposure: args[0], Allow: allow})
			if err != nil {
				return err
			}
			return a.Say(m, "posture is %s", args[0])
		})
	set.Flags().StringArrayVar(&allow, "allow", nil, "network that may come in, for allowlist")
	return cli.Group("posture", "Who of the application's end users may come in", show, set)
}

func transportCommand(a *cli.App) *cobra.Command {
	use := a.Local(&cobra.Command{
		Use:     "use NAME",
		Short:   "Move the channel to another transport of the appliance's file",
		Args:    cli.Exactly(1, "the transport's name"),
		Example: "  demarc transport use tailscale",
	},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			m, err := client.Do(ctx, l.SetTransport, &localv1.SetTransportRequest{RequestId: client.NewID(), Kind: args[0]})
			if err != nil {
				return err
			}
			return a.Say(m, "the channel runs over %s", m.GetKind())
		})
	return cli.Group("transport", "How the appliance reaches the control plane", use)
}
