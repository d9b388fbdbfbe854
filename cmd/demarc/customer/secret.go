// SPDX-License-Identifier: Apache-2.0

package customer

import (
	"bytes"
	"io"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/workload"
)

// maxSecret bounds the value of a secret, in bytes.
const maxSecret = 1 << 20

func secretCommand(a *cli.App) *cobra.Command {
	var dir, from string
	var stdin bool
	c := &cobra.Command{
		Use:   "create NAME",
		Short: "Put a secret into the customer's store of files",
		Args:  cli.Exactly(1, "the secret's name"),
		Long: "create writes the value to a file that only its owner can read, whole or not at all; one that is there is replaced.\n" +
			"The appliance looks at the file from outside, and the application is given its path. A value is never taken from the\n" +
			"command line, where others could see it. Of what comes from standard input, one line break at the end is left out.",
		Example: "  demarc secret create store-token --dir /etc/demarc/secrets --from-file token.txt\n" +
			"  pass show store-token | demarc secret create store-token --dir /etc/demarc/secrets --value-stdin",
	}
	c.Flags().StringVar(&dir, "dir", "", "the store: secrets.dir of the appliance's file")
	c.Flags().StringVar(&from, "from-file", "", "file with the value, taken as it is")
	c.Flags().BoolVar(&stdin, "value-stdin", false, "read the value from standard input")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if dir == "" || (from == "") == !stdin {
			return cli.Usage("give --dir, and one of --from-file and --value-stdin")
		}
		b, err := secretValue(a, from)
		if err != nil {
			return err
		}
		if err := workload.CreateFile(dir, args[0], b); err != nil {
			return err
		}
		return a.Say(map[string]any{"secret": args[0], "bytes": len(b)}, "secret %s is in the store (%d bytes)", args[0], len(b))
	}
	return cli.Group("secret", "Secrets in the customer's store", c)
}

func secretValue(a *cli.App, from string) ([]byte, error) {
	if from != "" {
		return cli.ReadFile(from, maxSecret)
	}
	b, err := io.ReadAll(io.LimitReader(a.In, maxSecret+2))
	if err != nil {
		return nil, fault.Because(err, "demarc.secret", fault.Unavailable, "the value can't be read")
	}
	return bytes.TrimSuffix(b, []byte("\n")), nil
}
