// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// issued is what the control plane issued to an operator, and the bundle whose CAs prove the control plane.
type issued struct {
	leaf  *x509.Certificate
	role  string
	roots client.SignedBundle
}

// checkIssued reads what a control plane answered: a certificate of this key and this name.
func checkIssued(der []byte, roots client.SignedBundle, role string, key crypto.Signer, cp client.ControlPlane, name string) (issued,
	error) {
	leaf, err := client.ParseIssued(der, key)
	if err != nil {
		return issued{}, err
	}
	if want := string(fleet.PrincipalOf(cp.TrustDomain, fleet.Operator, name)); len(leaf.URIs) != 1 || leaf.URIs[0].String() != want {
		return issued{}, fault.New("demarc.accept", fault.Invalid, "the certificate is not that of %s", want)
	}
	return issued{leaf, role, roots}, nil
}

// files are the files of a new operator: FILE.yaml, and FILE.* beside it.
type files struct{ main string }

func newFiles(main string) (files, error) { return files{main}, cli.Absent(main) }

func (f files) path(ext string) string {
	return strings.TrimSuffix(f.main, filepath.Ext(f.main)) + "." + ext
}

// key is the private key of the certificate: the one of an accept that was cut short, or a new one, on disk before the first call.
func (f files) key() (crypto.Signer, error) {
	const op = "demarc.accept"
	path := f.path("key")
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key, _, err := client.NewKey()
		if err != nil {
			return nil, err
		}
		b, err := client.KeyPEM(key)
		if err != nil {
			return nil, err
		}
		return key, cli.Create(path, b, 0o600)
	}
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "%s can't be read", path)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fault.New(op, fault.Conflict, "%s is there already and holds no key: nothing is overwritten", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if ec, ok := k.(*ecdsa.PrivateKey); err == nil && ok {
		return ec, nil
	}
	return nil, fault.Because(err, op, fault.Conflict, "%s is there already and holds another kind of key: nothing is overwritten", path)
}

// write writes all files but the key, which is there; the operator's file comes last.
func (f files) write(cp client.ControlPlane, name string, got issued) error {
	own, err := NewKeys()
	if err != nil {
		return err
	}
	base := filepath.Base(f.path(""))
	file, err := yaml.Marshal(client.Operator{
		TrustDomain: cp.TrustDomain, Name: name, Nodes: cp.Nodes,
		Certificate: base + "cert.pem", Key: base + "key", Bundle: base + "bundle.pem", LogKey: base + "log.pub",
		SigningKey: base + SigningKey, RequestKey: base + RequestKey, RecipientKey: base + RecipientKey,
	})
	if err != nil {
		return fault.At("demarc.accept", fault.Internal, err)
	}
	if err := got.roots.Store(f.path("bundle.pem")); err != nil {
		return err
	}
	for _, k := range append(own.Files(), KeyFile{Name: "log.pub", Bytes: cp.LogKey},
		KeyFile{Name: "cert.pem", Bytes: client.CertificatesPEM(got.leaf.Raw)}) {
		if err := client.ReplaceFiles(map[string][]byte{f.path(k.Name): k.Bytes}); err != nil { // of an accept that was cut short here
			return err
		}
	}
	return cli.Create(f.main, file, 0o600)
}

// document is what an operator became, for the output.
func (f files) document(name string, got issued) map[string]any {
	return map[string]any{"operator": name, "role": got.role, "operator_file": f.main, "release_key": f.path(ReleasePublic),
		"request_key": f.path(RequestPublic), "until_unix": got.leaf.NotAfter.Unix()}
}

// forCustomers prints which public keys a customer's file must name before what this operator signs is taken there.
func (f files) forCustomers(w io.Writer, name string, got issued) {
	release, request := "", ""
	if fleet.Rank(got.role).Covers(fleet.Deployer) {
		release = f.path(ReleasePublic)
	}
	if fleet.Rank(got.role).Covers(fleet.Operate) {
		request = f.path(RequestPublic)
	}
	if release != "" || request != "" {
		fmt.Fprint(w, "what you sign is taken by customers whose file names your public keys:\n"+ForCustomers(release, name, request))
	}
}
