// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// Lives of the first certificates. Nodes and operators are renewed by hand, with `init` of the same trust domain yet to come.
const firstLife = 365 * 24 * time.Hour

func (a *app) controlPlane() *cobra.Command {
	var in initOptions
	c := &cobra.Command{Use: "init", Short: "Make a trust domain: its authority, its nodes' files, the first operator", Args: exactly(0, "no arguments"),
		Long: "init makes everything that a new control plane begins with, offline. It draws the authority's key, sealed with a key-encryption key\n" +
			"(kek) that every node needs; for each node a certificate and a file for demarcd; and the first operator with a certificate, a\n" +
			"signing key for releases and requests, and a key that reads released output.\n\nGive each node its own folder and the kek, over a channel that you trust. Nothing here is needed at a customer but bundle.pem and\noperator/signing.pub.",
		Example: "  demarc control-plane init --dir acme --trust-domain acme.example --operator ann \\\n    --node cp-1=10.0.0.1:7444,cp-1.acme.example:7443 --node cp-2=... --node cp-3=..."}
	f := c.Flags()
	f.StringVar(&in.dir, "dir", "", "the folder to make")
	f.StringVar(&in.domain, "trust-domain", "", "the vendor's name in every certificate, a DNS name")
	f.StringArrayVar(&in.nodes, "node", nil, "NAME=RAFT_HOST:PORT,API_HOST:PORT[,METRICS_HOST:PORT], once for each of 1, 3 or 5 nodes")
	f.StringVar(&in.operator, "operator", "operator", "name of the first operator")
	f.StringVar(&in.managementURL, "management-url", "", "the management plane that is told counts and health")
	f.StringVar(&in.managementCA, "management-ca", "", "file with the certificate authority of the management plane")
	f.StringVar(&in.managementName, "management-name", "", "name of this control plane there")
	f.StringVar(&in.tailnetURL, "tailnet-url", "", "coordinator of the vendor's tailnet, for a door on it")
	f.StringVar(&in.tailnetKey, "tailnet-auth-key-file", "", "file with an auth key of the vendor's tailnet")
	c.RunE = func(*cobra.Command, []string) error { return a.initTrustDomain(in) }
	return group("control-plane", "The vendor's control plane", c)
}

type initOptions struct {
	dir, domain, operator                       string
	nodes                                       []string
	managementURL, managementCA, managementName string
	tailnetURL, tailnetKey                      string
}

type nodeSpec struct{ name, raft, api, metrics string }

func (in initOptions) specs() ([]nodeSpec, error) {
	var out []nodeSpec
	for _, s := range in.nodes {
		name, rest, ok := strings.Cut(s, "=")
		parts := strings.Split(rest, ",")
		if !ok || len(parts) < 2 || len(parts) > 3 {
			return nil, usage("--node %q: write NAME=RAFT_HOST:PORT,API_HOST:PORT", s)
		}
		if err := fleet.CheckName("node", name); err != nil {
			return nil, err
		}
		n := nodeSpec{name: name, raft: parts[0], api: parts[1]}
		if len(parts) == 3 {
			n.metrics = parts[2]
		}
		out = append(out, n)
	}
	if len(out) != 1 && len(out) != 3 && len(out) != 5 {
		return nil, usage("give --node once for each of 1, 3 or 5 nodes, not %d", len(out))
	}
	return out, nil
}

// book of what init writes: it refuses to overwrite.
type folder struct{ dir string }

func (f folder) path(parts ...string) string {
	return filepath.Join(append([]string{f.dir}, parts...)...)
}

func (f folder) write(b []byte, mode fs.FileMode, parts ...string) error {
	p := f.path(parts...)
	if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
		return fault.Because(err, "demarc.write", fault.Unavailable, "can't make the folder of %s", p)
	}
	return create(p, b, mode)
}

// create writes a file that must not exist yet.
func create(path string, b []byte, mode fs.FileMode) error {
	const op = "demarc.create"
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, fs.ErrExist) {
		return fault.New(op, fault.Conflict, "%s is there already: nothing is overwritten", path)
	}
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't write %s", path)
	}
	_, err = w.Write(b)
	return fault.At(op, fault.Unavailable, errors.Join(err, w.Sync(), w.Close()))
}

func (a *app) initTrustDomain(in initOptions) error {
	const op = "demarc.init"
	if in.dir == "" || in.domain == "" {
		return usage("give --dir and --trust-domain")
	}
	specs, err := in.specs()
	if err != nil {
		return err
	}
	if err := identity.CheckTrustDomain(in.domain); err != nil {
		return err
	}
	if err := fleet.CheckName("operator", in.operator); err != nil {
		return err
	}
	if left, err := os.ReadDir(in.dir); err == nil && len(left) > 0 {
		return fault.New(op, fault.Conflict, "%s is not empty: nothing is overwritten", in.dir)
	}
	now := time.Now()
	kek := make([]byte, 32)
	_, _ = rand.Read(kek) // crypto/rand.Read never fails
	ca, err := identity.NewCA(in.domain, now, rand.Reader, identity.DefaultCALife)
	if err != nil {
		return err
	}
	sealed, err := ca.SealKey(kek, rand.Reader)
	if err != nil {
		return err
	}
	slots := []identity.Slot{{Stage: identity.Active, CertDER: ca.Cert.Raw, SealedKey: sealed}}
	genesis, err := json.Marshal(controlplane.Genesis{TrustDomain: in.domain, Slots: slots})
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	bundle, err := identity.BundlePEM(slots)
	if err != nil {
		return err
	}
	f := folder{in.dir}
	if err := errors.Join(f.write(kek, 0o600, "kek"), f.write(genesis, 0o600, "genesis.json"), f.write(bundle, 0o644, "bundle.pem")); err != nil {
		return err
	}
	logKey, err := controlplane.LogKey(kek)
	if err != nil {
		return err
	}
	if err := f.write(logKey, 0o644, "log.pub"); err != nil {
		return err
	}
	for _, n := range specs {
		if err := in.writeNode(f, ca, n, specs, now); err != nil {
			return err
		}
	}
	if err := in.writeOperator(f, ca, specs, now); err != nil {
		return err
	}
	return a.say(map[string]any{"trust_domain": in.domain, "dir": in.dir, "nodes": len(specs), "operator": in.operator},
		"trust domain %s with %d nodes is in %s\nstart each node:   demarcd run -c %s\noperator's file:   %s", in.domain, len(specs), in.dir,
		f.path(specs[0].name, "node.yaml"), f.path("operator", "operator.yaml"))
}

// leaf issues a certificate and writes it with its key.
func leaf(f folder, ca *identity.Authority, who fleet.Principal, now time.Time, names []string, ips []netip.Addr, parts ...string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fault.At("demarc.leaf", fault.Internal, err)
	}
	der, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return err
	}
	csr, err := identity.ParseCSR(der)
	if err != nil {
		return err
	}
	cert, err := ca.Issue(csr, who, now, firstLife, identity.IssueOptions{Rand: rand.Reader, DNSNames: names, IPs: ips})
	if err != nil {
		return err
	}
	pemKey, err := keyPEM(key)
	if err != nil {
		return err
	}
	return errors.Join(f.write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o644, append(parts, "cert.pem")...),
		f.write(pemKey, 0o600, append(parts, "cert.key")...))
}

func keyPEM(k crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fault.At("demarc.keyPEM", fault.Internal, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func (in initOptions) writeNode(f folder, ca *identity.Authority, n nodeSpec, all []nodeSpec, now time.Time) error {
	if err := leaf(f, ca, fleet.PrincipalOf(in.domain, fleet.Node, n.name), now, nil, nil, n.name); err != nil {
		return err
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "version: %s\nrole: %s\nname: %s\ntrust_domain: %s\ndir: data\nlisten: %q\nraft: {listen: %q}\ncluster:\n",
		configs.Version, configs.RoleControl, n.name, in.domain, n.api, n.raft)
	for _, m := range all {
		fmt.Fprintf(&b, "  - {name: %s, raft: %q, api: %q}\n", m.name, m.raft, m.api)
	}
	fmt.Fprintf(&b, "kek_file: ../kek\ncertificate: {file: cert.pem, key: cert.key, bundle: ../bundle.pem}\ngenesis: ../genesis.json\n")
	if n.metrics != "" {
		fmt.Fprintf(&b, "metrics: {listen: %q}\n", n.metrics)
	}
	if in.managementURL != "" {
		ca, err := filepath.Abs(in.managementCA)
		if err != nil {
			return fault.At("demarc.init", fault.Internal, err)
		}
		fmt.Fprintf(&b, "management: {url: %q, ca_file: %q, name: %q}\n", in.managementURL, ca, in.managementName)
	}
	if in.tailnetURL != "" {
		key, err := filepath.Abs(in.tailnetKey)
		if err != nil {
			return fault.At("demarc.init", fault.Internal, err)
		}
		fmt.Fprintf(&b, "tailnet: {control_url: %q, auth_key_file: %q, hostname: %s}\n", in.tailnetURL, key, n.name)
	}
	if _, err := configs.Parse(f.path(n.name, "node.yaml"), b.Bytes(), nil); err != nil {
		return err // an address that is none, with its line
	}
	return f.write(b.Bytes(), 0o644, n.name, "node.yaml")
}

func (in initOptions) writeOperator(f folder, ca *identity.Authority, all []nodeSpec, now time.Time) error {
	const op = "demarc.init"
	if err := leaf(f, ca, fleet.PrincipalOf(in.domain, fleet.Operator, in.operator), now, nil, nil, "operator"); err != nil {
		return err
	}
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	k, err := seal.KeyOf(pub)
	if err != nil {
		return err
	}
	signing, err := keyPEM(priv)
	if err != nil {
		return err
	}
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	o := operator{TrustDomain: in.domain, Name: in.operator, Certificate: "cert.pem", Key: "cert.key", Bundle: "../bundle.pem", SigningKey: "signing.key", RecipientKey: "recipient.key"}
	for _, n := range all {
		o.Nodes = append(o.Nodes, n.api)
	}
	file, err := yaml.Marshal(o)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	return errors.Join(f.write(signing, 0o600, "operator", "signing.key"), f.write(k.PEM(), 0o644, "operator", "signing.pub"),
		f.write([]byte(id.String()+"\n"), 0o600, "operator", "recipient.key"), f.write(file, 0o600, "operator", "operator.yaml"))
}
