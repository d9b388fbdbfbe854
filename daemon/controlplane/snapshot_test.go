// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/raft"
)

func snapshotFile(t *testing.T, o *order) []byte {
	t.Helper()
	stored, err := o.book.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	h := book.SnapshotHead{Index: o.book.Index(), Term: 3, At: start, Node: "cp-1", Build: "v1", TrustDomain: o.book.View().TrustDomain}
	if err := book.WriteSnapshot(&b, h, stored); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestSnapshotFile: what was written is read back with the same audit root, and any byte that is changed, missing or one
// too many is found.
func TestSnapshotFile(t *testing.T) {
	o := newBook(t)
	must(t, o, enrol("n1", "1", "key"))
	file := snapshotFile(t, o)
	h, inv, err := controlplane.InspectSnapshot(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		t.Fatal(err)
	}
	root := o.book.Log().Root()
	if h.Term != 3 || h.Node != "cp-1" || inv.Appliances != 1 || inv.Customers != 1 || inv.AuditSize != 4 || inv.AuditRoot != hex.EncodeToString(root[:]) || inv.Index != o.book.Index() {
		t.Fatalf("%+v %+v", h, inv)
	}
	bad := func(what string, b []byte) {
		t.Helper()
		if _, _, err := controlplane.InspectSnapshot(bytes.NewReader(b), int64(len(b))); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for i := range file {
		b := slices.Clone(file)
		b[i] ^= 0x01
		bad("a changed byte", b)
	}
	for i := 0; i < len(file); i += 7 {
		bad("cut off", file[:i])
	}
	bad("a byte too many", append(slices.Clone(file), '\n'))
	bad("nothing", nil)
}

func nodeConfig(t *testing.T) *configs.Control {
	t.Helper()
	kek := filepath.Join(t.TempDir(), "kek")
	ok(t, os.WriteFile(kek, sealedKEK, 0o600))
	return &configs.Control{Name: "cp-1", TrustDomain: "acme.example", Dir: t.TempDir(), KEKFile: kek, Cluster: []configs.Member{{Name: "cp-1", Raft: "127.0.0.1:1", API: "127.0.0.1:2"}}}
}

var sealedKEK = bytes.Repeat([]byte{7}, 32)

// sealedBook is a book whose CA's key and secrets are sealed with sealedKEK.
func sealedBook(t *testing.T, change func(*book.Genesis, *book.KeepSecrets)) *order {
	t.Helper()
	ca, err := identity.NewCA("acme.example", start, rand.Reader, time.Hour)
	ok(t, err)
	sealed, err := ca.SealKey(sealedKEK, rand.Reader)
	ok(t, err)
	id, err := identity.KEKID(sealedKEK)
	ok(t, err)
	g := book.Genesis{TrustDomain: "acme.example", Slots: []identity.Slot{{Stage: identity.Active, CertDER: ca.Cert.Raw, SealedKey: sealed}}}
	k := book.KeepSecrets{KEK: id}
	for _, name := range []string{book.SecretLogKey, book.SecretNonceKey} {
		box, err := identity.SealSecret(name, make([]byte, 32), sealedKEK, rand.Reader)
		ok(t, err)
		k.Secrets = append(k.Secrets, book.Secret{Name: name, Sealed: box})
	}
	change(&g, &k)
	o := &order{book: book.NewBook()}
	must(t, o, g)
	must(t, o, book.RegisterCustomer{Name: "globex"})
	must(t, o, k)
	return o
}

// TestRestoreOpensAllKeysFirst: where the kek of the node does not open each key of the snapshot, nothing is changed and nothing
// is set aside, and the error says what does not open.
func TestRestoreOpensAllKeysFirst(t *testing.T) {
	asItIs := func(*book.Genesis, *book.KeepSecrets) {}
	for name, c := range map[string]struct {
		kek    []byte
		change func(*book.Genesis, *book.KeepSecrets)
		want   string
	}{
		"another kek": {bytes.Repeat([]byte{9}, 32), asItIs, "are sealed with key"},
		"no kek":      {nil, asItIs, "kek_file can't be read"},
		"a CA's key does not open": {sealedKEK, func(g *book.Genesis, _ *book.KeepSecrets) {
			g.Slots[0].SealedKey = g.Slots[0].SealedKey[:40]
		}, "does not open the key of CA"},
		"a secret does not open":  {sealedKEK, func(_ *book.Genesis, k *book.KeepSecrets) { k.Secrets[1].Sealed = k.Secrets[0].Sealed }, `does not open the secret "nonce-key"`},
		"another kek, older book": {bytes.Repeat([]byte{9}, 32), func(_ *book.Genesis, k *book.KeepSecrets) { k.KEK = "0123456789abcdef" }, "are sealed with key"},
	} {
		cfg := nodeConfig(t)
		was := snapshotFile(t, sealedBook(t, asItIs))
		if _, _, err := controlplane.RestoreSnapshot(cfg, bytes.NewReader(was), int64(len(was)), false, 0); err != nil {
			t.Fatal(err)
		}
		ok(t, os.Remove(cfg.KEKFile))
		if c.kek != nil {
			ok(t, os.WriteFile(cfg.KEKFile, c.kek, 0o600))
		}
		before := tree(t, cfg.Dir)
		file := snapshotFile(t, sealedBook(t, c.change))
		_, aside, err := controlplane.RestoreSnapshot(cfg, bytes.NewReader(file), int64(len(file)), true, 0)
		if err == nil || aside != "" || !strings.Contains(fault.Text(err), c.want) {
			t.Errorf("%s: %q %v", name, aside, err)
		}
		if after := tree(t, cfg.Dir); after != before {
			t.Errorf("%s: the directory was changed:\n%s\nwas\n%s", name, after, before)
		}
	}
}

// tree is each file below a folder with the digest of what it holds.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	ok(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		out.WriteString(path + " " + string(fleet.DigestOf(b)) + "\n")
		return err
	}))
	return out.String()
}

func TestRestoreOverwritesNothing(t *testing.T) {
	o := sealedBook(t, func(*book.Genesis, *book.KeepSecrets) {})
	file := snapshotFile(t, o)
	cfg := nodeConfig(t)
	inv, aside, err := controlplane.RestoreSnapshot(cfg, bytes.NewReader(file), int64(len(file)), false, 0)
	if err != nil || aside != "" || inv.AuditSize != 4 || inv.Bundle < inv.Epoch.Number || inv.Epoch.Number == 0 { // three, and that of the new epoch
		t.Fatalf("%+v %q %v", inv, aside, err)
	}
	again, err := controlplane.Recover(cfg, 0) // reads back what was written, and begins another epoch
	if err != nil || again.AuditSize != 5 || again.Bundle <= inv.Bundle || again.Epoch.Number <= inv.Epoch.Number || again.KEK != inv.KEK ||
		again.Customers != inv.Customers || again.Appliances != inv.Appliances || again.TrustDomain != inv.TrustDomain {
		t.Fatalf("%+v, before it %+v, %v", again, inv, err)
	}
	if _, _, err := controlplane.RestoreSnapshot(cfg, bytes.NewReader(file), int64(len(file)), false, 0); !errors.Is(err, fault.Conflict) {
		t.Fatalf("over a log: %v", err)
	}
	if _, aside, err = controlplane.RestoreSnapshot(cfg, bytes.NewReader(file), int64(len(file)), true, 0); err != nil || aside == "" {
		t.Fatalf("%q %v", aside, err)
	}
	if _, err := os.Stat(filepath.Join(aside, "log")); err != nil {
		t.Fatalf("what was set aside is not there: %v", err)
	}
	other := nodeConfig(t)
	other.TrustDomain = "other.example"
	if _, _, err := controlplane.RestoreSnapshot(other, bytes.NewReader(file), int64(len(file)), false, 0); !errors.Is(err, fault.Conflict) {
		t.Fatalf("of another trust domain: %v", err)
	}
	if _, err := controlplane.Recover(nodeConfig(t), 0); !errors.Is(err, fault.NotFound) {
		t.Fatalf("an empty directory: %v", err)
	}
	b := slices.Clone(file)
	b[len(b)/2] ^= 1
	left := nodeConfig(t)
	if _, _, err := controlplane.RestoreSnapshot(left, bytes.NewReader(b), int64(len(b)), false, 0); !errors.Is(err, fault.Invalid) {
		t.Fatalf("a damaged snapshot: %v", err)
	}
	if all, _ := os.ReadDir(left.Dir); len(all) > 0 {
		t.Fatal("a damaged snapshot left something")
	}
}

// crowd is a cluster whose members do what a script says.
type crowd struct {
	mu   sync.Mutex
	all  func() raft.Cluster
	done []string
	err  error
}

func (c *crowd) IDs() []string {
	var out []string
	for _, m := range c.all().Members {
		out = append(out, m.ID)
	}
	return out
}
func (c *crowd) Members(context.Context) (raft.Cluster, error) { return c.all(), nil }
func (c *crowd) Change(_ context.Context, x raft.Change) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done = append(c.done, x.Do+" "+x.ID)
	return c.err
}
func (c *crowd) Replace(context.Context, string, string) error { return nil }
func (c *crowd) changes() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.done, ", ")
}

// led is an order of one node, which leads while it is told so.
type led struct {
	*order
	follows atomic.Bool
}

func (*led) Read(context.Context) error { return nil }
func (l *led) Leader() string {
	if l.follows.Load() {
		return "cp-2"
	}
	return "cp-1"
}

// TestAutopilotInTime runs the leader's loop in fake time: a voter falls silent, and a day later, not earlier, it is removed
// for good; a follower and a policy that is off do nothing.
func TestAutopilotInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newBook(t)
		l := &led{order: o}
		var began atomic.Pointer[time.Time]
		begin := func() { now := time.Now(); began.Store(&now) }
		begin()
		c := &crowd{all: func() raft.Cluster {
			out := seen("cp-1! cp-2 cp-3 cp-4 cp-5?")
			out.Members[4].Silent = time.Since(*began.Load()).Milliseconds()
			return out
		}}
		s, err := controlplane.NewServer(controlplane.Options{Name: "cp-1", Book: o.book, Consensus: l, KEK: make([]byte, 32), LeafLife: time.Hour, Cluster: c, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		over := make(chan error)
		go func() { over <- s.Pilot(ctx) }()
		time.Sleep(48 * time.Hour)
		if got := c.changes(); got != "" {
			t.Fatalf("autopilot is off, and did %q", got)
		}
		must(t, o, book.SetAutopilot{Autopilot: book.Autopilot{RemoveDead: true}})
		begin()
		l.follows.Store(true)
		time.Sleep(30 * time.Hour)
		if got := c.changes(); got != "" {
			t.Fatalf("a follower did %q", got)
		}
		begin()
		l.follows.Store(false)
		time.Sleep(23 * time.Hour)
		if got := c.changes(); got != "" {
			t.Fatalf("after 23 hours of silence: %q", got)
		}
		time.Sleep(time.Hour + 15*time.Second)
		if got := c.changes(); !strings.HasPrefix(got, "remove cp-5") {
			t.Fatalf("after a day of silence: %q", got)
		}
		if p, _ := o.book.View().Peer("cp-5"); !p.Removed || !strings.Contains(p.Reason, "autopilot") {
			t.Fatalf("%+v", p)
		}
		stop()
		if err := <-over; err != nil {
			t.Fatal(err)
		}
	})
}

// TestARemovedNodeIsRefusedAtTheDoor: as soon as the node that is asked knows it, by the configuration or by the book.
func TestARemovedNodeIsRefusedAtTheDoor(t *testing.T) {
	o := newBook(t)
	in := "cp-1! cp-2 cp-3"
	c := &crowd{all: func() raft.Cluster { return seen(in) }}
	s, err := controlplane.NewServer(controlplane.Options{Name: "cp-1", Book: o.book, Consensus: &led{order: o}, KEK: make([]byte, 32), LeafLife: time.Hour, Cluster: c, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	knock := func(name string) error {
		return s.Admit(fleet.PrincipalOf("acme.example", fleet.Node, name), "any")
	}
	if err := knock("cp-2"); err != nil {
		t.Fatal(err)
	}
	must(t, o, book.RemoveNode{Name: "cp-2", Reason: "lost"})
	if err := knock("cp-2"); !errors.Is(err, fault.Denied) {
		t.Fatalf("by the book: %v", err)
	}
	in = "cp-1! cp-2"
	if err := knock("cp-3"); !errors.Is(err, fault.Denied) {
		t.Fatalf("by the configuration: %v", err)
	}
	if err := knock("cp-1"); err != nil {
		t.Fatal(err)
	}
}
