// SPDX-License-Identifier: Apache-2.0

package customer

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"os"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
)

// maxPassphrase bounds the file of a passphrase, in bytes.
const maxPassphrase = 4 << 10

// keyFlags are those of a command that uses the customer's key.
type keyFlags struct {
	file, passphrase string
	opened           crypto.Signer
}

func (k *keyFlags) add(f *pflag.FlagSet) {
	f.StringVar(&k.file, "key", os.Getenv("DEMARC_KEY"), "the customer's key, by default $DEMARC_KEY")
	k.addPassphrase(f)
}

func (k *keyFlags) addPassphrase(f *pflag.FlagSet) {
	f.StringVar(&k.passphrase, "passphrase-file", os.Getenv("DEMARC_PASSPHRASE_FILE"),
		"file with its passphrase, by default $DEMARC_PASSPHRASE_FILE; without one you are asked")
}

// signer opens the customer's key, once.
func (k *keyFlags) signer(a *cli.App) (crypto.Signer, error) {
	if k.opened != nil {
		return k.opened, nil
	}
	if k.file == "" {
		return nil, cli.Usage("name the customer's key: --key FILE or DEMARC_KEY")
	}
	b, err := cli.ReadFile(k.file, cli.MaxKeyFile)
	if err != nil {
		return nil, err
	}
	pass, err := readPassphrase(a, k.passphrase, false)
	if err != nil {
		return nil, err
	}
	k.opened, err = seal.DecryptKey(b, pass)
	return k.opened, err
}

// reader opens the customer's key for output.
func (k *keyFlags) reader(a *cli.App) (age.Identity, error) {
	s, err := k.signer(a)
	if err != nil {
		return nil, err
	}
	return OutputKey(s)
}

// readPassphrase reads a passphrase: from a file, or typed at a terminal, twice if it is new.
func readPassphrase(a *cli.App, file string, fresh bool) ([]byte, error) {
	const op = "demarc.passphrase"
	if file != "" {
		b, err := cli.ReadFile(file, maxPassphrase)
		if err != nil {
			return nil, err
		}
		if b = bytes.TrimRight(b, "\r\n"); len(b) == 0 {
			return nil, fault.New(op, fault.Invalid, "%s: the passphrase is empty", file)
		}
		return b, nil
	}
	in, ok := a.In.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return nil, cli.Usage("there is no terminal to ask for the passphrase: name a file with --passphrase-file FILE or DEMARC_PASSPHRASE_FILE")
	}
	typed := [][]byte{nil, nil}
	for i, prompt := range []string{"passphrase: ", "once more: "} {
		if i == 1 && !fresh {
			return typed[0], nil
		}
		fmt.Fprint(a.Errs, prompt)
		b, err := term.ReadPassword(int(in.Fd()))
		fmt.Fprintln(a.Errs)
		if err != nil || len(b) == 0 {
			return nil, fault.Because(err, op, fault.Invalid, "no passphrase was typed")
		}
		typed[i] = b
	}
	if !bytes.Equal(typed[0], typed[1]) {
		return nil, fault.New(op, fault.Invalid, "the two passphrases differ: begin again")
	}
	return typed[0], nil
}

func keyCommand(a *cli.App) *cobra.Command {
	var k keyFlags
	var out string
	c := &cobra.Command{
		Use:   "create",
		Short: "Make the customer's key, encrypted with a passphrase",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "create makes three files. Keep the first on your workstation, never on the appliance.\n\n" +
			"  OUT            signs grants and approvals, and opens output: Ed25519, encrypted with the passphrase\n" +
			"  OUT.pub        its public half, to be pinned\n" +
			"  OUT.recipient  whom the appliance encrypts output to (age), to be pinned with it; it follows from the key",
		Example: "  demarc key create --out globex.key",
	}
	c.Flags().StringVar(&out, "out", "", "the file to make")
	k.addPassphrase(c.Flags())
	c.RunE = func(*cobra.Command, []string) error {
		if out == "" {
			return cli.Usage("name the file with --out FILE")
		}
		pass, err := readPassphrase(a, k.passphrase, true)
		if err != nil {
			return err
		}
		id, err := makeKey(out, pass)
		if err != nil {
			return err
		}
		doc := map[string]string{"key": out, "id": string(id), "public": out + ".pub", "recipient": out + ".recipient"}
		return a.Say(doc, "key %s is in %s; pin it on the appliance with: demarc local pin %s.pub --recipient-file %s.recipient", id, out, out,
			out)
	}
	return cli.Group("key", "The customer's keys", c)
}

// makeKey writes the three files of a key, none of which may be there.
func makeKey(out string, pass []byte) (seal.KeyID, error) {
	const op = "demarc.key"
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", fault.At(op, fault.Internal, err)
	}
	k, err := seal.KeyOf(pub)
	if err != nil {
		return "", err
	}
	id, err := OutputKey(priv)
	if err != nil {
		return "", err
	}
	file, err := seal.EncryptKey(priv, pass)
	if err != nil {
		return "", err
	}
	files := []struct {
		name string
		b    []byte
		mode os.FileMode
	}{{out, file, 0o600}, {out + ".pub", k.PEM(), 0o644}, {out + ".recipient", []byte(id.Recipient().String() + "\n"), 0o644}}
	for _, f := range files {
		if _, err := os.Lstat(f.name); err == nil {
			return "", fault.New(op, fault.Conflict, "%s is there already, and a key is never overwritten: choose another name", f.name)
		}
	}
	for i, f := range files {
		if err := cli.Create(f.name, f.b, f.mode); err != nil {
			for _, made := range files[:i] { // half a key would block the next try
				_ = os.Remove(made.name)
			}
			return "", err
		}
	}
	return k.ID, nil
}
