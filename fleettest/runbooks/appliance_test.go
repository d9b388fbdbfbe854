// SPDX-License-Identifier: Apache-2.0

package runbooks

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/identity/identitytest"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "token" {
		if err := printToken(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
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
	req.URL.RawQuery = url.Values{"audience": {audience}}.Encode()
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the platform said %s", res.Status)
	}
	_, err = io.Copy(os.Stdout, io.LimitReader(res.Body, 64<<10))
	return err
}

// tokens serves the tokens of a customer's platform, one for a world, and gives its socket.
func (w *world) tokens() (issuer *identitytest.Issuer, socket string) {
	w.t.Helper()
	socket = filepath.Join(w.dir, "platform.sock")
	if w.issuer != nil {
		return w.issuer, socket
	}
	issuer, err := identitytest.NewIssuer("https://cluster.globex.example")
	if err != nil {
		w.t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		w.t.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		t, err := issuer.Token("demarc", "appliance", r.URL.Query().Get("audience"), time.Now())
		if err != nil {
			http.Error(rw, err.Error(), http.StatusInternalServerError)
			return
		}
		_, _ = io.WriteString(rw, t)
	})}
	go func() { _ = srv.Serve(l) }()
	w.t.Cleanup(func() { _ = srv.Close() })
	w.issuer = issuer
	return issuer, socket
}

// appliance starts one whose only address is that of a node, and waits until it is online there and echoes what it is sent.
func (w *world) appliance(node string) {
	w.t.Helper()
	w.startAppliance("eu-1", w.api(node))
	w.online("eu-1", ", at node "+strings.Replace(node, "edge", "edge-", 1))
	w.run("demarc probe --appliance eu-1 --count 100 --rate 50 --watch --timeout 60s\n")
}

// appliances starts some that know every node.
func (w *world) appliances(names ...string) {
	w.t.Helper()
	for _, name := range names {
		w.startAppliance(name, w.api("cp1"), w.api("cp2"), w.api("cp3"))
	}
	w.probes(names...)
}

// probes waits until appliances are online, and has them echo what they are sent: none is lost, and none comes twice.
func (w *world) probes(names ...string) {
	w.t.Helper()
	for _, name := range names {
		w.online(name, "")
		w.run("demarc probe --appliance " + name + " --count 20 --rate 50 --watch --timeout 60s\n")
	}
}

func (w *world) online(name, where string) {
	w.t.Helper()
	var last string
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		out, err := w.shell("demarc appliance show " + name + " 2>&1\n")
		if last = out; err == nil && strings.Contains(out, "online true"+where) {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("appliance %s is not online%s: %s", name, where, last)
		}
	}
}

func (w *world) startAppliance(name string, addresses ...string) {
	w.t.Helper()
	issuer, socket := w.tokens()
	ok := func(err error) {
		w.t.Helper()
		if err != nil {
			w.t.Fatal(err)
		}
	}
	expect, err := json.Marshal(issuer.Expect("demarc", "appliance"))
	ok(err)
	ok(os.WriteFile(filepath.Join(w.dir, name+".json"), expect, 0o600))
	w.register(name)
	self, err := os.Executable()
	ok(err)
	dir := filepath.Join(w.dir, "acme", name) // where the unit looks for its file
	ok(os.MkdirAll(filepath.Join(dir, "secrets"), 0o700))
	for i := range addresses {
		addresses[i] = fmt.Sprintf("%q", addresses[i])
	}
	ok(os.WriteFile(filepath.Join(dir, "node.yaml"), fmt.Appendf(nil, `version: demarc/1
role: appliance
name: %s
customer: globex
trust_domain: acme.example
dir: data
socket: a.sock
control_plane:
  addresses: [%s]
  bundle_file: ../bundle.pem
  release_keys: [../operator/signing.pub]
transports:
  - kind: https
proof:
  kind: kubernetes
  token_command: [%q, token, %q]
secrets: {kind: files, dir: secrets}
`, name, strings.Join(addresses, ", "), self, socket), 0o600))
	w.run("systemctl start demarcd@" + name + "\n")
}
