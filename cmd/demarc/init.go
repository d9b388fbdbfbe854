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
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/smallfile"
)

// firstLife is the life of the first certificates. A node makes its next one itself; an operator runs demarc operator renew.
const firstLife = 365 * 24 * time.Hour

func (a *app) controlPlane() *cobra.Command {
	var in initOptions
	c := &cobra.Command{Use: "init", Short: "Make a trust domain: its authority, its nodes' files, the first operator", Args: exactly(0, "no arguments"),
		Long: "init makes everything that a new control plane begins with, offline. It draws the authority's key, sealed with a key-encryption key\n" +
			"(kek) that every node needs; for each node a certificate and a file for demarcd; and the first operator with a certificate, a\n" +
			"key that signs releases, one that signs requests for operations, and one that reads released output.\n\nGive each node its own folder and the kek, over a channel that you trust. Nothing here is needed at a customer but bundle.pem,\noperator/signing.pub (release_keys) and operator/request.pub (the operator's keys).",
		Example: "  demarc control-plane init --dir acme --trust-domain acme.example --operator ann \\\n    --node cp-1=10.0.0.1:7444,cp-1.acme.example:7443 --node cp-2=... --node cp-3=..."}
	f := c.Flags()
	f.StringVar(&in.dir, "dir", "", "the folder to make")
	f.StringVar(&in.domain, "trust-domain", "", "the vendor's name in every certificate, a DNS name")
	f.StringArrayVar(&in.nodes, "node", nil, "NAME=RAFT_HOST:PORT,API_HOST:PORT[,METRICS_HOST:PORT], once for each of 1, 3 or 5 nodes")
	f.StringVar(&in.operator, "operator", "operator", "name of the first operator")
	f.BoolVar(&in.development, "development", false, "take appliances that prove a development identity (demarc platform dev); decided here, once and for good")
	f.StringVar(&in.managementURL, "management-url", "", "the management plane that is told counts and health")
	f.StringVar(&in.managementCA, "management-ca", "", "file with the certificate authority of the management plane")
	f.StringVar(&in.managementName, "management-name", "", "name of this control plane there")
	f.StringVar(&in.tailnetURL, "tailnet-url", "", "coordinator of the vendor's tailnet, for a door on it")
	f.StringVar(&in.tailnetKey, "tailnet-auth-key-file", "", "file with an auth key of the vendor's tailnet")
	c.RunE = func(*cobra.Command, []string) error { return a.initTrustDomain(in) }
	return group("control-plane", "The vendor's control plane", append(append([]*cobra.Command{c}, a.clusterCommands()...), a.keyCommands()...)...)
}

type initOptions struct {
	dir, domain, operator                       string
	nodes                                       []string
	managementURL, managementCA, managementName string
	tailnetURL, tailnetKey                      string
	development                                 bool
}

type nodeSpec struct{ name, raft, api, metrics string }

func (in *initOptions) specs() ([]nodeSpec, error) {
	var out []nodeSpec
	beside := map[string]int{} // nodes on one machine, as where they meet tells
	for _, s := range in.nodes {
		name, rest, ok := strings.Cut(s, "=")
		parts := strings.Split(rest, ",")
		if !ok || len(parts) < 2 || len(parts) > 3 {
			return nil, usage("--node %q: write NAME=RAFT_HOST:PORT,API_HOST:PORT", s)
		}
		if err := fleet.CheckName("node", name); err != nil {
			return nil, err
		}
		if name == "operator" {
			return nil, usage("--node %q: its folder would be that of the operator: choose another name", s)
		}
		host, _, err := net.SplitHostPort(parts[0])
		if err != nil {
			return nil, usage("--node %q: %q is not HOST:PORT", s, parts[0])
		}
		n := nodeSpec{name: name, raft: parts[0], api: parts[1], metrics: net.JoinHostPort("127.0.0.1", strconv.Itoa(7480+10*beside[host]))}
		if len(parts) == 3 {
			n.metrics = parts[2]
		}
		beside[host]++
		out = append(out, n)
	}
	if len(out) != 1 && len(out) != 3 && len(out) != 5 {
		return nil, usage("give --node once for each of 1, 3 or 5 nodes, not %d", len(out))
	}
	return out, nil
}

// bind is where a node listens so that others reach it at addr: there, where that is an address, else on all.
func bind(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr // refused with its line when the file is read
	}
	if _, err := netip.ParseAddr(host); err != nil && host != "localhost" {
		host = "0.0.0.0"
	}
	return net.JoinHostPort(host, port)
}

// folder is where init writes; it refuses to overwrite.
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

// create is [smallfile.Create], with a sentence about what is wrong.
func create(path string, b []byte, mode fs.FileMode) error {
	return writing(path, smallfile.Create(path, b, mode))
}

// creatable returns the error that [create] would return now, and leaves nothing behind.
func creatable(path string) error { return writing(path, smallfile.CanCreate(path)) }

// writing says why a new file could not be written.
func writing(path string, err error) error {
	const op = "demarc.create"
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrExist):
		return fault.New(op, fault.Conflict, "%s is there already: nothing is overwritten", path)
	}
	return fault.Because(err, op, fault.Unavailable, "can't write %s: %s", path, fault.Disk(err))
}

func (a *app) initTrustDomain(in initOptions) error {
	specs, err := in.check()
	if err != nil {
		return err
	}
	if err := in.whole(func(f folder) error { return in.write(f, specs, time.Now()) }); err != nil {
		return err
	}
	f := folder{in.dir}
	doc := map[string]any{"trust_domain": in.domain, "dir": in.dir, "development": in.development, "nodes": len(specs), "operator": in.operator,
		"operator_file": f.path("operator", "operator.yaml"), "bundle": f.path("bundle.pem"), "release_key": f.path("operator", "signing.pub"), "request_key": f.path("operator", "request.pub"), "log_key": f.path("log.pub")}
	nodes := "one node"
	if len(specs) > 1 {
		nodes = strconv.Itoa(len(specs)) + " nodes"
	}
	return a.emit(doc, func(w io.Writer) {
		fmt.Fprintf(w, "trust domain %s%s with %s is in %s\nstart each node with its own file:\n", in.domain, forDevelopment(in.development), nodes, in.dir)
		for _, n := range specs {
			fmt.Fprintf(w, "  demarcd run -c %s\n", f.path(n.name, "node.yaml"))
		}
		fmt.Fprint(w, "what a customer's file needs of this, beside bundle.pem:\n"+vendorKeys(f.path("operator", "signing.pub"), in.operator, f.path("operator", "request.pub")))
		fmt.Fprintf(w, "then, as %s:\n  export DEMARC_CONTEXT=%s\n  demarc status\n", in.operator, f.path("operator", "operator.yaml"))
	})
}

// check finds what is wrong before anything is made.
func (in *initOptions) check() ([]nodeSpec, error) {
	if in.dir == "" || in.domain == "" {
		return nil, usage("give --dir and --trust-domain")
	}
	if (in.managementURL == "") != (in.managementCA == "") || (in.tailnetURL == "") != (in.tailnetKey == "") {
		return nil, usage("--management-url goes with --management-ca, and --tailnet-url with --tailnet-auth-key-file")
	}
	if in.managementName == "" {
		in.managementName, _, _ = strings.Cut(in.domain, ".")
	}
	specs, err := in.specs()
	if err != nil {
		return nil, err
	}
	if err := identity.CheckTrustDomain(in.domain); err != nil {
		return nil, err
	}
	return specs, fleet.CheckName("operator", in.operator)
}

// whole makes the folder with all that do writes into it, or nothing. A folder that holds anything is left alone.
func (in *initOptions) whole(do func(folder) error) error {
	const op = "demarc.init"
	switch left, err := os.ReadDir(in.dir); {
	case err == nil && len(left) > 0:
		return fault.New(op, fault.Conflict, "%s is not empty: nothing is overwritten", in.dir)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fault.Because(err, op, fault.Unavailable, "%s can't be used as a folder", in.dir)
	}
	abs, err := filepath.Abs(in.dir)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	if err := os.MkdirAll(filepath.Dir(abs), 0o755); err != nil {
		return fault.Because(err, op, fault.Unavailable, "the folder of %s can't be made", in.dir)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(abs), ".init-*") // mode 0700
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't write beside %s", in.dir)
	}
	defer os.RemoveAll(tmp)
	if err := do(folder{tmp}); err != nil {
		return err
	}
	_ = os.Remove(abs) // an empty folder; anything else stays, and then the rename says so
	if err := os.Rename(tmp, abs); err != nil {
		return fault.Because(err, op, fault.Conflict, "%s can't be made: something else came to be there", in.dir)
	}
	return nil
}

// write draws all keys and writes all files.
func (in *initOptions) write(f folder, specs []nodeSpec, now time.Time) error {
	const op = "demarc.init"
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
	bundle, err := identity.BundlePEM(slots)
	if err != nil {
		return err
	}
	logKey, err := controlplane.LogKey(kek)
	if err != nil {
		return err
	}
	if err := errors.Join(f.write(kek, 0o600, "kek"), f.write(bundle, 0o644, "bundle.pem"), f.write(logKey, 0o644, "log.pub")); err != nil {
		return err
	}
	if in.managementCA != "" {
		b, err := readBounded(in.managementCA, identity.MaxBundle)
		if err != nil {
			return err
		}
		if err := f.write(b, 0o644, "management.pem"); err != nil {
			return err
		}
	}
	for _, n := range specs {
		if err := in.writeNode(f, ca, n, specs, now); err != nil {
			return err
		}
	}
	cert, err := in.writeOperator(f, ca, specs, now)
	if err != nil {
		return err
	}
	genesis, err := json.Marshal(book.GenesisWith{Genesis: book.Genesis{TrustDomain: in.domain, Slots: slots, Development: in.development},
		Operator: book.FirstOperator{Name: in.operator, Serial: identity.SerialOf(cert), Till: cert.NotAfter, Issuer: slots[0].ID()}})
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	return f.write(genesis, 0o600, "genesis.json")
}

// leaf issues a certificate and writes it with its key.
func leaf(f folder, ca *identity.Authority, who fleet.Principal, now time.Time, names []string, ips []netip.Addr, parts ...string) (*x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fault.At("demarc.leaf", fault.Internal, err)
	}
	der, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := identity.ParseCSR(der)
	if err != nil {
		return nil, err
	}
	cert, err := ca.Issue(csr, who, now, firstLife, identity.IssueOptions{Rand: rand.Reader, DNSNames: names, IPs: ips})
	if err != nil {
		return nil, err
	}
	pemKey, err := keyPEM(key)
	if err != nil {
		return nil, err
	}
	return cert, errors.Join(f.write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o644, append(parts, "cert.pem")...),
		f.write(pemKey, 0o600, append(parts, "cert.key")...))
}

func keyPEM(k crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fault.At("demarc.keyPEM", fault.Internal, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func (in *initOptions) writeNode(f folder, ca *identity.Authority, n nodeSpec, all []nodeSpec, now time.Time) error {
	if _, err := leaf(f, ca, fleet.PrincipalOf(in.domain, fleet.Node, n.name), now, nil, nil, n.name); err != nil {
		return err
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "version: %s\nrole: %s\nname: %s\ntrust_domain: %s\ndir: data\nlisten: %q\nraft: {listen: %q}\ncluster:\n",
		configs.Version, configs.RoleControl, n.name, in.domain, bind(n.api), bind(n.raft))
	for _, m := range all {
		fmt.Fprintf(&b, "  - {name: %s, raft: %q, api: %q}\n", m.name, m.raft, m.api)
	}
	fmt.Fprintf(&b, "kek_file: ../kek\ncertificate: {file: cert.pem, key: cert.key, bundle: ../bundle.pem}\ngenesis: ../genesis.json\n")
	fmt.Fprintf(&b, "metrics: {listen: %q}\n", n.metrics)
	if in.managementURL != "" {
		fmt.Fprintf(&b, "management: {url: %q, ca_file: ../management.pem, name: %q}\n", in.managementURL, in.managementName)
	}
	if in.tailnetURL != "" {
		key, err := filepath.Abs(in.tailnetKey)
		if err != nil {
			return fault.At("demarc.init", fault.Internal, err)
		}
		fmt.Fprintf(&b, "tailnet: {control_url: %q, auth_key_file: %q, hostname: %s}\n", in.tailnetURL, key, n.name)
	}
	if _, err := configs.Parse(filepath.Join(in.dir, n.name, "node.yaml"), b.Bytes(), nil); err != nil {
		return err // an address that is none, with its line
	}
	return f.write(b.Bytes(), 0o644, n.name, "node.yaml")
}

func (in *initOptions) writeOperator(f folder, ca *identity.Authority, all []nodeSpec, now time.Time) (*x509.Certificate, error) {
	cert, err := leaf(f, ca, fleet.PrincipalOf(in.domain, fleet.Operator, in.operator), now, nil, nil, "operator")
	if err != nil {
		return nil, err
	}
	own, err := drawKeys()
	if err != nil {
		return nil, err
	}
	o := operator{TrustDomain: in.domain, Name: in.operator, Certificate: "cert.pem", Key: "cert.key", Bundle: "../bundle.pem", LogKey: "../log.pub", SigningKey: "signing.key", RequestKey: "request.key", RecipientKey: "recipient.key"}
	for _, n := range all {
		o.Nodes = append(o.Nodes, n.api)
	}
	file, err := yaml.Marshal(o)
	if err != nil {
		return nil, fault.At("demarc.init", fault.Internal, err)
	}
	err = f.write(file, 0o600, "operator", "operator.yaml")
	for _, k := range own.files() {
		err = errors.Join(err, f.write(k.b, k.mode, "operator", k.what))
	}
	return cert, err
}

// ownKeys is what an operator has beside the certificate. Releases and requests have a key each: who may sign the one is not
// therefore let in for the other.
type ownKeys struct{ release, request, recipient keyPair }

type keyPair struct{ private, public []byte }

// keyFile is one file of an operator's keys; what names it.
type keyFile struct {
	what string
	b    []byte
	mode fs.FileMode
}

func (k ownKeys) files() []keyFile {
	return []keyFile{{"signing.key", k.release.private, 0o600}, {"signing.pub", k.release.public, 0o644}, {"request.key", k.request.private, 0o600},
		{"request.pub", k.request.public, 0o644}, {"recipient.key", k.recipient.private, 0o600}}
}

func drawKeys() (k ownKeys, err error) {
	if k.release, err = drawSigner(); err != nil {
		return k, err
	}
	if k.request, err = drawSigner(); err != nil {
		return k, err
	}
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return k, fault.At("demarc.keys", fault.Internal, err)
	}
	k.recipient.private = []byte(id.String() + "\n")
	return k, nil
}

func drawSigner() (keyPair, error) {
	const op = "demarc.keys"
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return keyPair{}, fault.At(op, fault.Internal, err)
	}
	k, err := seal.KeyOf(pub)
	if err != nil {
		return keyPair{}, err
	}
	private, err := keyPEM(priv)
	return keyPair{private, k.PEM()}, err
}

// vendorKeys is the part of an appliance's file that lets a vendor's keys in.
func vendorKeys(release, operator, request string) string {
	out := "  control_plane:\n"
	if release != "" {
		out += fmt.Sprintf("    release_keys: [%q]\n", release)
	}
	if request != "" {
		out += fmt.Sprintf("    operators:\n      - {name: %s, keys: [%q]}\n", operator, request)
	}
	return out
}
