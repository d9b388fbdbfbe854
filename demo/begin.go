// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
	"github.com/demarc-dev/demarc/mesh/meshtest"
	"github.com/demarc-dev/demarc/seal"
)

const domain = "acme.example"

// trustDomain is step 1: the vendor makes a trust domain, three nodes form a cluster from a written list.
func (s *story) trustDomain() {
	s.title(1, "The vendor makes a trust domain, and three nodes form a cluster from a written list")
	os.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	os.Setenv("TS_DISABLE_PORTMAPPER", "true")
	var err error
	s.tailnet, err = meshtest.Start("demo-auth-key")
	s.must(err, "the tailnet")
	s.cleaners = append(s.cleaners, s.tailnet.Close)
	s.note("a tailnet for the demo: control server, relay and STUN on loopback, %s", s.tailnet.URL)
	key := s.write(s.tailnet.AuthKey, "tailnet.key")

	s.metrics = map[string]string{"management-plane": s.free(), "appliance": s.free()}
	managed := s.free()
	s.managementFiles(managed)
	args := []string{"control-plane", "init", "--dir", s.path("acme"), "--trust-domain", domain, "--operator", "ann", "--management-url",
		"https://" + managed,
		"--management-ca", s.path("management", "ca.pem"), "--management-name", "acme", "--tailnet-url", s.tailnet.URL, "--tailnet-auth-key-file",
		key}
	for i := range 3 {
		n := nodeAddr{fmt.Sprintf("cp-%d", i+1), s.free(), s.free(), s.free()}
		s.nodes = append(s.nodes, n)
		args = append(args, "--node", fmt.Sprintf("%s=%s,%s,%s", n.name, n.raft, n.api, n.metrics))
	}
	s.operator = s.path("acme", "operator", "operator.yaml")
	s.ok(args...)
	s.metrics["control-plane"] = s.nodes[0].metrics

	s.start("management", "run", "-c", s.path("management", "management.yaml"))
	for _, n := range s.nodes {
		s.startNode(n)
	}
	s.note("demarcd runs: a management plane, and cp-1, cp-2, cp-3 as three processes")
	s.wait("the control plane has a leader", 60*time.Second, func() bool {
		for name := range s.procs {
			s.alive(name)
		}
		return s.leader() != ""
	})
	s.ok("status")
}

func (s *story) startNode(n nodeAddr) {
	s.start(n.name, "run", "-c", s.path("acme", n.name, "node.yaml"))
}

func (s *story) leader() string {
	var st struct {
		Leader string `json:"leader"`
	}
	if !s.ask(&st, "status", "--timeout", "5s") {
		return ""
	}
	return st.Leader
}

// managementFiles makes the management plane's certificate and file: it is another party, with a CA of its own.
func (s *story) managementFiles(listen string) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.must(err, "key")
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	s.must(err, "certificate")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.must(err, "key")
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	s.must(err, "certificate")
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	s.must(err, "key")
	s.write(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})), "management", "ca.pem")
	s.write(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), "management", "cert.pem")
	s.write(string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})), "management", "cert.key")
	s.managed = s.path("management", "m.sock")
	s.write(fmt.Sprintf("version: demarc/1\nrole: management-plane\nname: platform\ndir: data\nlisten: %q\ncertificate: {file: cert.pem, "+
		"key: cert.key, bundle: ca.pem}\n"+
		"control_planes:\n  - {name: acme, trust_domain: %s, log_key_file: ../acme/log.pub}\nsocket: m.sock\nmetrics: {listen: %q}\n", listen,
		domain, s.metrics["management-plane"]), "management", "management.yaml")
}

// register is step 2: the vendor says which platform identity it expects.
func (s *story) register() {
	s.title(2, "The vendor registers a customer and the platform identity that its appliance must prove")
	var err error
	s.issuer, err = identitytest.NewIssuer("https://cluster.globex.example")
	s.must(err, "issuer")
	expect, err := json.Marshal(s.issuer.Expect("demarc", "appliance"))
	s.must(err, "expect")
	file := s.write(string(expect), "eu-1.json")
	s.ok("customer", "add", "globex")
	s.ok("appliance", "add", "eu-1", "--customer", "globex", "--expect", file)
	s.ok("appliance", "add", "us-1", "--customer", "globex", "--expect", file)
}

// applianceFile writes the customer's file.
func (s *story) applianceFile() string {
	s.platform(s.path("platform.sock"))
	s.webAddr = s.free()
	s.socket = s.path("customer", "appliance.sock")
	var apis, onTailnet []string
	for _, n := range s.nodes {
		apis = append(apis, fmt.Sprintf("%q", n.api))
		_, port, err := net.SplitHostPort(n.api)
		s.must(err, "address")
		onTailnet = append(onTailnet, fmt.Sprintf("%q", n.name+":"+port))
	}
	s.must(os.MkdirAll(s.path("customer", "secrets"), 0o700), "secrets")
	return s.write(fmt.Sprintf(`version: demarc/1
role: appliance
name: eu-1
customer: globex
trust_domain: %s
dir: data
socket: appliance.sock
control_plane:
  addresses: [%s]
  bundle_file: ../acme/bundle.pem
  release_keys: [../acme/operator/signing.pub]
  operators:
    - {name: ann, keys: [../acme/operator/request.pub]}
transports:
  - {kind: https}
  - kind: tailscale
    addresses: [%s]
    tailnet: {control_url: %q, auth_key_file: ../tailnet.key, hostname: globex-eu-1, dir: tailnet}
proof:
  kind: kubernetes
  token_command: [%q, token, %q]
runtime: {kind: process}
secrets: {kind: files, dir: secrets}
ingress:
  host: 127.0.0.1
  ports: {web: %q}
  tailnet: {control_url: %q, auth_key_file: ../tailnet.key, hostname: notes, dir: ingress-tailnet}
metrics: {listen: %q}
`, domain, strings.Join(apis, ", "), strings.Join(onTailnet, ", "), s.tailnet.URL, filepath.Join(s.bin, "demo"), s.path("platform.sock"),
		s.webAddr, s.tailnet.URL, s.metrics["appliance"]), "customer", "appliance.yaml")
}

// enrol lets the appliance come in, with nothing handed over.
func (s *story) enrol() {
	file := s.applianceFile()
	s.start("appliance", "run", "-c", file)
	s.note("demarcd runs at the customer: it proves its platform identity with a token bound to a nonce and to its key")
	took := s.wait("the appliance is enrolled and online", 60*time.Second, func() bool {
		s.alive("appliance")
		return s.seen("eu-1").Online
	})
	s.note("enrolled and online after %s; no secret was handed over", took.Round(time.Millisecond))
	s.ok("appliance", "list")
	s.nothingListens()
}

// seenAppliance is what the vendor sees of an appliance.
type seenAppliance struct {
	Name    string `json:"name"`
	Status  string `json:"status"`
	Online  bool   `json:"online"`
	Route   string `json:"route"`
	Version string `json:"version"`
	State   string `json:"state"`
	Posture string `json:"posture"`
	Release string `json:"release"`
	Why     struct {
		Kind    string `json:"kind"`
		Service string `json:"service"`
		Secret  string `json:"secret"`
	} `json:"why"`
	Services []struct {
		Name    string `json:"name"`
		Healthy bool   `json:"healthy"`
	} `json:"services"`
	Secrets []struct {
		Name    string `json:"name"`
		Present bool   `json:"present"`
	} `json:"secrets"`
}

func (s *story) seen(name string) seenAppliance {
	var a seenAppliance
	s.ask(&a, "appliance", "show", name)
	return a
}

// refusals tries to enrol us-1 in every wrong way, and once rightly.
func (s *story) refusals() {
	s.note("us-1 is tried by an enemy: each refusal has its own sentence, and is on record")
	b := s.stranger()
	own, err := seal.KeyOf(mustKey().Public())
	s.must(err, "key")
	challenge := func() (nonce string, csr []byte, audience string) {
		ch, err := b.Challenge(s.ctx, connect.NewRequest(&boundaryv1.ChallengeRequest{}))
		s.must(err, "challenge")
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		s.must(err, "key")
		csr, err = identity.NewCSR(key, rand.Reader)
		s.must(err, "csr")
		audience, err = identity.Audience(domain, ch.Msg.GetNonce(), csr)
		s.must(err, "audience")
		return ch.Msg.GetNonce(), csr, audience
	}
	try := func(what, want string, nonce string, csr []byte, token string) {
		_, err := b.Enrol(s.ctx,
			connect.NewRequest(&boundaryv1.EnrolRequest{Appliance: "us-1", Nonce: nonce, Csr: csr, Token: token, LogKey: own.PEM()}))
		got := "let in"
		if err != nil {
			got = fault.Text(api.FromWire("demo", err))
		}
		fmt.Printf("  %-18s %s\n", what, clip(got))
		if (want == "") != (err == nil) || !strings.Contains(got, want) {
			s.fail("%s: %q, want %q", what, got, want)
		}
	}
	mint := func(account, audience string, shift time.Duration) string {
		t, err := s.issuer.Mint(identitytest.EC, s.issuer.Claims("demarc", account, audience, time.Now().Add(shift)))
		s.must(err, "token")
		return t
	}
	n, csr, _ := challenge()
	try("another audience", "audience", n, csr, mint("appliance", "https://somewhere.else", 0))
	n, csr, aud := challenge()
	try("another subject", "is registered", n, csr, mint("default", aud, 0))
	n, csr, aud = challenge()
	try("an expired token", "ran out", n, csr, mint("appliance", aud, -3*time.Hour))
	n, csr, aud = challenge()
	good := mint("appliance", aud, 0)
	try("a good token", "", n, csr, good)
	try("the same again", "used before", n, csr, good)
	n, csr, _ = challenge()
	try("a body of 10 MiB", "at most", n, csr, strings.Repeat("x", 10<<20))
}

func clip(text string) string { return fault.ClipTo(text, 150) }

func mustKey() ed25519.PrivateKey {
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return k
}

// stranger speaks to the control plane without a certificate.
func (s *story) stranger() boundaryv1connect.BootstrapClient {
	cas, err := identity.ParseBundle(s.read(s.path("acme", "bundle.pem")), domain)
	s.must(err, "bundle")
	conf := identity.Client(identity.Fixed((*tls.Certificate)(nil), identity.Pool(cas)), identity.WantNode(domain), "h2")
	tr := &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}
	s.cleaners = append(s.cleaners, func() error { tr.CloseIdleConnections(); return nil })
	return boundaryv1connect.NewBootstrapClient(&http.Client{Transport: tr}, "https://"+s.nodes[0].api)
}

// transports is step 3: the transport changes under a stream of messages, and the leader is killed.
func (s *story) transports() {
	s.title(3, "The customer switches the transport while messages flow; the vendor's leader is killed")
	const count = 600
	type answer struct{ r result }
	done := make(chan answer, 1)
	probe := s.line("probe", "--appliance", "eu-1", "--count", fmt.Sprint(count), "--rate", "60", "--timeout", "90s")
	go func() {
		done <- answer{s.paste(probe)}
	}()
	fmt.Println(probe + " &")
	s.ok("transport", "use", "tailscale")
	s.wait("the vendor sees the tailnet", 20*time.Second, func() bool { return s.seen("eu-1").Route == "tailscale" })
	s.nothingListens()
	s.ok("transport", "use", "https")
	s.wait("the vendor sees https", 20*time.Second, func() bool { return s.seen("eu-1").Route == "https" })
	lead := s.leader()
	s.note("the leader %s is killed with SIGKILL", lead)
	began := time.Now()
	s.stop(lead, syscall.SIGKILL)
	next := ""
	s.wait("another leader", 30*time.Second, func() bool { next = s.leader(); return next != "" && next != lead })
	s.note("%s leads after %s", next, time.Since(began).Round(time.Millisecond))
	r := (<-done).r
	fmt.Print("  [probe] " + r.out + r.errs)
	if r.code != 0 || !strings.Contains(r.out, fmt.Sprintf("echoed %d, doubled 0, out of order 0", count)) {
		s.fail("messages were lost or doubled")
	}
	for _, n := range s.nodes {
		if n.name == lead {
			s.startNode(n)
		}
	}
	s.wait("the killed node is back", 30*time.Second, func() bool { return s.leader() != "" })
	var all []seenAppliance
	if !s.ask(&all, "appliance", "list") || len(all) != 2 {
		s.fail("the killed leader took something with it: %d appliances are registered", len(all))
	}
}

// nothingListens reads the kernel's tables: which sockets of the appliance's process could take a connection.
func (s *story) nothingListens() {
	pid := s.procs["appliance"].cmd.Process.Pid
	listeners, datagrams, err := sockets(pid)
	s.must(err, "the kernel's tables")
	for _, l := range listeners {
		if l != s.metrics["appliance"] {
			s.fail("the appliance listens on TCP %s", l)
		}
	}
	s.note("kernel tables of pid %d: no TCP listener but the metrics that the customer's file asks for (%s); UDP: %s", pid,
		s.metrics["appliance"], udpWord(datagrams))
}

func udpWord(d []string) string {
	if len(d) == 0 {
		return "none"
	}
	return strings.Join(d, ", ") + " (WireGuard of the tailnet node, inside the process: it answers only peers with a key of the tailnet)"
}
