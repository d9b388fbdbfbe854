// SPDX-License-Identifier: Apache-2.0

// Package setup is the commands that write the files of something new: a trust domain, a node, a tailnet's policy, a PrivateLink endpoint,
// a development issuer.
package setup

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
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

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/cmd/demarc/operator"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// firstLife is the life of the first certificates. A node makes its next one itself; an operator runs demarc operator renew.
const firstLife = 365 * 24 * time.Hour

// InitCommand is demarc control-plane init.
func InitCommand(a *cli.App) *cobra.Command {
	var in initOptions
	c := &cobra.Command{
		Use:   "init",
		Short: "Make a trust domain: its authority, its nodes' files, the first operator",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "init makes everything that a new control plane begins with, offline. It draws the authority's key, sealed with a\n" +
			"key-encryption key (kek) that every node needs; for each node a certificate and a file for demarcd; and the first\n" +
			"operator with a certificate, a key that signs releases, one that signs requests for operations, and one that reads\n" +
			"released output.\n\n" +
			"Give each node its own folder and the kek, over a channel that you trust. Nothing here is needed at a customer but\n" +
			"bundle.pem, operator/signing.pub (release_keys) and operator/request.pub (the operator's keys).",
		Example: "  demarc control-plane init --dir acme --trust-domain acme.example --operator ann \\\n" +
			"    --node cp-1=10.0.0.1:7444,cp-1.acme.example:7443 --node cp-2=... --node cp-3=...",
	}
	f := c.Flags()
	f.StringVar(&in.dir, "dir", "", "the folder to make")
	f.StringVar(&in.domain, "trust-domain", "", "the vendor's name in every certificate, a DNS name")
	f.StringArrayVar(&in.nodes, "node", nil, "NAME=RAFT_HOST:PORT,API_HOST:PORT[,METRICS_HOST:PORT], once for each of 1, 3 or 5 nodes")
	f.StringVar(&in.operator, "operator", "operator", "name of the first operator")
	f.BoolVar(&in.development, "development", false,
		"take appliances that prove a development identity (demarc platform dev); decided here, once and for good")
	f.StringVar(&in.managementURL, "management-url", "", "the management plane that counts and health are reported to")
	f.StringVar(&in.managementCA, "management-ca", "", "file with the certificate authority of the management plane")
	f.StringVar(&in.managementName, "management-name", "", "name of this control plane there")
	f.StringVar(&in.tailnetURL, "tailnet-url", "", "coordinator of the vendor's tailnet, for a listener on it")
	f.StringVar(&in.tailnetKey, "tailnet-auth-key-file", "", "file with an auth key of the vendor's tailnet")
	c.RunE = func(*cobra.Command, []string) error { return initTrustDomain(a, in) }
	return c
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
	sharing := map[string]int{} // nodes on one machine, by the host of their raft address
	for _, s := range in.nodes {
		name, rest, ok := strings.Cut(s, "=")
		parts := strings.Split(rest, ",")
		if !ok || len(parts) < 2 || len(parts) > 3 {
			return nil, cli.Usage("--node %q: write NAME=RAFT_HOST:PORT,API_HOST:PORT", s)
		}
		if err := fleet.CheckName("node", name); err != nil {
			return nil, err
		}
		if name == "operator" {
			return nil, cli.Usage("--node %q: its folder would be that of the operator: choose another name", s)
		}
		host, _, err := net.SplitHostPort(parts[0])
		if err != nil {
			return nil, cli.Usage("--node %q: %q is not HOST:PORT", s, parts[0])
		}
		n := nodeSpec{name: name, raft: parts[0], api: parts[1], metrics: net.JoinHostPort("127.0.0.1", strconv.Itoa(7480+10*sharing[host]))}
		if len(parts) == 3 {
			n.metrics = parts[2]
		}
		sharing[host]++
		out = append(out, n)
	}
	if len(out) != 1 && len(out) != 3 && len(out) != 5 {
		return nil, cli.Usage("give --node once for each of 1, 3 or 5 nodes, not %d", len(out))
	}
	return out, nil
}

// listenAddress is the address that a node listens on so that others reach it at addr: the same if its host is an address, else all.
func listenAddress(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr // refused with its line when the file is read
	}
	if _, err := netip.ParseAddr(host); err != nil && host != "localhost" {
		host = "0.0.0.0"
	}
	return net.JoinHostPort(host, port)
}

func initTrustDomain(a *cli.App, in initOptions) error {
	specs, err := in.check()
	if err != nil {
		return err
	}
	if err := in.atomically(func(f cli.Folder) error { return in.write(f, specs, time.Now()) }); err != nil {
		return err
	}
	f := cli.Folder(in.dir)
	file, release, request := f.Path("operator", "operator.yaml"), f.Path("operator", operator.ReleasePublic), f.Path("operator",
		operator.RequestPublic)
	doc := map[string]any{"trust_domain": in.domain, "dir": in.dir, "development": in.development, "nodes": len(specs),
		"operator":      in.operator,
		"operator_file": file, "bundle": f.Path("bundle.pem"), "release_key": release, "request_key": request, "log_key": f.Path("log.pub")}
	nodes := "one node"
	if len(specs) > 1 {
		nodes = strconv.Itoa(len(specs)) + " nodes"
	}
	return a.Emit(doc, func(w io.Writer) {
		fmt.Fprintf(w, "trust domain %s%s with %s is in %s\nstart each node with its own file:\n", in.domain, cli.ForDevelopment(in.development),
			nodes, in.dir)
		for _, n := range specs {
			fmt.Fprintf(w, "  demarcd run -c %s\n", f.Path(n.name, "node.yaml"))
		}
		fmt.Fprint(w, "what a customer's file needs of this, beside bundle.pem:\n"+operator.ForCustomers(release, in.operator, request))
		fmt.Fprintf(w, "then, as %s:\n  export DEMARC_CONTEXT=%s\n  demarc status\n", in.operator, file)
	})
}

// check finds what is wrong before anything is made.
func (in *initOptions) check() ([]nodeSpec, error) {
	if in.dir == "" || in.domain == "" {
		return nil, cli.Usage("give --dir and --trust-domain")
	}
	if (in.managementURL == "") != (in.managementCA == "") || (in.tailnetURL == "") != (in.tailnetKey == "") {
		return nil, cli.Usage("--management-url goes with --management-ca, and --tailnet-url with --tailnet-auth-key-file")
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

// atomically makes the folder with all that do writes into it, or nothing. A folder that holds anything is left alone.
func (in *initOptions) atomically(do func(cli.Folder) error) error {
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
	if err := do(cli.Folder(tmp)); err != nil {
		return err
	}
	_ = os.Remove(abs) // an empty folder; anything else stays, and then the rename says so
	if err := os.Rename(tmp, abs); err != nil {
		return fault.Because(err, op, fault.Conflict, "%s can't be made: something else came to be there", in.dir)
	}
	return nil
}

// write draws all keys and writes all files.
func (in *initOptions) write(f cli.Folder, specs []nodeSpec, now time.Time) error {
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
	logKey, err := authority.FirstLogKey(kek)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Write(kek, 0o600, "kek"), f.Write(bundle, 0o644, "bundle.pem"), f.Write(logKey, 0o644, "log.pub")); err != nil {
		return err
	}
	if in.managementCA != "" {
		b, err := cli.ReadFile(in.managementCA, identity.MaxBundle)
		if err != nil {
			return err
		}
		if err := f.Write(b, 0o644, "management.pem"); err != nil {
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
	first := book.FirstOperator{Name: in.operator, Serial: identity.SerialOf(cert), Till: cert.NotAfter, Issuer: slots[0].ID()}
	genesis, err := json.Marshal(book.GenesisWith{
		Genesis:  book.Genesis{TrustDomain: in.domain, Slots: slots, Development: in.development},
		Operator: first,
	})
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	return f.Write(genesis, 0o600, "genesis.json")
}

// issue issues a certificate and writes it with its key into a folder inside f.
func issue(f cli.Folder, ca *identity.Authority, to fleet.Principal, now time.Time, folder string) (*x509.Certificate, error) {
	key, der, err := client.NewKey()
	if err != nil {
		return nil, err
	}
	csr, err := identity.ParseCSR(der)
	if err != nil {
		return nil, err
	}
	cert, err := ca.Issue(csr, to, now, firstLife, identity.IssueOptions{Rand: rand.Reader})
	if err != nil {
		return nil, err
	}
	pemKey, err := client.KeyPEM(key)
	if err != nil {
		return nil, err
	}
	return cert, errors.Join(f.Write(client.CertificatesPEM(cert.Raw), 0o644, folder, "cert.pem"), f.Write(pemKey, 0o600, folder, "cert.key"))
}

func (in *initOptions) writeNode(f cli.Folder, ca *identity.Authority, n nodeSpec, all []nodeSpec, now time.Time) error {
	if _, err := issue(f, ca, fleet.PrincipalOf(in.domain, fleet.Node, n.name), now, n.name); err != nil {
		return err
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "version: %s\nrole: %s\nname: %s\ntrust_domain: %s\ndir: data\nlisten: %q\nraft: {listen: %q}\ncluster:\n",
		configs.Version, configs.RoleControl, n.name, in.domain, listenAddress(n.api), listenAddress(n.raft))
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
	return f.Write(b.Bytes(), 0o644, n.name, "node.yaml")
}

func (in *initOptions) writeOperator(f cli.Folder, ca *identity.Authority, all []nodeSpec, now time.Time) (*x509.Certificate, error) {
	cert, err := issue(f, ca, fleet.PrincipalOf(in.domain, fleet.Operator, in.operator), now, "operator")
	if err != nil {
		return nil, err
	}
	own, err := operator.NewKeys()
	if err != nil {
		return nil, err
	}
	o := client.Operator{
		TrustDomain: in.domain, Name: in.operator, Certificate: "cert.pem", Key: "cert.key", Bundle: "../bundle.pem", LogKey: "../log.pub",
		SigningKey: operator.SigningKey, RequestKey: operator.RequestKey, RecipientKey: operator.RecipientKey,
	}
	for _, n := range all {
		o.Nodes = append(o.Nodes, n.api)
	}
	file, err := yaml.Marshal(o)
	if err != nil {
		return nil, fault.At("demarc.init", fault.Internal, err)
	}
	err = f.Write(file, 0o600, "operator", "operator.yaml")
	for _, k := range own.Files() {
		err = errors.Join(err, f.Write(k.Bytes, k.Mode, "operator", k.Name))
	}
	return cert, err
}
