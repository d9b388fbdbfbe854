// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
)

// CACommand is demarc ca.
func CACommand(a *cli.App) *cobra.Command {
	status := a.Online(&cobra.Command{
		Use:     "status",
		Short:   "Show the CAs, and everyone without the newest bundle",
		Args:    cli.Exactly(0, "no arguments"),
		Example: "  demarc ca status",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			m, err := authorities(ctx, v)
			if err != nil {
				return err
			}
			return a.Emit(m, func(w io.Writer) {
				fmt.Fprintf(w, "bundle\t%d\n", m.GetBundleNumber())
				for _, c := range m.GetAuthorities() {
					fmt.Fprintf(w, "ca\t%s\t%s\tuntil %s\tof %d appliances, %d operators\t%s\n", c.GetId(), c.GetStage(),
						time.Unix(c.GetNotAfterUnix(), 0).UTC().Format(time.DateOnly), c.GetAppliances(), c.GetOperators(), c.GetName())
				}
				for _, x := range m.GetMissing() {
					fmt.Fprintf(w, "missing\t%s %s\tholds %d\t%s\n", x.GetKind(), x.GetName(), x.GetHolds(), remedy(x))
				}
			})
		})
	var life *time.Duration
	prepare := a.Online(&cobra.Command{
		Use:     "prepare",
		Short:   "Make another CA and announce it; it issues nothing yet",
		Args:    cli.Exactly(0, "no arguments"),
		Example: "  demarc ca prepare",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			m, err := client.Call(ctx, v, client.Node.PrepareAuthority,
				&controlv1.PrepareAuthorityRequest{RequestId: client.NewID(), LifeSeconds: int64(*life / time.Second)})
			if err != nil {
				return err
			}
			v.Announced(ctx, m.GetBundleNumber()) // the node that answered may not have applied it yet
			return a.Emit(m, func(w io.Writer) {
				fmt.Fprintf(w, "CA %s is prepared, in bundle %d: activate it once all who are waited for have it (demarc ca status)\n",
					m.GetId(), m.GetBundleNumber())
			})
		})
	life = cli.SpanVar(prepare.Flags(), "life", 0, time.Second, 20*365*24*time.Hour,
		"how long the CA lives, for instance 17520h; five years if absent")
	var without []string
	activate := a.Online(&cobra.Command{
		Use:   "activate ID",
		Short: "Have the prepared CA issue; refused while a node, a connected appliance or an operator does not hold it",
		Args:  cli.Exactly(1, "the id of a CA, the beginning of one, or the word prepared"),
		Long: "activate has the prepared CA issue. It is refused, with names, while a node, an appliance that is connected, or an\n" +
			"operator with a valid certificate who called within 30 days does not hold that CA. An operator takes it with any\n" +
			"command. One who can't be waited for is named with --without: their command line asks for the vendor's signed bundle\n" +
			"when they come back.",
		Example: "  demarc ca activate prepared\n" +
			"  demarc ca activate sha256:1f0c --without cat",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			ca, err := authority(ctx, v, args[0])
			if err != nil {
				return err
			}
			_, err = client.Call(ctx, v, client.Node.ActivateAuthority,
				&controlv1.ActivateAuthorityRequest{RequestId: client.NewID(), Id: ca, Without: without})
			if err != nil {
				return err
			}
			return a.Say(map[string]string{"active": ca}, "CA %s issues now", ca)
		})
	activate.Flags().StringSliceVar(&without, "without", nil, "operators who are not waited for")
	var compromised bool
	retire := a.Online(&cobra.Command{
		Use:   "retire ID",
		Short: "End the trust in a CA; refused while its certificates are in use",
		Args:  cli.Exactly(1, "the id of a CA, the beginning of one, or the word tainted"),
		Long: "retire ends the trust in a CA: tainted is the one that issued before. It is refused while its certificates are in use.\n" +
			"With --compromised it does not wait: no certificate of that CA is valid any more, and every connection that showed\n" +
			"one ends at once, at each node. Appliances prove their platform identity again and nodes make their next certificate,\n" +
			"by themselves. An operator whose certificate is of that CA logs in again (demarc operator login), or is invited again\n" +
			"by an admin (demarc operator invite).",
		Example: "  demarc ca retire tainted\n" +
			"  demarc ca retire sha256:9b3e --compromised",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			ca, err := authority(ctx, v, args[0])
			if err != nil {
				return err
			}
			_, err = client.Call(ctx, v, client.Node.RetireAuthority,
				&controlv1.RetireAuthorityRequest{RequestId: client.NewID(), Id: ca, Compromised: compromised})
			if err != nil {
				return err
			}
			return a.Say(map[string]string{"retired": ca}, "CA %s is trusted by nobody any more", ca)
		})
	retire.Flags().BoolVar(&compromised, "compromised", false,
		"its key may be known to others: at once, whoever uses its certificates proves itself again")
	return cli.Group("ca", "The CAs of the trust domain", status, prepare, activate, retire)
}

func authorities(ctx context.Context, v *client.Client) (*controlv1.ListAuthoritiesResponse, error) {
	return client.Call(ctx, v, client.Node.ListAuthorities, &controlv1.ListAuthoritiesRequest{})
}

// remedy says what brings the newest bundle to a holder of an older one.
func remedy(x *controlv1.Missing) string {
	switch {
	case x.GetKind() == "operator" && x.GetOnline():
		return "called " + time.Unix(x.GetSeenUnix(), 0).UTC().Format(time.DateOnly) + ": have them run any command, for instance demarc status"
	case x.GetKind() == "operator":
		return "did not call lately, holds nothing up: takes it with the next command"
	case x.GetKind() == "appliance" && !x.GetOnline():
		return "offline, holds nothing up: takes it when it comes back"
	case x.GetKind() == "appliance":
		return "connected: takes it by itself, wait"
	}
	return "takes it by itself: start it if it is down"
}

// authority completes the beginning of an id, or the stage of a CA, if it fits one CA.
func authority(ctx context.Context, v *client.Client, begin string) (string, error) {
	const op = "demarc.ca"
	m, err := authorities(ctx, v)
	if err != nil {
		return "", err
	}
	var found []string
	for _, c := range m.GetAuthorities() {
		if c.GetStage() == begin || strings.HasPrefix(c.GetId(), begin) || strings.HasPrefix(strings.TrimPrefix(c.GetId(), "sha256:"), begin) {
			found = append(found, c.GetId())
		}
	}
	if len(found) != 1 {
		return "", fault.New(op, fault.NotFound, "%d CAs have the stage %[2]q or an id that begins with %[2]q: see demarc ca status", len(found),
			begin)
	}
	return found[0], nil
}
