// SPDX-License-Identifier: Apache-2.0

package runbooks

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
	"github.com/demarc-dev/demarc/raft"
)

func (w *world) ok(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// management writes the files of a management plane that pins the key of the control plane's log, and gives the flags of init for it.
func (w *world) management(listen, metrics string) string {
	w.t.Helper()
	dir := filepath.Join(w.dir, "acme-platform")
	w.ok(os.MkdirAll(dir, 0o700))
	put := func(name, kind string, der []byte) {
		w.ok(os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	}
	make := func(c, by *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		w.ok(err)
		c.NotBefore, c.NotAfter, c.BasicConstraintsValid = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour), true
		if signer == nil {
			by, signer = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, by, key.Public(), signer)
		w.ok(err)
		c, err = x509.ParseCertificate(der)
		w.ok(err)
		return c, key
	}
	ca, signer := make(&x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, KeyUsage: x509.KeyUsageCertSign}, nil, nil)
	leaf, key := make(&x509.Certificate{SerialNumber: big.NewInt(2), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}, ca, signer)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	w.ok(err)
	put("ca.pem", "CERTIFICATE", ca.Raw)
	put("cert.pem", "CERTIFICATE", leaf.Raw)
	put("cert.key", "PRIVATE KEY", der)
	w.ok(os.WriteFile(filepath.Join(dir, "node.yaml"), fmt.Appendf(nil, "version: demarc/1\nrole: management-plane\nname: platform\ndir: "+
		"data\nlisten: %q\n"+
		"certificate: {file: cert.pem, key: cert.key, bundle: ca.pem}\ncontrol_planes:\n  - {name: acme, trust_domain: acme.example, "+
		"log_key_file: ../log.pub}\nsocket: m.sock\nmetrics: {listen: %q}\n", listen, metrics), 0o600))
	w.platform = listen
	return " --management-url https://" + listen + " --management-ca acme-platform/ca.pem --management-name acme"
}

// short moves the management plane's files to where its unit looks for them, and has certificates live short, so that appliances renew
// often.
func (w *world) short() {
	w.t.Helper()
	w.ok(os.Rename(filepath.Join(w.dir, "acme-platform"), filepath.Join(w.dir, "acme", "management")))
	for _, n := range []string{"cp-1", "cp-2", "cp-3"} {
		f, err := os.OpenFile(filepath.Join(w.dir, "acme", n, "node.yaml"), os.O_WRONLY|os.O_APPEND, 0)
		w.ok(err)
		_, err = f.WriteString("leaf: {life: 8m}\n")
		w.ok(err)
		w.ok(f.Close())
	}
}

// operators invites some, who accept.
func (w *world) operators(all string) {
	w.t.Helper()
	for one := range strings.FieldsSeq(all) {
		name, role, _ := strings.Cut(one, "=")
		w.run(fmt.Sprintf("demarc operator invite %s --role %s --valid 24h --out %s.invitation\ndemarc operator accept %s.invitation --out "+
			"%s.yaml\n", name, role, name, name, name))
	}
}

// renewing is an operator who renews all the time.
type renewing struct {
	stop chan struct{}
	done sync.WaitGroup

	mu     sync.Mutex
	times  int
	failed []string
}

func (w *world) renews(name string) {
	r := &renewing{stop: make(chan struct{})}
	w.renewing[name] = r
	r.done.Go(func() {
		for {
			select {
			case <-r.stop:
				return
			default:
			}
			out, err := w.shell("export DEMARC_CONTEXT=" + name + ".yaml\ndemarc operator renew\ndemarc status\n")
			r.mu.Lock()
			if r.times++; err != nil {
				r.failed = append(r.failed, out)
			}
			r.mu.Unlock()
		}
	})
}

// renewed looks how an operator fared who renewed all the time: no call failed.
func (w *world) renewed(name string) {
	w.t.Helper()
	r := w.renewing[name]
	r.mu.Lock()
	defer r.mu.Unlock()
	w.t.Logf("%s renewed %d times", name, r.times)
	if r.times < 3 || len(r.failed) > 0 {
		w.t.Errorf("%s renewed %d times, and %d failed: %s", name, r.times, len(r.failed), strings.Join(r.failed, "\n"))
	}
}

// settled ends what goes on beside the page.
func (w *world) settled() {
	for name, r := range w.renewing {
		close(r.stop)
		r.done.Wait()
		delete(w.renewing, name)
	}
	if w.thief != nil {
		w.thief.leave()
		w.thief = nil
	}
}

type authorities struct {
	Bundle      uint64 `json:"bundle_number"`
	Authorities []struct {
		Stage                 string
		Appliances, Operators int
	}
	Missing []struct {
		Name, Kind string
		Online     bool
	}
}

func (w *world) authorities() (out authorities, err error) {
	text, err := w.shell("demarc ca status --output json\n")
	if err != nil {
		return out, fmt.Errorf("%w: %s", err, text)
	}
	return out, json.Unmarshal([]byte(text), &out)
}

// missing waits until exactly these operators are missing, and nobody else who is waited for.
func (w *world) missing(want string) {
	w.t.Helper()
	if want == "nobody" {
		want = ""
	}
	w.until(want, func() (string, error) {
		all, err := w.authorities()
		var names []string
		for _, m := range all.Missing {
			switch {
			case !m.Online:
			case m.Kind == "operator":
				names = append(names, m.Name)
			default:
				names = append(names, m.Kind+" "+m.Name)
			}
		}
		slices.Sort(names)
		return strings.Join(names, " "), err
	})
}

// unused waits until nobody uses a certificate of the CA of a stage.
func (w *world) unused(stage string) {
	w.t.Helper()
	w.until("0 appliances, 0 operators", func() (string, error) {
		all, err := w.authorities()
		appliances, operators := 0, 0
		for _, a := range all.Authorities {
			if a.Stage == stage {
				appliances, operators = appliances+a.Appliances, operators+a.Operators
			}
		}
		return fmt.Sprintf("%d appliances, %d operators", appliances, operators), err
	})
}

func (w *world) until(want string, is func() (string, error)) {
	w.t.Helper()
	began := time.Now()
	for {
		got, err := is()
		if err == nil && got == want {
			w.t.Logf("%s: %q", time.Since(began).Round(time.Millisecond), want)
			return
		}
		if time.Since(began) > 4*time.Minute {
			w.t.Fatalf("%q after 4 minutes, want %q: %v", got, want, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// works has operators make a call; "operator" is the first one.
func (w *world) works(names ...string) {
	w.t.Helper()
	for _, name := range names {
		file := name + ".yaml"
		if name == "operator" {
			file = "acme/operator/operator.yaml"
		}
		w.run("demarc --context " + file + " status\n")
	}
}

// refused has an operator be told that its certificate does not count.
func (w *world) refused(name string) {
	w.t.Helper()
	out, err := w.shell("demarc --context " + name + ".yaml --timeout 10s status 2>&1\n")
	if err == nil || !strings.Contains(out, "refused this operator's certificate") ||
		!strings.Contains(out, "ask an admin for an invitation") {
		w.t.Fatalf("%s: %v %s", name, err, out)
	}
	w.t.Logf("%s: %s", name, out)
}

// managed waits until the management plane has heard of the control plane after now, recognised by the newest bundle.
func (w *world) managed() {
	w.t.Helper()
	all, err := w.authorities()
	w.ok(err)
	since := time.Now().Unix()
	w.until("acme ok", func() (string, error) {
		text, err := w.shell("demarc management list --socket acme/management/m.sock --output json\n")
		if err != nil {
			return text, err
		}
		var doc struct {
			ControlPlanes []struct {
				Name   string
				Last   *struct{ Health string }
				Seen   int64 `json:"seen_unix"`
				Bundle uint64
			} `json:"control_planes"`
		}
		if err := json.Unmarshal([]byte(text), &doc); err != nil {
			return text, err
		}
		if c := doc.ControlPlanes; len(c) == 1 && c[0].Last != nil && c[0].Seen > since && c[0].Bundle == all.Bundle {
			return c[0].Name + " " + c[0].Last.Health, nil
		}
		return text, nil
	})
	w.run("demarc management list --socket acme/management/m.sock\n")
}

// thief has the key of the first CA, and copies of an operator's and an appliance's files.
type thief struct {
	w    *world
	open map[string]*held
}

type held struct {
	net.Conn
	once  sync.Once
	ended chan struct{}
}

// Read implements [net.Conn]; its error is the end.
func (h *held) Read(b []byte) (int, error) {
	n, err := h.Conn.Read(b)
	if err != nil {
		h.once.Do(func() { close(h.ended) })
	}
	return n, err
}

func (w *world) steals(what string) {
	w.t.Helper()
	switch what {
	case "stays":
		w.thief.look(false)
	case "out":
		w.thief.look(true)
		w.thief.knocks()
	default:
		w.managed() // so that its door knows the CA
		w.thief = &thief{w: w, open: map[string]*held{}}
		w.thief.enter(what)
	}
}

// ca is the key of the CA of init.
func (x *thief) ca() *identity.Authority {
	x.w.t.Helper()
	b, err := os.ReadFile(filepath.Join(x.w.dir, "acme", "genesis.json"))
	x.w.ok(err)
	var g book.GenesisWith
	x.w.ok(json.Unmarshal(b, &g))
	kek, err := os.ReadFile(filepath.Join(x.w.dir, "acme", "kek"))
	x.w.ok(err)
	ca, err := identity.OpenAuthority(g.Slots[0].CertDER, g.Slots[0].SealedKey, kek)
	x.w.ok(err)
	return ca
}

func (x *thief) node() *tls.Certificate {
	x.w.t.Helper()
	leaf, err := identitytest.Leaf(x.ca(), fleet.PrincipalOf("acme.example", fleet.Node, "cp-2"), time.Now(), time.Hour)
	x.w.ok(err)
	return leaf
}

// addresses of cp-1.
func (x *thief) self() (api, peers string) {
	cfg, err := configs.Load(filepath.Join(x.w.dir, "acme", "cp-1", "node.yaml"), nil)
	x.w.ok(err)
	self := cfg.(*configs.Control).Self()
	return self.API, self.Raft
}

// dial shows a certificate and reports whether it was taken, if it is to look at the first byte of the answer.
func (x *thief) dial(cert *tls.Certificate, addr, proto string, look bool) (*tls.Conn, bool) {
	c, err := tls.Dial("tcp", addr, &tls.Config{NextProtos: []string{proto}, InsecureSkipVerify: true, // who answers is not the question here
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }})
	if err != nil {
		return nil, false
	}
	if !look {
		return c, true
	}
	wait := 20 * time.Second
	if proto == raft.ProtoRaft {
		wait = time.Second // nobody speaks first there
	}
	if proto == raft.ProtoForward {
		_, _ = c.Write(pulse)
	}
	_ = c.SetReadDeadline(time.Now().Add(wait))
	_, err = c.Read(make([]byte, 1))
	_ = c.SetReadDeadline(time.Time{})
	if err != nil && !(proto == raft.ProtoRaft && os.IsTimeout(err)) {
		_ = c.Close()
		return nil, false
	}
	return c, true
}

// pulse is what who asks says on a line between nodes, so that it stays: the question 't' with the id 0.
var pulse = []byte{0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 't'}

// enter opens what the thief can, and finds shut what needs more than the key of the CA.
func (x *thief) enter(operator string) {
	x.w.t.Helper()
	api, peers := x.self()
	stolen, err := tls.LoadX509KeyPair(filepath.Join(x.w.dir, operator+".cert.pem"), filepath.Join(x.w.dir, operator+".key"))
	x.w.ok(err)
	var wallet struct{ Key, Certificate []byte }
	b, err := os.ReadFile(filepath.Join(x.w.dir, "acme", "eu-1", "data", "wallet.json"))
	x.w.ok(err)
	x.w.ok(json.Unmarshal(b, &wallet))
	key, err := x509.ParsePKCS8PrivateKey(wallet.Key)
	x.w.ok(err)
	appliance := tls.Certificate{Certificate: [][]byte{wallet.Certificate}, PrivateKey: key}
	for name, way := range map[string]struct {
		cert        *tls.Certificate
		addr, proto string
	}{
		"a stolen operator's calls":            {&stolen, api, "h2"},
		"a stolen appliance's calls":           {&appliance, api, "h2"},
		"a forged node's calls":                {x.node(), api, "h2"},
		"a forged node's proposals":            {x.node(), peers, raft.ProtoForward},
		"a forged node's log":                  {x.node(), peers, raft.ProtoRaft},
		"a forged node at the platform's door": {x.node(), x.w.platform, "h2"},
	} {
		c, taken := x.dial(way.cert, way.addr, way.proto, way.proto != "h2")
		if !taken {
			x.w.t.Fatalf("%s: refused, and nothing is to be shown", name)
		}
		h := &held{Conn: c, ended: make(chan struct{})}
		x.open[name] = h
		if way.proto == "h2" {
			calls, err := (&http2.Transport{}).NewClientConn(h) // it answers pings: the connection stays as long as the server lets it
			if err == nil {
				err = calls.Ping(x.w.t.Context())
			}
			if err != nil {
				x.w.t.Fatalf("%s: %v, and nothing is to be shown", name, err)
			}
			continue
		}
		go func() { _, _ = io.Copy(io.Discard, h) }()
		if way.proto == raft.ProtoForward {
			go func() {
				for tick := time.NewTicker(time.Second); ; {
					select {
					case <-h.ended:
						tick.Stop()
						return
					case <-tick.C:
						_, _ = c.Write(pulse)
					}
				}
			}()
		}
	}
	for name, of := range map[string]tls.Certificate{"operator": stolen, "appliance": appliance} { // the same in all but for the key
		like, err := x509.ParseCertificate(of.Certificate[0])
		x.w.ok(err)
		own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		x.w.ok(err)
		ca := x.ca()
		der, err := x509.CreateCertificate(rand.Reader, like, ca.Cert, own.Public(), ca.Key)
		x.w.ok(err)
		if _, taken := x.dial(&tls.Certificate{Certificate: [][]byte{der}, PrivateKey: own}, api, "h2", true); taken {
			x.w.t.Errorf("a forged %s is taken", name)
		}
	}
}

// look says whether all that the thief has opened has ended, or none of it.
func (x *thief) look(ended bool) {
	x.w.t.Helper()
	began := time.Now()
	for name, h := range x.open {
		wait := time.After(0)
		if ended {
			wait = time.After(30 * time.Second)
		}
		select {
		case <-h.ended:
			if !ended {
				x.w.t.Errorf("%s: ended before the CA was retired", name)
			}
			x.w.t.Logf("%s: ended within %s", name, time.Since(began).Round(time.Millisecond))
		case <-wait:
			if ended {
				x.w.t.Errorf("%s: still open", name)
			}
		}
	}
}

// knocks finds everything shut.
func (x *thief) knocks() {
	x.w.t.Helper()
	api, peers := x.self()
	for proto, addr := range map[string]string{"h2": api, raft.ProtoForward: peers, raft.ProtoRaft: peers} {
		if _, taken := x.dial(x.node(), addr, proto, true); taken {
			x.w.t.Errorf("a forged node is taken for %s", proto)
		}
	}
	if _, taken := x.dial(x.node(), x.w.platform, "h2", true); taken {
		x.w.t.Error("a forged node is taken at the platform's door")
	}
}

func (x *thief) leave() {
	for _, h := range x.open {
		_ = h.Conn.Close()
		<-h.ended
	}
}
