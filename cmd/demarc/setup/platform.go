// SPDX-License-Identifier: Apache-2.0

package setup

import (
	"crypto/rand"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// The files of a development issuer.
const (
	devKeyFile  = "dev.key"  // private, 0600
	devKeysFile = "dev.jwks" // public: what the vendor registers
)

// PlatformCommand is demarc platform.
func PlatformCommand(a *cli.App) *cobra.Command {
	return cli.Group("platform", "What stands in for a platform on a laptop", cli.Group("dev",
		"A small issuer of identity tokens, for development alone", devInitCommand(a), devTokenCommand(a)))
}

const devHelp = `A laptop has no platform that could vouch for an appliance. These commands stand in for one, for development alone:
whoever can read ` + devKeyFile + ` is any appliance that is registered with its public half. Only a trust domain that was made with
demarc control-plane init --development takes such an appliance; every other one refuses its registration and its enrolment.`

func devInitCommand(a *cli.App) *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "init",
		Short: "Draw the key of a development issuer",
		Args:  cli.Exactly(0, "no arguments"),
		Long: devHelp + "\n\ninit writes " + devKeyFile + ", which stays with the appliance, and " + devKeysFile +
			", which the vendor registers.",
		Example: "  demarc platform dev init --dir laptop\n" +
			"  demarc appliance register laptop --customer globex --dev-keys laptop/" +
			devKeysFile +
			" --dev-subject laptop",
	}
	c.Flags().StringVar(&dir, "dir", "", "the folder of its files; it is made if it is not there")
	c.RunE = func(*cobra.Command, []string) error {
		if dir == "" {
			return cli.Usage("say where its files go with --dir DIR")
		}
		k, err := identity.NewDevKey(rand.Reader)
		if err != nil {
			return err
		}
		private, err := k.PEM()
		if err != nil {
			return err
		}
		public, err := k.JWKS()
		if err != nil {
			return err
		}
		f := cli.Folder(dir)
		if err := f.Write(private, 0o600, devKeyFile); err != nil {
			return err
		}
		if err := f.Write(append(public, '\n'), 0o644, devKeysFile); err != nil {
			return err
		}
		doc := map[string]string{"key": f.Path(devKeyFile), "keys": f.Path(devKeysFile)}
		return a.Emit(doc, func(w io.Writer) {
			fmt.Fprintf(w, "a development issuer is in %s\n  %s stays with the appliance: whoever reads it is the appliance\n"+
				"  %s is public: the vendor registers it with --dev-keys\n", dir, doc["key"], doc["keys"])
		})
	}
	return c
}

func devTokenCommand(a *cli.App) *cobra.Command {
	var dir, name, audience string
	c := &cobra.Command{
		Use:   "token",
		Short: "Print a development token for one audience",
		Args: cli.Exactly(0,
			"no arguments; the audience is that of --audience"),
		Long: devHelp +
			"\n\n" +
			"token is the appliance's token_command, which puts the audience at the end.",
		Example: "  proof: {kind: dev, token_command: [demarc, platform, dev, token, --dir, /home/me/laptop, --name, laptop, --audience]}",
	}
	f := c.Flags()
	f.StringVar(&dir, "dir", "", "the folder of demarc platform dev init")
	f.StringVar(&name, "name", "", "whom the token is for: the --dev-subject of the registration")
	f.StringVar(&audience, "audience", "", "what the token is made out to")
	c.RunE = func(*cobra.Command, []string) error {
		if dir == "" || name == "" || audience == "" {
			return cli.Usage("give --dir, --name and --audience")
		}
		if err := fleet.CheckName("development", name); err != nil {
			return cli.Usage("--name: %s", fault.Text(err))
		}
		b, err := cli.ReadFile(cli.Folder(dir).Path(devKeyFile), identity.MaxToken)
		if err != nil {
			return err
		}
		k, err := identity.ParseDevKey(b)
		if err != nil {
			return err
		}
		token, err := k.Token(name, audience, time.Now())
		if err != nil {
			return err
		}
		return a.Say(map[string]string{"token": token}, "%s", token)
	}
	return c
}
