// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/configs"
	own "github.com/demarc-dev/demarc/daemon/appliance/platform"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/platform"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// cluster is a real kube-apiserver with an etcd of its own, on loopback. make test-kubernetes builds both.
type cluster struct {
	t      *testing.T
	dir    string
	etcd   string // its URL
	port   string
	issuer string
	stop   func()
	http   *http.Client
	roots  *x509.CertPool
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	bin := os.Getenv("DEMARC_KUBE_APISERVER")
	if bin == "" {
		t.Skip("DEMARC_KUBE_APISERVER is not set: make test-kubernetes")
	}
	c := &cluster{t: t, dir: t.TempDir(), port: freePort(t)}
	c.issuer = "https://127.0.0.1:" + c.port
	client, peer := freePort(t), freePort(t)
	c.etcd = "http://127.0.0.1:" + client
	c.run("etcd", filepath.Join(filepath.Dir(bin), "etcd"), "--data-dir", filepath.Join(c.dir, "etcd"), "--listen-client-urls", c.etcd, "--advertise-client-urls", c.etcd,
		"--listen-peer-urls", "http://127.0.0.1:"+peer, "--initial-advertise-peer-urls", "http://127.0.0.1:"+peer, "--initial-cluster", "default=http://127.0.0.1:"+peer)
	ok(t, os.WriteFile(filepath.Join(c.dir, "tokens.csv"), []byte(`admin,admin,1,"system:masters"`+"\n"), 0o600))
	c.key("one")
	c.key("two")
	c.key("three")
	return c
}

func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ok(t, err)
	defer ln.Close()
	_, port, err := net.SplitHostPort(ln.Addr().String())
	ok(t, err)
	return port
}

// key draws a signing key of the cluster, in two files.
func (c *cluster) key(name string) {
	c.t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	ok(c.t, err)
	pub, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	ok(c.t, err)
	ok(c.t, os.WriteFile(filepath.Join(c.dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(k)}), 0o600))
	ok(c.t, os.WriteFile(filepath.Join(c.dir, name+".pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub}), 0o600))
}

// run starts a process; it gives what ends it, and a channel that is closed when it has ended by itself.
func (c *cluster) run(name, path string, args ...string) (func(), <-chan struct{}) {
	c.t.Helper()
	log := &bytes.Buffer{}
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	ok(c.t, cmd.Start())
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	end := func() {
		_ = cmd.Process.Kill()
		<-ended
	}
	c.t.Cleanup(func() {
		end()
		if c.t.Failed() {
			b := log.Bytes()
			c.t.Logf("%s:\n%s", name, b[max(0, len(b)-3000):])
		}
	})
	return end, ended
}

// serve starts the API server, or starts it again: it signs with the first key and publishes all of them.
func (c *cluster) serve(keys ...string) {
	c.t.Helper()
	if c.stop != nil {
		c.stop()
	}
	certs := filepath.Join(c.dir, "certs")
	args := []string{"--etcd-servers", c.etcd, "--secure-port", c.port, "--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1", "--endpoint-reconciler-type", "none", "--cert-dir", certs,
		"--service-account-issuer", c.issuer, "--service-account-jwks-uri", c.issuer + "/openid/v1/jwks", "--service-account-signing-key-file", filepath.Join(c.dir, keys[0]+".key"),
		"--token-auth-file", filepath.Join(c.dir, "tokens.csv"), "--authorization-mode", "RBAC", "--service-cluster-ip-range", "10.96.0.0/16", "--disable-admission-plugins", "ServiceAccount"}
	for _, k := range keys {
		args = append(args, "--service-account-key-file", filepath.Join(c.dir, k+".pub"))
	}
	stop, ended := c.run("kube-apiserver", os.Getenv("DEMARC_KUBE_APISERVER"), args...)
	c.stop = stop
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(2 * time.Minute); ; <-tick.C {
		select {
		case <-ended:
			c.t.Fatal("the API server ended")
		default:
		}
		if time.Now().After(end) {
			c.t.Fatal("the API server is not ready in time")
		}
		pool := x509.NewCertPool()
		if b, err := os.ReadFile(c.ca()); err != nil || !pool.AppendCertsFromPEM(b) {
			continue
		}
		c.roots = pool
		c.http = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: pool}}}
		if status, _, err := c.call(http.MethodGet, "/readyz", nil); err == nil && status == http.StatusOK {
			return
		}
	}
}

func (c *cluster) ca() string { return filepath.Join(c.dir, "certs", "apiserver.crt") }

func (c *cluster) call(method, path string, body any) (int, []byte, error) {
	var b []byte
	if body != nil {
		b, _ = json.Marshal(body)
	}
	r, err := http.NewRequest(method, c.issuer+path, bytes.NewReader(b))
	if err != nil {
		return 0, nil, err
	}
	r.Header.Set("Authorization", "Bearer admin")
	r.Header.Set("Content-Type", "application/json")
	res, err := c.http.Do(r)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	out, err := io.ReadAll(res.Body)
	return res.StatusCode, out, err
}

func (c *cluster) create(path string, object string) []byte {
	c.t.Helper()
	status, b, err := c.call(http.MethodPost, path, json.RawMessage(object))
	if err != nil || status/100 != 2 {
		c.t.Fatalf("%s: %d %v %s", path, status, err, b)
	}
	return b
}

// pod writes the token that the kubelet would put into the appliance's pod.
func (c *cluster) pod(account string) configs.Proof {
	c.t.Helper()
	var got struct{ Status struct{ Token string } }
	ok(c.t, json.Unmarshal(c.create("/api/v1/namespaces/demarc/serviceaccounts/"+account+"/token", `{"kind":"TokenRequest","apiVersion":"authentication.k8s.io/v1","spec":{}}`), &got))
	file := filepath.Join(c.t.TempDir(), "token")
	ok(c.t, os.WriteFile(file, []byte(got.Status.Token+"\n"), 0o600))
	return configs.Proof{Kind: configs.ProofKubernetes, Kubernetes: &configs.KubernetesProof{APIServer: c.issuer, CAFile: c.ca(), TokenFile: file}}
}

func (c *cluster) jwks() []byte {
	c.t.Helper()
	status, b, err := c.call(http.MethodGet, "/openid/v1/jwks", nil)
	if err != nil || status != http.StatusOK {
		c.t.Fatalf("%d %v %s", status, err, b)
	}
	return b
}

// people makes two service accounts, and gives the first the right that docs/identity.md names.
func (c *cluster) people() {
	const rbac = "/apis/rbac.authorization.k8s.io/v1"
	c.create("/api/v1/namespaces", `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"demarc"}}`)
	for _, name := range []string{"appliance", "other"} {
		c.create("/api/v1/namespaces/demarc/serviceaccounts", fmt.Sprintf(`{"apiVersion":"v1","kind":"ServiceAccount","metadata":{"name":%q}}`, name))
	}
	c.create(rbac+"/namespaces/demarc/roles", `{"apiVersion":"rbac.authorization.k8s.io/v1","kind":"Role","metadata":{"name":"demarc-proof"},"rules":[{"apiGroups":[""],"resources":["serviceaccounts/token"],"resourceNames":["appliance"],"verbs":["create"]}]}`)
	c.create(rbac+"/namespaces/demarc/rolebindings", `{"apiVersion":"rbac.authorization.k8s.io/v1","kind":"RoleBinding","metadata":{"name":"demarc-proof"},"roleRef":{"apiGroup":"rbac.authorization.k8s.io","kind":"Role","name":"demarc-proof"},"subjects":[{"kind":"ServiceAccount","name":"appliance","namespace":"demarc"}]}`)
}

func (c *cluster) expect() identity.Expect {
	return identity.Expect{Kind: identity.KindKubernetes, Issuer: c.issuer, JWKS: c.jwks(), Namespace: "demarc", ServiceAccount: "appliance"}
}

// roll does what the appliance does when its cluster has new keys, and tells whether they wait for the operator.
func (c *cluster) roll(g *gate, cert *tls.Certificate, p configs.Proof) (waiting bool, err error) {
	c.t.Helper()
	jwks, token, err := own.Keys(c.t.Context(), p)
	if err != nil {
		return false, err
	}
	nonce := g.nonce()
	audience, err := identity.KeysAudience(domain, nonce, jwks)
	ok(c.t, err)
	s, err := token(c.t.Context(), audience)
	if err != nil {
		return false, err
	}
	return g.rolls(cert, jwks, s, nonce)
}

// TestRealClusterRotatesItsKeys goes from key one to both to key two, with a real API server: as Kubernetes tells it, the
// new key is published before it signs. Then to key three at once, which waits for the operator.
func TestRealClusterRotatesItsKeys(t *testing.T) {
	c := newCluster(t)
	c.serve("one")
	c.people()
	g := newGate(t, 5*time.Minute)
	g.expects(c.expect())
	pod := c.pod("appliance")
	m, key := g.request(logKey(t))
	first, err := g.proof(pod, m.GetLogKey())
	ok(t, err)
	first.Csr = m.GetCsr()
	_, err = g.enrol(first)
	refusedWith(t, err, fault.Denied, "its audience must be") // another key than the proof is made out to
	audience, err := identity.Audience(domain, m.GetNonce(), m.GetCsr())
	ok(t, err)
	proof, err := own.Prove(t.Context(), pod, audience, time.Now())
	ok(t, err)
	m.Token = proof.Token
	res, err := g.enrol(m)
	ok(t, err)
	cert := &tls.Certificate{Certificate: [][]byte{res.GetCertificate()}, PrivateKey: key}
	if a, _ := g.order.book.View().Appliance("eu-1"); a.UID == "" {
		t.Error("the UID of the service account is not remembered")
	}
	if err := g.proves(c.pod("other"), m.GetLogKey(), nil); fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err), "serviceaccounts/token") {
		t.Fatalf("an account without the right: %v", err)
	}
	late, err := g.proof(pod, m.GetLogKey()) // signed with key one, shown when it is gone
	ok(t, err)

	rolls := func(wait bool) {
		t.Helper()
		if waiting, err := c.roll(g, cert, pod); err != nil || waiting != wait {
			t.Fatalf("waiting %v, %v", waiting, err)
		}
	}
	c.serve("one", "two")
	rolls(false)
	c.serve("two", "one")
	ok(t, g.proves(pod, m.GetLogKey(), nil))

	c.serve("two")
	if _, err := c.roll(g, cert, pod); fault.Of(err) != fault.Denied {
		t.Fatalf("the API server takes a token of a key that is gone: %v", err)
	}
	pod = c.pod("appliance")
	rolls(false)
	_, err = g.enrol(late)
	refusedWith(t, err, fault.Denied, "not pinned")
	ok(t, g.proves(pod, m.GetLogKey(), nil))

	c.serve("three", "two")
	rolls(true)
	refusedWith(t, g.proves(pod, m.GetLogKey(), nil), fault.Denied, "not pinned")
	a, err := g.order.book.View().Appliance("eu-1")
	ok(t, err)
	submitAs(g, book.ConfirmKeys{Name: "eu-1", Digest: fleet.DigestOf(a.Reported)})
	ok(t, g.proves(pod, m.GetLogKey(), nil))
}

// TestRealClusterIsDiscovered fetches the keys of a real API server, where its issuer is listed and only there.
func TestRealClusterIsDiscovered(t *testing.T) {
	c := newCluster(t)
	c.serve("one")
	c.people()
	c.create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", `{"apiVersion":"rbac.authorization.k8s.io/v1","kind":"ClusterRoleBinding","metadata":{"name":"keys-for-all"},"roleRef":{"apiGroup":"rbac.authorization.k8s.io","kind":"ClusterRole","name":"system:service-account-issuer-discovery"},"subjects":[{"kind":"Group","apiGroup":"rbac.authorization.k8s.io","name":"system:unauthenticated"}]}`)
	g := newGate(t, 5*time.Minute)
	e := c.expect()
	e.JWKS, e.Discovery = nil, true
	g.expects(e)
	pod := c.pod("appliance")
	refusedWith(t, g.proves(pod, nil, nil), fault.Denied, "not listed")
	g.asks(platform.Options{Now: time.Now, Issuers: []platform.Issuer{{URL: c.issuer, Roots: c.roots}}})
	refusedWith(t, g.proves(pod, nil, nil), fault.Denied, "not a public one")
	g.asks(platform.Options{Now: time.Now, Issuers: []platform.Issuer{{URL: c.issuer, Roots: c.roots, PrivateHost: "127.0.0.1"}}})
	ok(t, g.proves(pod, nil, nil))
}
