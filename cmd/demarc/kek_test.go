// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/identity"
)

// realNode is a trust domain of one node, with the real raft on a real disk, in this process.
type realNode struct {
	*domain
	stop func() error
}

func free(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func newRealNode(t *testing.T) *realNode {
	t.Helper()
	n := &realNode{domain: &domain{t: t, dir: filepath.Join(t.TempDir(), "acme")}}
	n.types("", 0, "control-plane", "init", "--dir", n.dir, "--trust-domain", trustDomain, "--operator", "ann", "--node",
		"cp-1="+free(t)+","+free(t)+","+free(t))
	n.start()
	t.Cleanup(func() {
		if n.stop != nil {
			_ = n.stop()
		}
	})
	return n
}

// begin loads the node's file, starts it, and returns how to end it and how it ended.
func (n *realNode) begin() (end func() error, ended <-chan error) {
	n.t.Helper()
	cfg, err := configs.Load(filepath.Join(n.dir, "cp-1", "node.yaml"), nil)
	if err != nil {
		n.t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	parts, err := controlplane.Parts(cfg.(*configs.Control), "test", log)
	if err != nil {
		n.t.Fatal(err)
	}
	// No leader speaks to a node that must catch up first, and genesis waits for one. The service manager is told last.
	at := func(name string) int {
		return slices.IndexFunc(parts, func(p daemon.Part) bool { return p.Name() == name })
	}
	if up := at("catch-up"); up < 0 || up > at("genesis") || at("notify") != len(parts)-1 {
		n.t.Fatalf("catch-up is part %d, genesis %d, notify %d of %d", up, at("genesis"), at("notify"), len(parts))
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- daemon.Run(ctx, log, parts...) }()
	return func() error { cancel(); return <-done }, done
}

func (n *realNode) start() {
	n.t.Helper()
	n.stop, _ = n.begin()
	n.until("the node answers", func() bool { return n.try("status") == 0 })
}

func (n *realNode) halt() {
	n.t.Helper()
	if err := n.stop(); err != nil {
		n.t.Fatal(err)
	}
	n.stop = nil
}

func (n *realNode) ann() string { return filepath.Join(n.dir, "operator", "operator.yaml") }

func (n *realNode) try(args ...string) int {
	var out bytes.Buffer
	return run(n.t.Context(), append(args, "--context", n.ann(), "--timeout", "2s"), strings.NewReader(""), &out, &out)
}

func (n *realNode) until(what string, holds func() bool) {
	n.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(time.Minute); !holds(); {
		select {
		case <-tick.C:
		case <-limit:
			n.t.Fatalf("not within a minute: %s", what)
		}
	}
}

// holds is the keys that the one node holds, by their names.
func (n *realNode) holds() (inUse string, held []string) {
	n.t.Helper()
	var doc struct {
		Key   string
		Nodes []struct{ Keys []string }
	}
	if err := json.Unmarshal([]byte(n.as(n.ann(), 0, "control-plane", "kek", "status", "-o", "json")), &doc); err != nil ||
		len(doc.Nodes) != 1 {
		n.t.Fatalf("%+v, %v", doc, err)
	}
	return doc.Key, doc.Nodes[0].Keys
}

// spellings is how a key could stand in a file: raw, in hex, in base64 of any alignment.
func spellings(key []byte) map[string][]byte {
	out := map[string][]byte{"raw": key, "hex": []byte(hex.EncodeToString(key)), "HEX": []byte(strings.ToUpper(hex.EncodeToString(key)))}
	for shift := range 3 {
		b := append(make([]byte, shift), key...)
		b = b[:len(b)/3*3] // whole groups, so that what follows has no say
		for name, enc := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64url": base64.RawURLEncoding} {
			s := enc.EncodeToString(b)
			out[fmt.Sprintf("%s at %d", name, shift)] = []byte(s[min(len(s), (shift*8+5)/6):])
		}
	}
	return out
}

// find looks for keys in every file below a folder, whole names included.
func find(t *testing.T, dir string, keys map[string][]byte) (found []string, files int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		for name, key := range keys {
			for form, want := range spellings(key) {
				if bytes.Contains(b, want) {
					found = append(found, fmt.Sprintf("%s, %s, in %s", name, form, filepath.Base(path)))
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found, files
}

// keysOf is all that a thief wants: what the kek seals, and the kek.
func (n *realNode) keysOf(kek []byte) map[string][]byte {
	n.t.Helper()
	var genesis book.GenesisWith
	if err := json.Unmarshal(n.read("genesis.json"), &genesis); err != nil {
		n.t.Fatal(err)
	}
	ca, err := identity.OpenAuthority(genesis.Slots[0].CertDER, genesis.Slots[0].SealedKey, kek)
	if err != nil {
		n.t.Fatal(err)
	}
	key := ca.Key.(*ecdsa.PrivateKey)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		n.t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		n.t.Fatal(err)
	}
	scalar, err := key.Bytes()
	if err != nil {
		n.t.Fatal(err)
	}
	out := map[string][]byte{"kek": kek, "CA key in PKCS #8": pkcs8, "CA key in SEC 1": sec1, "CA key": scalar}
	for name, info := range map[string]string{"log key": "demarc-log-key/1", "nonce key": "demarc-nonce-key/1"} {
		if out[name], err = hkdf.Key(sha256.New, kek, nil, info, 32); err != nil {
			n.t.Fatal(err)
		}
	}
	return out
}

// TestFindFinds: the search of the tests below sees a key in each of its forms.
func TestFindFinds(t *testing.T) {
	dir := t.TempDir()
	key := sha256.Sum256([]byte("key"))
	for i, b := range [][]byte{append([]byte("xy"), key[:]...), []byte(hex.EncodeToString(key[:])),
		[]byte(base64.StdEncoding.EncodeToString(key[:])),
		[]byte(`{"a":"` + base64.URLEncoding.EncodeToString(append([]byte("z"), append(key[:], "tail"...)...)) + `"}`),
		[]byte(base64.StdEncoding.EncodeToString(append([]byte("zz"), append(key[:], "tail"...)...)))} {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), b, 0o600); err != nil {
			t.Fatal(err)
		}
		if found, _ := find(t, dir, map[string][]byte{"key": key[:]}); len(found) == 0 {
			t.Errorf("form %d of the key was not found", i)
		}
		if err := os.Remove(filepath.Join(dir, fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTheKEKIsRotatedOnline takes a running node through a rotation, and looks through its disk before and after: nothing that
// the kek seals is there in the clear, the log's key that auditors pinned stays, and the old kek opens nothing any more.
func TestTheKEKIsRotatedOnline(t *testing.T) {
	n := newRealNode(t)
	old, logKey := n.read("kek"), n.read("log.pub")
	n.until("the node said which key it holds", func() bool { use, held := n.holds(); return use != "" && slices.Equal(held, []string{use}) })
	before, _ := n.holds()
	if got := n.as(n.ann(), 1, "control-plane", "rotate-kek"); !strings.Contains(got, "the nodes hold 0 keys beside the one in use") {
		t.Fatal(got)
	}
	if got := n.as(n.ann(), 1, "control-plane", "rotate-kek", "--to", "0123456789abcdef"); !strings.Contains(got, "node cp-1") {
		t.Fatalf("the node without the key is not named: %s", got)
	}
	n.as(n.ann(), 0, "ca", "prepare") // a second key under the kek
	value := "tskey-client-" + strings.Repeat("x9K", 12)
	secret := n.types(value+"\n", 0, "control-plane", "secret", "put", "tailnet-oauth", "--from", "-", "--context", n.ann())
	secret += n.as(n.ann(), 0, "control-plane", "secret", "list") + n.as(n.ann(), 0, "control-plane", "secret", "list", "-o", "json")
	if strings.Contains(secret, value) || strings.Count(secret, "tailnet-oauth") < 3 || !strings.Contains(secret, "operator/ann") {
		t.Fatal(secret)
	}
	n.types("", 0, "control-plane", "kek", "new", filepath.Join(n.dir, "kek.next"))
	next := n.read("kek.next")
	n.until("the node holds both", func() bool { _, held := n.holds(); return len(held) == 2 })
	if got := n.as(n.ann(), 0, "control-plane", "rotate-kek"); !strings.Contains(got, "5 keys and secrets") {
		t.Fatal(got)
	}
	n.until("the old key is dropped", func() bool { use, held := n.holds(); return use != before && slices.Equal(held, []string{use}) })
	if !bytes.Equal(n.read("kek"), next) {
		t.Fatal("kek_file is not the next key")
	}
	if _, err := os.Stat(filepath.Join(n.dir, "kek.next")); err == nil {
		t.Fatal("the next key is still there beside it")
	}
	n.as(n.ann(), 0, "operator", "renew") // the CA's key opens
	pinned := func(file string) {
		t.Helper()
		n.as(n.ann(), 0, "evidence", "export", "--out", filepath.Join(n.dir, file))
		n.types("", 0, "verify", filepath.Join(n.dir, file), "--pin", trustDomain+"/control-plane="+filepath.Join(n.dir, "log.pub"))
	}
	pinned("one.json")
	n.halt()
	data := filepath.Join(n.dir, "cp-1", "data")
	found, files := find(t, data, n.keysOf(old))
	more, _ := find(t, data, map[string][]byte{"next kek": next, "the OAuth client's secret": []byte(value)})
	if found = append(found, more...); len(found) > 0 || files == 0 {
		t.Fatalf("in the clear, of %d files: %q", files, found)
	}
	n.start()
	pinned("two.json")
	n.as(n.ann(), 0, "control-plane", "secret", "forget", "tailnet-oauth")
	if left := n.as(n.ann(), 0, "control-plane", "secret", "list"); strings.Contains(left, "tailnet-oauth") {
		t.Fatal(left)
	}
	if block, _ := pem.Decode(logKey); block == nil || !bytes.Equal(n.read("log.pub"), logKey) {
		t.Fatal("log.pub is not what it was")
	}
	n.halt()
	if err := os.WriteFile(filepath.Join(n.dir, "kek"), old, 0o600); err != nil {
		t.Fatal(err)
	}
	end, ended := n.begin()
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), "kek_file does not open the keys of the book") {
			t.Fatalf("with the old kek: %v", err)
		}
	case <-time.After(time.Minute):
		_ = end()
		t.Fatal("a node runs with the old kek")
	}
}
