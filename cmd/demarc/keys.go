// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"io"
	"os"
	"strings"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/workload"
)

// maxPassphrase and maxSecret bound what is read from files of the caller.
const (
	maxPassphrase = 4 << 10
	maxSecret     = 1 << 20
)

// keyFlags are those of a command that uses the customer's key.
type keyFlags struct{ file, passphrase string }

func (k *keyFlags) add(f *pflag.FlagSet) {
	f.StringVar(&k.file, "key", os.Getenv("DEMARC_KEY"), "the customer's key, by default $DEMARC_KEY")
	f.StringVar(&k.passphrase, "passphrase-file", os.Getenv("DEMARC_PASSPHRASE_FILE"), "file with its passphrase, by default $DEMARC_PASSPHRASE_FILE")
}

func (k keyFlags) read() ([]byte, error) {
	if k.passphrase == "" {
		return nil, usage("name the file with the passphrase: --passphrase-file FILE or DEMARC_PASSPHRASE_FILE")
	}
	b, err := os.ReadFile(k.passphrase)
	if err != nil || len(b) > maxPassphrase {
		return nil, usage("--passphrase-file: %v", err)
	}
	b = bytes.TrimRight(b, "\r\n")
	if len(b) == 0 {
		return nil, usage("--passphrase-file: the passphrase is empty")
	}
	return b, nil
}

// signer opens the customer's key.
func (k keyFlags) signer() (crypto.Signer, error) {
	if k.file == "" {
		return nil, usage("name the customer's key: --key FILE or DEMARC_KEY")
	}
	pass, err := k.read()
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(k.file)
	if err != nil {
		return nil, fault.Because(err, "demarc.key", fault.NotFound, "the key can't be read: %s", k.file)
	}
	return seal.DecryptKey(b, pass)
}

// reader opens the customer's key for output.
func (k keyFlags) reader() (age.Identity, error) {
	const op = "demarc.key"
	pass, err := k.read()
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(k.file + ".output")
	if err != nil {
		return nil, fault.Because(err, op, fault.NotFound, "the key for output can't be read: %s.output", k.file)
	}
	s, err := age.NewScryptIdentity(string(pass))
	if err != nil {
		return nil, fault.At(op, fault.Invalid, err)
	}
	s.SetMaxWorkFactor(22)
	r, err := age.Decrypt(bytes.NewReader(b), s)
	if err != nil {
		return nil, fault.Because(err, op, fault.Denied, "the passphrase does not open %s.output", k.file)
	}
	text, err := io.ReadAll(io.LimitReader(r, 4<<10))
	if err != nil {
		return nil, fault.At(op, fault.Invalid, err)
	}
	id, err := age.ParseX25519Identity(strings.TrimSpace(string(text)))
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "%s.output holds no age key", k.file)
	}
	return id, nil
}

func (a *app) key() *cobra.Command {
	var k keyFlags
	var out string
	c := &cobra.Command{Use: "create", Short: "Make the customer's key, encrypted with a passphrase", Args: exactly(0, "no arguments"),
		Long: "create makes four files. Keep the first and the second on your workstation, never on the appliance.\n\n" +
			"  OUT            signs grants and approvals: Ed25519, encrypted with the passphrase\n  OUT.output     opens output that the appliance holds: an age key, encrypted with the same passphrase\n" +
			"  OUT.pub        its public half, to be pinned\n  OUT.recipient  whom the appliance encrypts output to, to be pinned with it",
		Example: "  demarc key create --out globex.key --passphrase-file passphrase.txt"}
	c.Flags().StringVar(&out, "out", "", "the file to make")
	c.Flags().StringVar(&k.passphrase, "passphrase-file", os.Getenv("DEMARC_PASSPHRASE_FILE"), "file with the passphrase")
	c.RunE = func(*cobra.Command, []string) error {
		if out == "" {
			return usage("name the file with --out FILE")
		}
		pass, err := k.read()
		if err != nil {
			return err
		}
		id, err := makeKey(out, pass)
		if err != nil {
			return err
		}
		return a.say(map[string]string{"key": out, "id": string(id)}, "key %s is in %s; pin it on the appliance with: demarc local pin %s.pub --recipient-file %s.recipient", id, out, out, out)
	}
	return group("key", "The customer's keys", c)
}

// makeKey writes the four files of a key.
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
	file, err := seal.EncryptKey(priv, pass)
	if err != nil {
		return "", err
	}
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return "", fault.At(op, fault.Internal, err)
	}
	s, err := age.NewScryptRecipient(string(pass))
	if err != nil {
		return "", fault.At(op, fault.Invalid, err)
	}
	var hidden bytes.Buffer
	w, err := age.Encrypt(&hidden, s)
	if err == nil {
		_, err = io.WriteString(w, id.String())
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return "", fault.At(op, fault.Internal, err)
	}
	for _, x := range []struct {
		suffix string
		b      []byte
		mode   os.FileMode
	}{{"", file, 0o600}, {".output", hidden.Bytes(), 0o600}, {".pub", k.PEM(), 0o644}, {".recipient", []byte(id.Recipient().String() + "\n"), 0o644}} {
		if err := create(out+x.suffix, x.b, x.mode); err != nil {
			return "", err
		}
	}
	return k.ID, nil
}

func (a *app) secret() *cobra.Command {
	var dir, from string
	var stdin bool
	c := &cobra.Command{Use: "create NAME", Short: "Put a secret into the customer's store of files", Args: exactly(1, "the secret's name"),
		Long:    "create writes the value to a file that only its owner can read. The appliance looks at the file from outside, and the application is given its path.",
		Example: "  demarc secret create store-token --dir /etc/demarc/secrets --from-file token.txt"}
	c.Flags().StringVar(&dir, "dir", "", "the store: secrets.dir of the appliance's file")
	c.Flags().StringVar(&from, "from-file", "", "file with the value")
	c.Flags().BoolVar(&stdin, "from-stdin", false, "read the value from standard input")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if dir == "" || (from == "") == !stdin {
			return usage("give --dir, and one of --from-file and --from-stdin")
		}
		in := a.in
		if from != "" {
			f, err := os.Open(from)
			if err != nil {
				return usage("--from-file: %v", err)
			}
			defer f.Close()
			in = f
		}
		b, err := io.ReadAll(io.LimitReader(in, maxSecret+1))
		if err != nil || len(b) > maxSecret {
			return fault.Because(err, "demarc.secret", fault.Invalid, "the value can't be read, or has more than %d bytes", maxSecret)
		}
		if err := workload.CreateFile(dir, args[0], b); err != nil {
			return err
		}
		return a.say(map[string]string{"secret": args[0]}, "secret %s is in the store", args[0])
	}
	return group("secret", "Secrets in the customer's store", c)
}

func readBounded(file string, limit int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fault.Because(err, "demarc.read", fault.NotFound, "can't read %s", file)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil || int64(len(b)) > limit {
		return nil, fault.Because(err, "demarc.read", fault.Invalid, "%s can't be read, or has more than %d bytes", file, limit)
	}
	return b, nil
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
