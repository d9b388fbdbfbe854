// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"crypto"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/demarc-dev/demarc/cmd/demarc/internal/keyfile"
	"github.com/demarc-dev/demarc/fault"
)

type keyDoc struct {
	KeyID         string `json:"key_id"`
	File          string `json:"file"`
	PublicFile    string `json:"public_file"`
	RecipientFile string `json:"recipient_file"`
	Recipient     string `json:"recipient"`
}

func (a *app) key() *cobra.Command {
	var out, pass string
	create := &cobra.Command{
		Use:   "create --out FILE",
		Short: "Make the key that consent is signed with (offline)",
		Long: `Makes an Ed25519 key and writes FILE, encrypted with a passphrase, FILE.pub, and FILE.recipient, to which the output of
operations is encrypted. Do this on a workstation: the private key never belongs on the appliance. Then, on the
appliance's host, pin the public half: demarc local pin FILE.pub`,
		Example: "  demarc key create --out consent.key",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			p, err := a.passphrase(pass, true)
			if err != nil {
				return err
			}
			made, err := keyfile.Create(out, p)
			if err != nil {
				return err
			}
			doc := keyDoc{KeyID: string(made.Key.ID), File: made.Files[0], PublicFile: made.Files[1], RecipientFile: made.Files[2], Recipient: made.Recipient}
			return a.print(doc, func(w io.Writer) {
				fmt.Fprintf(w, "key:\t%s\nprivate:\t%s (keep it off the appliance)\npublic:\t%s\nrecipient:\t%s\n", doc.KeyID, doc.File, doc.PublicFile, doc.RecipientFile)
				fmt.Fprintf(w, "next, on the appliance's host: demarc local pin %s\n", doc.PublicFile)
			})
		},
	}
	create.Flags().StringVar(&out, "out", "", "file of the private key")
	create.Flags().StringVar(&pass, "passphrase-file", "", "file whose first line is the passphrase (DEMARC_PASSPHRASE_FILE); asked for where there is none")
	require(create, "out")
	return group("key", "The customer's own keys (offline)", "", create)
}

// passphrase is the first line of a file, or typed: twice for a new key.
func (a *app) passphrase(file string, fresh bool) ([]byte, error) {
	const op = "cli.passphrase"
	if file == "" {
		file = a.getenv("DEMARC_PASSPHRASE_FILE")
	}
	if file != "" {
		b, err := keyfile.Read(file)
		if err != nil {
			return nil, err
		}
		line, _, _ := bytes.Cut(b, []byte("\n"))
		line = bytes.TrimSuffix(line, []byte("\r"))
		if len(line) == 0 {
			return nil, fault.New(op, fault.Invalid, "the first line of %s is empty: it must be the passphrase", file)
		}
		return line, nil
	}
	in, ok := a.in.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return nil, usage("there is no terminal to ask for the passphrase: give --passphrase-file, or set DEMARC_PASSPHRASE_FILE")
	}
	first, err := a.ask(in, "passphrase: ")
	if err != nil || !fresh {
		return first, err
	}
	again, err := a.ask(in, "once more: ")
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(first, again) {
		return nil, fault.New(op, fault.Invalid, "the two passphrases differ: begin again")
	}
	return first, nil
}

func (a *app) ask(in *os.File, prompt string) ([]byte, error) {
	fmt.Fprint(a.err, prompt)
	b, err := term.ReadPassword(int(in.Fd()))
	fmt.Fprintln(a.err)
	if err != nil {
		return nil, fault.Because(err, "cli.ask", fault.Unavailable, "the passphrase could not be read")
	}
	return b, nil
}

// signing is the flags of a command that signs with a customer's key.
type signing struct{ key, passphrase string }

func (s *signing) flags(c *cobra.Command) {
	c.Flags().StringVar(&s.key, "key", "", "file of your private key (DEMARC_KEY)")
	c.Flags().StringVar(&s.passphrase, "passphrase-file", "", "file whose first line is its passphrase (DEMARC_PASSPHRASE_FILE); asked for where there is none")
}

// signer opens the key.
func (a *app) signer(s signing) (crypto.Signer, error) {
	if s.key == "" {
		s.key = a.getenv("DEMARC_KEY")
	}
	if s.key == "" {
		return nil, usage("this is signed with your key: give --key FILE, or set DEMARC_KEY")
	}
	b, err := keyfile.Read(s.key)
	if err != nil {
		return nil, err
	}
	k, err := keyfile.ParseSigner(b, func() ([]byte, error) { return a.passphrase(s.passphrase, false) })
	if err != nil {
		return nil, fault.Because(err, "cli.signer", fault.Of(err), "%s: %s", s.key, sentence(err))
	}
	return k, nil
}

type secretDoc struct {
	Name string `json:"name"`
	File string `json:"file"`
	Size int    `json:"size"`
}

func (a *app) secret() *cobra.Command {
	var dir, from string
	var stdin bool
	create := &cobra.Command{
		Use:   "create NAME --dir DIR (--from-file FILE | --value-stdin)",
		Short: "Put a secret into the folder that the appliance looks at (offline)",
		Long: `Writes the secret NAME as a file that only you can read, whole or not at all; one that is there is replaced. The
appliance only looks whether it is there; the application reads it. A value is never taken from the command line, where
others could see it. One line feed at the end of what comes from standard input is left out.`,
		Example: "  head -c 32 /dev/urandom | base64 | demarc secret create store-token --dir /etc/demarc/secrets --value-stdin",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if (from != "") == stdin {
				return usage("give either --from-file or --value-stdin")
			}
			value, err := a.secretValue(from)
			if err != nil {
				return err
			}
			if err := createSecret(dir, args[0], value); err != nil {
				return err
			}
			doc := secretDoc{Name: args[0], File: filepath.Join(dir, args[0]), Size: len(value)}
			return a.print(doc, func(w io.Writer) { fmt.Fprintf(w, "secret %s is there (%d bytes)\n", doc.Name, doc.Size) })
		},
	}
	f := create.Flags()
	f.StringVar(&dir, "dir", "/etc/demarc/secrets", "folder of secrets, as the appliance's file names it")
	f.StringVar(&from, "from-file", "", "file with the value, taken as it is")
	f.BoolVar(&stdin, "value-stdin", false, "read the value from standard input")
	return group("secret", "Secrets of the application (offline)", "", create)
}

func (a *app) secretValue(from string) ([]byte, error) {
	if from != "" {
		return keyfile.ReadMax(from, maxSecret)
	}
	b, err := io.ReadAll(io.LimitReader(a.in, maxSecret+2))
	if err != nil {
		return nil, fault.Because(err, "cli.secret", fault.Unavailable, "the value could not be read")
	}
	return bytes.TrimSuffix(b, []byte("\n")), nil
}
