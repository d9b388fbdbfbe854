// SPDX-License-Identifier: Apache-2.0

package releases

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fleettest/platform"
	"github.com/demarc-dev/demarc/fleettest/process"
)

const (
	domain   = "acme.example"
	patience = 3 * time.Minute // for what must come about: a slow machine is no finding
)

func TestMain(m *testing.M) {
	platform.Command()
	os.Exit(m.Run())
}

// world is a control plane of three nodes, and a customer's appliance.
type world struct {
	t    *testing.T
	dir  string
	bin  string
	node map[string]*process.Process
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) path(parts ...string) string {
	return filepath.Join(append([]string{w.dir}, parts...)...)
}

func (w *world) write(text string, mode fs.FileMode, parts ...string) string {
	w.t.Helper()
	p := w.path(parts...)
	w.must(os.MkdirAll(filepath.Dir(p), 0o700))
	w.must(os.WriteFile(p, []byte(text), mode))
	return p
}

// demarc runs the command, and gives what it printed.
func (w *world) demarc(args ...string) (out, notes string, err error) {
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	c := exec.CommandContext(ctx, filepath.Join(w.bin, "demarc"), append([]string{"--timeout", "60s"}, args...)...)
	c.Env = append(os.Environ(), "DEMARC_CONTEXT="+w.path("acme", "operator", "operator.yaml"), "DEMARC_SOCKET="+w.path("eu-1", "a.sock"),
		"DEMARC_KEY="+w.path("eu-1", "globex.key"), "DEMARC_PASSPHRASE_FILE="+w.path("eu-1", "passphrase"))
	var o, e strings.Builder
	c.Stdout, c.Stderr = &o, &e
	if err = c.Run(); err != nil {
		err = fmt.Errorf("demarc %s: %w: %s%s", strings.Join(args, " "), err, o.String(), e.String())
	}
	return o.String(), e.String(), err
}

func (w *world) ok(args ...string) (out, notes string) {
	w.t.Helper()
	out, notes, err := w.demarc(args...)
	w.must(err)
	return out, notes
}

func (w *world) until(what string, is func() error) {
	w.t.Helper()
	var last error
	if err := process.Until(w.t.Context(), patience, what, func() bool { last = is(); return last == nil }); err != nil {
		w.t.Fatal(err, last)
	}
}

// program is a demarcd that ends with the test.
func (w *world) program(name, file string) *process.Process {
	p := &process.Process{Name: name, Log: w.path(name + ".log"), Argv: []string{filepath.Join(w.bin, "demarcd"), "run", "-c", file}}
	w.t.Cleanup(func() {
		if err := p.End(syscall.SIGTERM, time.Minute); err != nil {
			w.t.Error(err)
		}
		if w.t.Failed() {
			w.t.Logf("%s:\n%s", name, p.Tail())
		}
	})
	return p
}

func begin(t *testing.T) *world {
	dir, err := os.MkdirTemp("", "dmrel") // short: there are Unix sockets in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, bin: t.TempDir(), node: map[string]*process.Process{}}
	if out, err := exec.Command("go", "build", "-o", w.bin+"/", "../../cmd/demarc", "../../cmd/demarcd").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	at, err := process.Free(9)
	w.must(err)
	args := []string{"control-plane", "init", "--dir", w.path("acme"), "--trust-domain", domain, "--operator", "ann"}
	var api []string
	for i := range 3 {
		args = append(args, "--node", fmt.Sprintf("cp-%d=%s,%s,%s", i+1, at[3*i], at[3*i+1], at[3*i+2]))
		api = append(api, fmt.Sprintf("%q", at[3*i+1]))
	}
	w.ok(args...)
	for i := range 3 {
		name := fmt.Sprint("cp-", i+1)
		w.node[name] = w.program(name, w.path("acme", name, "node.yaml"))
		w.must(w.node[name].Start())
	}
	w.until("the control plane answers", func() error { _, _, err := w.demarc("customer", "add", "globex"); return err })
	p, err := platform.Serve(w.path("platform.sock"))
	w.must(err)
	t.Cleanup(func() { _ = p.Close() })
	expect, err := p.Expect("eu-1")
	w.must(err)
	proof, err := p.Proof("eu-1")
	w.must(err)
	w.ok("appliance", "add", "eu-1", "--customer", "globex", "--expect", w.write(string(expect), 0o600, "eu-1.json"))
	w.must(os.MkdirAll(w.path("eu-1", "secrets"), 0o700))
	file := w.write(fmt.Sprintf(`version: demarc/1
role: appliance
name: eu-1
customer: globex
trust_domain: %s
dir: data
socket: a.sock
control_plane:
  addresses: [%s]
  bundle_file: ../acme/bundle.pem
  release_keys: [../acme/operator/signing.pub]
transports:
  - kind: https
%sruntime: {kind: process}
secrets: {kind: files, dir: secrets}
`, domain, strings.Join(api, ", "), proof), 0o600, "eu-1", "appliance.yaml")
	w.must(w.program("eu-1", file).Start())
	w.until("the appliance is online", func() error { return w.shows(`"online":true`) })
	return w
}

// shows is an error where what the vendor knows of the appliance does not hold a text.
func (w *world) shows(want string) error {
	out, _, err := w.demarc("appliance", "show", "eu-1", "--output", "json")
	if err == nil && !strings.Contains(strings.ReplaceAll(out, " ", ""), want) {
		err = fmt.Errorf("%s is not in %s", want, out)
	}
	return err
}

// artifacts lists the files of a node's store.
func (w *world) artifacts(node string) []string {
	w.t.Helper()
	all, err := filepath.Glob(w.path("acme", node, "data", "artifacts", "blobs", "sha256", "*"))
	w.must(err)
	return all
}

// TestTheNodeThatTookTheUploadDies (FAULTS.md J7): a release is published, and the node that took its bytes is killed at once after
// the answer, and loses its disk. The customer deploys all the same, and what the node lost is there again after its return.
func TestTheNodeThatTookTheUploadDies(t *testing.T) {
	w := begin(t)
	w.write("#!/bin/sh\nexec sleep 100000\n", 0o700, "app", "run", "bin", "app")
	w.write(strings.Repeat("bytes of the application ", 100_000), 0o600, "app", "run", "data")
	w.write("x-demarc: {app: notes, version: 1.0.0}\nservices:\n  run:\n    command: [bin/app]\n    x-demarc: {artifact: run}\n", 0o600, "app",
		"compose.yaml")
	_, notes := w.ok("release", "publish", "--compose", w.path("app", "compose.yaml"), "--appliance", "eu-1")
	dead := w.node["cp-1"] // the first of the operator's file took the upload
	w.must(dead.End(syscall.SIGKILL, time.Minute))
	if !strings.Contains(notes, "of 3 voters") {
		t.Errorf("publish does not say how far it is: %s", notes)
	}
	if len(w.artifacts("cp-1")) == 0 {
		t.Fatal("cp-1 did not take the upload: this test shows nothing")
	}
	w.must(os.RemoveAll(w.path("acme", "cp-1", "data", "artifacts")))

	w.write("a passphrase\n", 0o600, "eu-1", "passphrase")
	key := w.path("eu-1", "globex.key")
	w.ok("key", "create", "--out", key)
	w.ok("local", "pin", key+".pub", "--recipient-file", key+".recipient")
	var plan struct {
		Digest string `json:"plan_digest"`
	}
	w.until("the offer is at the customer", func() error {
		out, _, err := w.demarc("review", "--output", "json")
		if err == nil {
			err = json.Unmarshal([]byte(out), &plan)
		}
		if err == nil && plan.Digest == "" {
			err = fmt.Errorf("no plan in %s", out)
		}
		return err
	})
	w.ok("grant", "install", "--for", "24h")
	w.ok("grant", "deploy", "--for", "24h")
	w.ok("approve", "--plan", plan.Digest)
	w.until("the application is deployed", func() error { return w.shows(`"state":"deployed"`) })

	w.must(dead.Start())
	w.until("the node has all again, and says so", func() error {
		out, _, err := w.demarc("control-plane", "members", "--output", "json")
		if err != nil {
			return err
		}
		var all struct {
			Members []struct {
				Name    string
				Missing *int `json:"artifacts_missing"`
			}
		}
		if err := json.Unmarshal([]byte(out), &all); err != nil {
			return err
		}
		for _, m := range all.Members {
			if m.Missing == nil || *m.Missing != 0 {
				return fmt.Errorf("%s lacks some: %s", m.Name, out)
			}
		}
		if len(all.Members) != 3 || len(w.artifacts("cp-1")) == 0 { // what it said before it died may still be shown
			return fmt.Errorf("%d files, %s", len(w.artifacts("cp-1")), out)
		}
		return nil
	})
	if n := len(w.artifacts("cp-2")); n == 0 {
		t.Error("cp-2 has none")
	}
}
