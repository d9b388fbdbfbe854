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
	c := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
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

// appliance starts one whose only address is that of a node, and waits until it is online there and echoes what it is sent.
func (w *world) appliance(node string) {
	w.t.Helper()
	ok := func(err error) {
		w.t.Helper()
		if err != nil {
			w.t.Fatal(err)
		}
	}
	issuer, err := identitytest.NewIssuer("https://cluster.globex.example")
	ok(err)
	socket := filepath.Join(w.dir, "platform.sock")
	l, err := net.Listen("unix", socket)
	ok(err)
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
	expect, err := json.Marshal(issuer.Expect("demarc", "appliance"))
	ok(err)
	ok(os.WriteFile(filepath.Join(w.dir, "eu-1.json"), expect, 0o600))
	w.run("demarc appliance add eu-1 --customer globex --expect eu-1.json\n")
	self, err := os.Executable()
	ok(err)
	dir := filepath.Join(w.dir, "acme", "eu-1") // where the unit looks for its file
	ok(os.MkdirAll(filepath.Join(dir, "secrets"), 0o700))
	ok(os.WriteFile(filepath.Join(dir, "node.yaml"), fmt.Appendf(nil, `version: demarc/1
role: appliance
name: eu-1
customer: globex
trust_domain: acme.example
dir: data
socket: a.sock
control_plane:
  addresses: [%q]
  bundle_file: ../bundle.pem
  release_keys: [../operator/signing.pub]
transports:
  - kind: https
proof:
  kind: kubernetes
  token_command: [%q, token, %q]
secrets: {kind: files, dir: secrets}
`, w.api(node), self, socket), 0o600))
	w.run("systemctl start demarcd@eu-1\n")
	name := strings.Replace(node, "edge", "edge-", 1)
	var last string
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		out, err := w.shell("demarc appliance show eu-1 2>&1\n")
		if last = out; err == nil && strings.Contains(out, "online true, at node "+name) {
			break
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("the appliance is not at node %s: %s", name, last)
		}
	}
	w.run("demarc probe --appliance eu-1 --count 100 --rate 50 --watch --timeout 60s\n")
}
