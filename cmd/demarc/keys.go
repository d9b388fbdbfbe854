// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/smallfile"
	"github.com/demarc-dev/demarc/workload"
)

// Bounds on what is read from files of the caller, in bytes.
const (
	maxPassphrase = 4 << 10
	maxSecret     = 1 << 20
	maxKeyFile    = 64 << 10
)

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
	f.StringVar(&k.passphrase, "passphrase-file", os.Getenv("DEMARC_PASSPHRASE_FILE"), "file with its passphrase, by default $DEMARC_PASSPHRASE_FILE; without one you are asked")
}

// signer opens the customer's key, once.
func (k *keyFlags) signer(a *app) (crypto.Signer, error) {
	if k.opened != nil {
		return k.opened, nil
	}
	if k.file == "" {
		return nil, usage("name the customer's key: --key FILE or DEMARC_KEY")
	}
	b, err := readBounded(k.file, maxKeyFile)
	if err != nil {
		return nil, err
	}
	pass, err := a.secretWord(k.passphrase, false)
	if err != nil {
		return nil, err
	}
	k.opened, err = seal.DecryptKey(b, pass)
	return k.opened, err
}

// reader opens the customer's key for output.
func (k *keyFlags) reader(a *app) (age.Identity, error) {
	s, err := k.signer(a)
	if err != nil {
		return nil, err
	}
	return outputKey(s)
}

// secretWord gives a passphrase: from a file, or typed at a terminal, twice where it is new.
func (a *app) secretWord(file string, fresh bool) ([]byte, error) {
	const op = "demarc.passphrase"
	if file != "" {
		b, err := readBounded(file, maxPassphrase)
		if err != nil {
			return nil, err
		}
		if b = bytes.TrimRight(b, "\r\n"); len(b) == 0 {
			return nil, fault.New(op, fault.Invalid, "%s: the passphrase is empty", file)
		}
		return b, nil
	}
	in, ok := a.in.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return nil, usage("there is no terminal to ask for the passphrase: name a file with --passphrase-file FILE or DEMARC_PASSPHRASE_FILE")
	}
	words := [][]byte{nil, nil}
	for i, prompt := range []string{"passphrase: ", "once more: "} {
		if i == 1 && !fresh {
			return words[0], nil
		}
		fmt.Fprint(a.errs, prompt)
		b, err := term.ReadPassword(int(in.Fd()))
		fmt.Fprintln(a.errs)
		if err != nil || len(b) == 0 {
			return nil, fault.Because(err, op, fault.Invalid, "no passphrase was typed")
		}
		words[i] = b
	}
	if !bytes.Equal(words[0], words[1]) {
		return nil, fault.New(op, fault.Invalid, "the two passphrases differ: begin again")
	}
	return words[0], nil
}

func (a *app) key() *cobra.Command {
	var k keyFlags
	var out string
	c := &cobra.Command{Use: "create", Short: "Make the customer's key, encrypted with a passphrase", Args: exactly(0, "no arguments"),
		Long: "create makes three files. Keep the first on your workstation, never on the appliance.\n\n" +
			"  OUT            signs grants and approvals, and opens output: Ed25519, encrypted with the passphrase\n" +
			"  OUT.pub        its public half, to be pinned\n" +
			"  OUT.recipient  whom the appliance encrypts output to (age), to be pinned with it; it follows from the key",
		Example: "  demarc key create --out globex.key"}
	c.Flags().StringVar(&out, "out", "", "the file to make")
	k.addPassphrase(c.Flags())
	c.RunE = func(*cobra.Command, []string) error {
		if out == "" {
			return usage("name the file with --out FILE")
		}
		pass, err := a.secretWord(k.passphrase, true)
		if err != nil {
			return err
		}
		id, err := makeKey(out, pass)
		if err != nil {
			return err
		}
		doc := map[string]string{"key": out, "id": string(id), "public": out + ".pub", "recipient": out + ".recipient"}
		return a.say(doc, "key %s is in %s; pin it on the appliance with: demarc local pin %s.pub --recipient-file %s.recipient", id, out, out, out)
	}
	return group("key", "The customer's keys", c)
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
	id, err := outputKey(priv)
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
		if err := create(f.name, f.b, f.mode); err != nil {
			for _, made := range files[:i] { // half a key would stand in the way of the next try
				_ = os.Remove(made.name)
			}
			return "", err
		}
	}
	return k.ID, nil
}

func (a *app) secret() *cobra.Command {
	var dir, from string
	var stdin bool
	c := &cobra.Command{Use: "create NAME", Short: "Put a secret into the customer's store of files", Args: exactly(1, "the secret's name"),
		Long: "create writes the value to a file that only its owner can read, whole or not at all; one that is there is replaced. The appliance looks at\n" +
			"the file from outside, and the application is given its path. A value is never taken from the command line, where others could see it.\n" +
			"Of what comes from standard input, one line break at the end is left out.",
		Example: "  demarc secret create store-token --dir /etc/demarc/secrets --from-file token.txt\n  pass show store-token | demarc secret create store-token --dir /etc/demarc/secrets --value-stdin"}
	c.Flags().StringVar(&dir, "dir", "", "the store: secrets.dir of the appliance's file")
	c.Flags().StringVar(&from, "from-file", "", "file with the value, taken as it is")
	c.Flags().BoolVar(&stdin, "value-stdin", false, "read the value from standard input")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if dir == "" || (from == "") == !stdin {
			return usage("give --dir, and one of --from-file and --value-stdin")
		}
		b, err := a.secretValue(from)
		if err != nil {
			return err
		}
		if err := workload.CreateFile(dir, args[0], b); err != nil {
			return err
		}
		return a.say(map[string]any{"secret": args[0], "bytes": len(b)}, "secret %s is in the store (%d bytes)", args[0], len(b))
	}
	return group("secret", "Secrets in the customer's store", c)
}

func (a *app) secretValue(from string) ([]byte, error) {
	if from != "" {
		return readBounded(from, maxSecret)
	}
	b, err := io.ReadAll(io.LimitReader(a.in, maxSecret+2))
	if err != nil {
		return nil, fault.Because(err, "demarc.secret", fault.Unavailable, "the value can't be read")
	}
	return bytes.TrimSuffix(b, []byte("\n")), nil
}

// readBounded reads a file of at most so many bytes.
func readBounded(file string, limit int64) ([]byte, error) {
	const op = "demarc.read"
	b, err := smallfile.Read(file, limit)
	switch {
	case err == nil:
		return b, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.New(op, fault.NotFound, "there is no file %s", file)
	case errors.Is(err, smallfile.ErrTooLarge):
		return nil, fault.New(op, fault.Invalid, "%s has more than %d bytes", file, limit)
	}
	return nil, fault.Because(err, op, fault.Unavailable, "can't read %s", file)
}

func publicKey(file string) (seal.Key, error) {
	b, err := readBounded(file, 64<<10)
	if err != nil {
		return seal.Key{}, err
	}
	k, err := seal.ParseKey(b)
	if err != nil {
		return k, fault.Because(err, "demarc.publicKey", fault.Of(err), "%s: %s", file, fault.Text(err))
	}
	return k, nil
}
