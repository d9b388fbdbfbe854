// SPDX-License-Identifier: Apache-2.0

package roads

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/identity/identitytest"
	"github.com/demarc-dev/demarc/mesh/roadtest"
)

const (
	domain    = "acme.example"
	account   = "appliance"
	space     = "demarc"
	appliance = "canary-eu-1" // it crosses the road inside the channel
)

// pair is a control plane and an appliance that run, each in its namespace.
type pair struct {
	net  *topology
	bin  string
	dir  string
	done []func() error

	first  string // privatelink: it is the first road, over the relay; else https is
	beside string // lines of the https road that is listed beside a tailnet
}

func (p *pair) path(parts ...string) string {
	return filepath.Join(append([]string{p.dir}, parts...)...)
}

func (p *pair) write(text string, parts ...string) error {
	f := p.path(parts...)
	if err := os.MkdirAll(filepath.Dir(f), 0o700); err != nil {
		return err
	}
	return os.WriteFile(f, []byte(text), 0o600)
}

// vendor and customer give a command of demarc, where it is typed.
func (p *pair) vendor(ctx context.Context, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", p.net.control, filepath.Join(p.bin, "demarc")}, args...)...)
	c.Env = append(os.Environ(), "DEMARC_CONTEXT="+p.path("acme", "operator", "operator.yaml"))
	return c
}

func (p *pair) customer(ctx context.Context, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, filepath.Join(p.bin, "demarc"), args...)
	c.Env = append(os.Environ(), "DEMARC_SOCKET="+p.path("customer", "appliance.sock"))
	return c
}

func told(c *exec.Cmd) error {
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), err, out)
	}
	return nil
}

// words are what a command says; an error is a word too.
func words(c *exec.Cmd) string {
	out, err := c.CombinedOutput()
	return fmt.Sprint(strings.Join(strings.Fields(string(out)), " "), err)
}

// start runs a demarcd in a namespace until the pair ends.
func (p *pair) start(name, ns, file string, env ...string) error {
	log, err := os.Create(p.path(name + ".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	c := exec.Command("ip", "netns", "exec", ns, filepath.Join(p.bin, "demarcd"), "run", "-c", file)
	c.Stdout, c.Stderr, c.Env = log, log, append(os.Environ(), env...)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.Start(); err != nil {
		return err
	}
	over := make(chan struct{})
	go func() { _ = c.Wait(); close(over) }()
	p.done = append(p.done, func() error {
		select {
		case <-over:
			return fmt.Errorf("%s died: %s", name, p.tail(name))
		default:
		}
		_ = syscall.Kill(-c.Process.Pid, syscall.SIGTERM)
		select {
		case <-over:
			return nil
		case <-time.After(20 * time.Second):
			_ = syscall.Kill(-c.Process.Pid, syscall.SIGKILL)
			<-over
			return fmt.Errorf("%s did not stop by itself", name)
		}
	})
	return nil
}

func (p *pair) tail(name string) string {
	b, _ := os.ReadFile(p.path(name + ".log"))
	return string(b[max(0, len(b)-4000):])
}

func (p *pair) close() error {
	var errs []error
	for i := len(p.done) - 1; i >= 0; i-- {
		errs = append(errs, p.done[i]())
	}
	return errors.Join(errs...)
}

// platform answers with tokens, as a kubelet would.
func (p *pair) platform(issuer *identitytest.Issuer) error {
	l, err := net.Listen("unix", p.path("platform.sock"))
	if err != nil {
		return err
	}
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t, err := issuer.Token(space, account, r.URL.Query().Get("audience"), time.Now())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_, _ = io.WriteString(w, t)
	})}
	go func() { _ = srv.Serve(l) }()
	p.done = append(p.done, srv.Close)
	return nil
}

// printToken is the appliance's token command: this binary, run as "token SOCKET AUDIENCE".
func printToken(socket, audience string) error {
	c := &http.Client{Timeout: 10 * time.Second,
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
	req, err := http.NewRequest(http.MethodGet, "http://platform/", nil)
	if err != nil {
		return err
	}
	q := req.URL.Query()
	q.Set("audience", audience)
	req.URL.RawQuery = q.Encode()
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	_, err = io.Copy(os.Stdout, io.LimitReader(res.Body, 64<<10))
	return err
}

// begin starts both programs and waits until the appliance is online.
// by is the proxy before https; inner lists a road with inner_tls behind it, and opens its door. want is the road on which it comes up.
func (p *pair) begin(ctx context.Context, by proxy, inner bool, want string) error {
	issuer, err := identitytest.NewIssuer("https://cluster.globex.example")
	if err != nil {
		return err
	}
	if err := p.platform(issuer); err != nil {
		return err
	}
	expect, err := json.Marshal(issuer.Expect(space, account))
	if err != nil {
		return err
	}
	if err := p.write(string(expect), "eu-1.json"); err != nil {
		return err
	}
	if err := told(p.vendor(ctx, "control-plane", "init", "--dir", p.path("acme"), "--trust-domain", domain, "--node",
		"cp-1=127.0.0.1:7444,"+controlOnRoad+":"+port+",127.0.0.1:7480")); err != nil {
		return err
	}
	if inner {
		if err := p.innerDoor(); err != nil {
			return err
		}
	}
	if err := p.start("control-plane", p.net.control, p.path("acme", "cp-1", "node.yaml"), "DEMARC_LISTEN=0.0.0.0:"+port); err != nil {
		return err
	}
	if err := until(ctx, time.Minute,
		"the control plane answers", func() bool { return p.vendor(ctx, "status", "--timeout", "5s").Run() == nil }); err != nil {
		return fmt.Errorf("%w: %s", err, p.tail("control-plane"))
	}
	if err := told(p.vendor(ctx, "customer", "add", "globex")); err != nil {
		return err
	}
	if err := told(p.vendor(ctx, "appliance", "add", appliance, "--customer", "globex", "--expect", p.path("eu-1.json"))); err != nil {
		return err
	}
	if err := p.applianceFile(by, inner); err != nil {
		return err
	}
	if err := p.start("appliance", p.net.appliance, p.path("customer", "appliance.yaml")); err != nil {
		return err
	}
	if err := p.seen(ctx, want, time.Minute); err != nil {
		return fmt.Errorf("%w: %s", err, p.tail("appliance"))
	}
	return nil
}

func (p *pair) applianceFile(proxied proxy, inner bool) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	by := proxied.lines()
	if proxied == private {
		if err := p.write(string(p.net.own.PEM()), "customer", "proxy-ca.pem"); err != nil {
			return err
		}
	}
	if inner {
		by = "\n    name: plain" + by + "\n  - kind: https\n    proxy: {url: \"http://proxy.road.test:3128\", auth_file: proxy.auth}\n" +
			"    inner_tls: {url: \"inner.road.test:" + innerPort + "\", ca_file: inspection.pem}"
		if err := p.write(string(p.net.proxy.CA.PEM()), "customer", "inspection.pem"); err != nil {
			return err
		}
	}
	first, second, at := "kind: https"+by, "kind: privatelink", ""
	if p.first == "privatelink" { // by a name, as an endpoint has one
		first, second, at = second, first, "\n    addresses: [\"vpce.road.test:"+port+"\"]"
	}
	return errors.Join(os.MkdirAll(p.path("customer", "secrets"), 0o700), p.write("ann:s3cret\n", "customer", "proxy.auth"),
		p.write(fmt.Sprintf(`version: demarc/1
role: appliance
name: canary-eu-1
customer: globex
trust_domain: %s
dir: data
socket: appliance.sock
control_plane:
  addresses: ["cp.road.test:%s"]
  bundle_file: ../acme/bundle.pem
  release_keys: [../acme/operator/signing.pub]
transports:
  - %s%s
  - %s
    addresses: ["%s:%s"]
proof:
  kind: kubernetes
  token_command: [%q, token, %q]
secrets: {kind: files, dir: secrets}
`, domain, port, first, at, second, controlDirect, port, self, p.path("platform.sock")), "customer", "appliance.yaml"))
}

// innerDoor adds the door to the control plane's file.
func (p *pair) innerDoor() error {
	web, err := roadtest.NewCA("Web CA")
	if err != nil {
		return err
	}
	leaf, err := web.Leaf("inner.road.test")
	if err != nil {
		return err
	}
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		return err
	}
	file := p.path("acme", "cp-1", "node.yaml")
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return errors.Join(
		p.write(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Certificate[0]})), "acme", "cp-1", "web.pem"),
		p.write(string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})), "acme", "cp-1", "web.key"),
		p.write(string(b)+"inner_tls: {listen: \"0.0.0.0:"+innerPort+"\", cert_file: web.pem, key_file: web.key}\n", "acme", "cp-1", "node.yaml"))
}

// until looks again and again.
func until(ctx context.Context, limit time.Duration, what string, is func() bool) error {
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(limit); ; {
		if is() {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("not so within %s: %s", limit, what)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// seen waits until the vendor sees the appliance online over a route.
func (p *pair) seen(ctx context.Context, route string, limit time.Duration) error {
	return until(ctx, limit, "the vendor sees the appliance over "+route, func() bool {
		out, err := p.vendor(ctx, "appliance", "show", appliance, "--output", "json").Output()
		var a struct {
			Online bool   `json:"online"`
			Route  string `json:"route"`
		}
		return err == nil && json.Unmarshal(out, &a) == nil && a.Online && a.Route == route
	})
}

// counts is what the probes said, all together.
type counts struct {
	Sent       uint64        `json:"sent"`
	Echoed     uint64        `json:"echoed"`
	Doubled    uint64        `json:"doubled"`
	OutOfOrder uint64        `json:"out_of_order"`
	gap        time.Duration // the longest time in which messages waited and no echo came; to the second
}

// flow sends probes until stop is closed, then lets the last one end.
func (p *pair) flow(ctx context.Context, stop <-chan struct{}) (all counts, err error) {
	for {
		one, err := p.probe(ctx, "200")
		all.Sent += one.Sent
		all.Echoed += one.Echoed
		all.Doubled += one.Doubled
		all.OutOfOrder += one.OutOfOrder
		all.gap = max(all.gap, one.gap)
		if err != nil {
			return all, err
		}
		select {
		case <-stop:
			return all, nil
		default:
		}
	}
}

func (p *pair) probe(ctx context.Context, count string) (c counts, err error) {
	cmd := p.vendor(ctx, "probe", "--appliance", appliance, "--count", count, "--rate", "20", "--watch", "--timeout", "100s", "--output",
		"json")
	var out bytes.Buffer
	cmd.Stdout = &out
	watch, err := cmd.StderrPipe()
	if err != nil {
		return c, err
	}
	if err := cmd.Start(); err != nil {
		return c, err
	}
	var said []string
	var last uint64
	moved := time.Now()
	for s := bufio.NewScanner(watch); s.Scan(); {
		var sent, echoed, doubled, order uint64
		if n, _ := fmt.Sscanf(s.Text(), "sent %d, echoed %d, doubled %d, out of order %d", &sent, &echoed, &doubled, &order); n != 4 {
			said = append(said, s.Text())
			continue
		}
		if echoed > last || echoed == sent {
			moved = time.Now()
		}
		last = echoed
		c.gap = max(c.gap, time.Since(moved))
	}
	err = cmd.Wait()
	if jerr := json.Unmarshal(out.Bytes(), &c); jerr != nil {
		return c, fmt.Errorf("probe: %w: %s", errors.Join(err, jerr), strings.Join(said, "; "))
	}
	if err != nil {
		err = fmt.Errorf("probe: %w: %s", err, strings.Join(said, "; "))
	}
	return c, err
}
