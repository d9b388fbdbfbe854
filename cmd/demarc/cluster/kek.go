// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

const rotateHelp = `The key-encryption key (kek) seals the CAs' keys and the vendor's other secrets wherever they are stored. To replace it
while all runs:

  1. demarc control-plane kek new kek.next             draws the next one, here
  2. put it beside kek_file on each node, with .next at the end of its name, for instance /etc/demarc/kek.next
  3. demarc control-plane kek status                   shows which nodes hold it
  4. demarc control-plane rotate-kek                   seals everything anew; refused while a node does not hold it, which is named.
     Each node takes a snapshot that is sealed with the next one, and then puts that in the place of kek_file by itself. rotate-kek
     waits until all have, and names those that have not: until then the old key is destroyed nowhere
  5. demarc control-plane snapshot save FILE           those that were saved before open with the old key alone
  6. destroy the old key, everywhere

What was copied before, with the old kek, stays open to whoever has both: replace the CA too if that may be (demarc ca prepare).`

// printKeys lists which node holds which keys, and which may be destroyed.
func printKeys(w io.Writer, m *controlv1.GetKeysResponse) {
	fmt.Fprintf(w, "in use\t%s\tseals %d keys and secrets\n", cli.OrDash(m.GetKey()), m.GetSealed())
	for _, n := range m.GetNodes() {
		fmt.Fprintf(w, "node\t%s\tholds %s\n", n.GetNode(), cli.OrDash(strings.Join(n.GetKeys(), " and ")))
	}
	if names := m.GetUnsettled(); len(names) > 0 {
		fmt.Fprintf(w, "destroy\tno key: %s may need another one than that in use\n", strings.Join(names, ", "))
	} else {
		fmt.Fprintf(w, "destroy\tany other key: no node needs it\n")
	}
}

// waitRotated waits until no node needs another key than the one in use.
func waitRotated(ctx context.Context, v *client.Client, wait time.Duration) error {
	for end := time.Now().Add(wait); ; {
		m, err := listKeys(ctx, v)
		if err != nil {
			return err
		}
		names := m.GetUnsettled()
		if len(names) == 0 {
			return nil
		}
		left := time.Until(end)
		if left <= 0 {
			return fault.New("demarc.kek", fault.Unavailable, "everything is sealed with key %s, and these nodes may need the old one yet: %s; "+
				"start them, keep the old key, and ask again with demarc control-plane kek status", m.GetKey(), strings.Join(names, ", "))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(left, time.Second)):
		}
	}
}

func listKeys(ctx context.Context, v *client.Client) (*controlv1.GetKeysResponse, error) {
	return client.Call(ctx, v, client.Node.GetKeys, &controlv1.GetKeysRequest{})
}

// kekCommands are the commands about the key-encryption key.
func kekCommands(a *cli.App) []*cobra.Command {
	draw := &cobra.Command{
		Use:     "new FILE",
		Short:   "Draw a key-encryption key",
		Args:    cli.Exactly(1, "the file to write"),
		Example: "  demarc control-plane kek new kek.next",
	}
	draw.RunE = func(_ *cobra.Command, args []string) error {
		kek := make([]byte, 32)
		_, _ = rand.Read(kek) // crypto/rand.Read never fails
		id, err := identity.KEKID(kek)
		if err != nil {
			return err
		}
		if err := cli.Create(args[0], kek, 0o600); err != nil {
			return err
		}
		return a.Say(map[string]string{"key": id, "file": args[0]}, "key %s is in %s: give it to each node", id, args[0])
	}
	status := a.Online(&cobra.Command{
		Use:     "status",
		Short:   "Show which key seals the vendor's keys, and which ones each node holds",
		Args:    cli.Exactly(0, "no arguments"),
		Example: "  demarc control-plane kek status",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			m, err := listKeys(ctx, v)
			if err != nil {
				return err
			}
			return a.Emit(m, func(w io.Writer) { printKeys(w, m) })
		})
	var to string
	var wait time.Duration
	rotate := a.Online(&cobra.Command{
		Use:     "rotate-kek",
		Short:   "Seal the vendor's keys with the next key-encryption key, while all runs",
		Args:    cli.Exactly(0, "no arguments"),
		Long:    rotateHelp,
		Example: "  demarc control-plane rotate-kek",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			req := &controlv1.RotateKeyRequest{RequestId: client.NewID(), To: to}
			m, err := client.Call(ctx, v, client.Node.RotateKey, req)
			if err != nil {
				return err
			}
			if err := waitRotated(ctx, v, wait); err != nil {
				return err
			}
			return a.Say(m, "%d keys and secrets are sealed with key %s now, and no node needs the old one: save a snapshot (those of before open "+
				"with the old one alone), then destroy it everywhere", m.GetSealed(), m.GetKey())
		})
	rotate.Flags().DurationVar(&wait, "wait", 2*time.Minute, "how long to wait until no node needs the old key")
	rotate.Flags().StringVar(&to, "to", "", "name of the next key; left out, the one that the nodes hold beside the one in use")
	return []*cobra.Command{cli.Group("kek", "The key that seals the vendor's keys", draw, status), rotate}
}
