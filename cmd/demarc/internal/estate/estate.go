// SPDX-License-Identifier: Apache-2.0

// Package estate is the files with which a vendor's control plane begins.
//
// The promise: each folder under nodes is all that one machine needs, and the folder of the operator is all that a
// person needs; no file is written over another, and either all are written or none.
//
//	DIR/
//	  bundle.pem                   for appliances: the CAs that the vendor is recognised by
//	  release-key.pem              for appliances: who may sign releases and ask for operations
//	  nodes/NAME/demarcd.yaml      with node.crt node.key bundle.pem kek genesis.json beside it
//	  operators/NAME/operator.yaml with operator.crt operator.key bundle.pem signing.key recipient.key beside it
//
// The private key of the CA is in no file in the clear: genesis.json holds it sealed with the kek.
package estate

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"net"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/demarc-dev/demarc/cmd/demarc/internal/keyfile"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// Node is one node of the first cluster.
type Node struct {
	Name, Raft, API string
	Metrics         string // "" for a port on 127.0.0.1 that no other node of that machine has
}

// Options is what a control plane begins with.
type Options struct {
	TrustDomain    string
	Nodes          []Node // 1, 3 or 5
	Operator       string
	Management     string // URL of the management plane, "" for none
	ManagementCA   []byte // PEM, with Management
	ManagementName string // of this control plane there; the first label of the trust domain where it is ""
	CertificateTTL time.Duration
	Now            time.Time
}

// File is one file of an estate, by its path below the folder.
type File struct {
	Path    string
	Private bool
	Bytes   []byte
}

// genesis is the struct of that name in daemon/controlplane.
type genesis struct {
	TrustDomain string          `json:"trust_domain"`
	Slots       []identity.Slot `json:"slots"`
}

// maker is an estate while it is made.
type maker struct {
	Options
	ca     *identity.Authority
	kek    []byte
	bundle []byte
	begin  []byte // genesis.json
	files  []File
}

// ParseNode reads NAME=RAFT_ADDR,API_ADDR[,METRICS_ADDR].
func ParseNode(s string) (Node, error) {
	name, rest, ok := strings.Cut(s, "=")
	parts := strings.Split(rest, ",")
	if !ok || len(parts) < 2 || len(parts) > 3 {
		return Node{}, fault.New("estate.ParseNode", fault.Invalid, "node %q: write NAME=RAFT_ADDR,API_ADDR, for instance cp-1=10.0.0.1:7444,cp-1.acme.example:7443", s)
	}
	n := Node{Name: name, Raft: parts[0], API: parts[1]}
	if len(parts) == 3 {
		n.Metrics = parts[2]
	}
	for _, a := range parts {
		if _, _, err := hostPort(a); err != nil {
			return Node{}, fault.Because(err, "estate.ParseNode", fault.Invalid, "node %q: %q is not host:port", name, a)
		}
	}
	return n, fleet.CheckName("node", name)
}

func hostPort(s string) (host string, port uint16, err error) {
	host, p, err := net.SplitHostPort(s)
	if err != nil {
		return "", 0, err
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err == nil && (host == "" || n == 0) {
		err = fault.New("estate.hostPort", fault.Invalid, "a host and a port are needed")
	}
	return host, uint16(n), err
}

// Make draws all keys and gives all files; it writes nothing.
func Make(o Options) ([]File, error) {
	m := &maker{Options: o}
	if err := m.check(); err != nil {
		return nil, err
	}
	for _, step := range []func() error{m.authority, m.nodes, m.operator} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return m.files, nil
}

func (m *maker) check() error {
	const op = "estate.Make"
	if err := identity.CheckTrustDomain(m.TrustDomain); err != nil {
		return err
	}
	if err := fleet.CheckName("operator", m.Operator); err != nil {
		return err
	}
	if n := len(m.Nodes); n != 1 && n != 3 && n != 5 {
		return fault.New(op, fault.Invalid, "%d nodes: a control plane begins with 1, 3 or 5", n)
	}
	if (m.Management == "") != (len(m.ManagementCA) == 0) {
		return fault.New(op, fault.Invalid, "the management plane needs both its URL and the CA that it is recognised by")
	}
	if m.CertificateTTL <= 0 {
		return fault.New(op, fault.Invalid, "certificates must live longer than %s", m.CertificateTTL)
	}
	if m.ManagementName == "" {
		m.ManagementName, _, _ = strings.Cut(m.TrustDomain, ".")
	}
	m.Nodes = slices.Clone(m.Nodes)
	on := map[string]int{} // nodes on one machine, as where they meet tells
	for i, n := range m.Nodes {
		host, _, err := hostPort(n.Raft)
		if err != nil {
			return fault.Because(err, op, fault.Invalid, "node %q: %q is not host:port", n.Name, n.Raft)
		}
		if n.Metrics == "" {
			m.Nodes[i].Metrics = net.JoinHostPort("127.0.0.1", strconv.Itoa(7480+10*on[host]))
		}
		on[host]++
	}
	return nil
}

// add puts a file into the estate.
func (m *maker) add(name string, private bool, b []byte) {
	m.files = append(m.files, File{Path: name, Private: private, Bytes: b})
}

func (m *maker) authority() (err error) {
	if m.ca, err = identity.NewCA(m.TrustDomain, m.Now, rand.Reader, identity.DefaultCALife); err != nil {
		return err
	}
	m.kek = make([]byte, 32)
	if _, err := rand.Read(m.kek); err != nil {
		return fault.At("estate.Make", fault.Internal, err)
	}
	sealed, err := m.ca.SealKey(m.kek, rand.Reader)
	if err != nil {
		return err
	}
	slots, err := identity.Prepare(nil, m.ca.Cert.Raw, sealed)
	if err != nil {
		return err
	}
	if slots, err = identity.Activate(slots, slots[0].ID()); err != nil {
		return err
	}
	if m.bundle, err = identity.BundlePEM(slots); err != nil {
		return err
	}
	m.begin, err = json.Marshal(genesis{m.TrustDomain, slots})
	m.add("bundle.pem", false, m.bundle)
	return err
}

// leaf issues a certificate with a fresh key.
func (m *maker) leaf(role fleet.Role, name string, hosts ...string) (cert, key []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fault.At("estate.leaf", fault.Internal, err)
	}
	der, err := identity.NewCSR(k, rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	csr, err := identity.ParseCSR(der)
	if err != nil {
		return nil, nil, err
	}
	extra := identity.IssueOptions{Rand: rand.Reader}
	slices.Sort(hosts)
	for _, h := range slices.Compact(hosts) {
		if ip, err := netip.ParseAddr(h); err == nil {
			extra.IPs = append(extra.IPs, ip)
		} else {
			extra.DNSNames = append(extra.DNSNames, h)
		}
	}
	c, err := m.ca.Issue(csr, fleet.PrincipalOf(m.TrustDomain, role, name), m.Now, m.CertificateTTL, extra)
	if err != nil {
		return nil, nil, err
	}
	if key, err = keyfile.PEM(k); err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}), key, nil
}

func (m *maker) nodes() error {
	for _, n := range m.Nodes {
		if err := fleet.CheckName("node", n.Name); err != nil {
			return err
		}
		raft, _, err := hostPort(n.Raft)
		if err != nil {
			return err
		}
		api, _, err := hostPort(n.API)
		if err != nil {
			return err
		}
		cert, key, err := m.leaf(fleet.Node, n.Name, raft, api)
		if err != nil {
			return err
		}
		conf, err := m.nodeConfig(n)
		if err != nil {
			return err
		}
		dir := path.Join("nodes", n.Name)
		m.add(path.Join(dir, "demarcd.yaml"), false, conf)
		m.add(path.Join(dir, "node.crt"), false, cert)
		m.add(path.Join(dir, "node.key"), true, key)
		m.add(path.Join(dir, "bundle.pem"), false, m.bundle)
		m.add(path.Join(dir, "kek"), true, m.kek)
		m.add(path.Join(dir, "genesis.json"), true, m.begin)
		if m.Management != "" {
			m.add(path.Join(dir, "management.pem"), false, m.ManagementCA)
		}
	}
	return nil
}

func (m *maker) operator() error {
	const op = "estate.operator"
	cert, key, err := m.leaf(fleet.Operator, m.Operator)
	if err != nil {
		return err
	}
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	sign, err := keyfile.PEM(crypto.Signer(priv))
	if err != nil {
		return err
	}
	public, err := seal.KeyOf(pub)
	if err != nil {
		return err
	}
	recipient, err := age.GenerateX25519Identity()
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	conf, err := m.operatorConfig()
	if err != nil {
		return err
	}
	dir := path.Join("operators", m.Operator)
	m.add("release-key.pem", false, public.PEM())
	m.add(path.Join(dir, "operator.yaml"), false, conf)
	m.add(path.Join(dir, "operator.crt"), false, cert)
	m.add(path.Join(dir, "operator.key"), true, key)
	m.add(path.Join(dir, "bundle.pem"), false, m.bundle)
	m.add(path.Join(dir, "signing.key"), true, sign)
	m.add(path.Join(dir, "recipient.key"), true, bytes.Join([][]byte{[]byte("# public key: " + recipient.Recipient().String()), []byte(recipient.String()), nil}, []byte("\n")))
	return nil
}
