// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// releases are the builds whose log and snapshot are kept: testdata/log-N.jsonl, snapshot-N, and the audit log's root in
// root-N. A release adds one with make record-release N=N, and no file is ever written a second time. (What was written before
// release 1 is in old_test.go.)
func releases(t *testing.T) []string {
	t.Helper()
	all, err := filepath.Glob("testdata/root-*")
	if err != nil || len(all) == 0 {
		t.Fatalf("no release is recorded: %v", err)
	}
	for i := range all {
		all[i] = strings.TrimPrefix(all[i], "testdata/root-")
	}
	return all
}

// taped is an order that keeps what it was given.
type taped struct {
	order
	lines [][]byte
}

func record[R any](t *testing.T, l *taped, by fleet.Principal, c ledger.Change[book.State, R]) {
	t.Helper()
	data, err := ledger.Encode(ledger.Meta{At: start.Add(time.Duration(l.n) * time.Second), By: by, Request: fleet.RequestID(fmt.Sprint(l.n))}, c)
	if err != nil {
		t.Fatal(err)
	}
	l.line(t, data)
}

func (l *taped) line(t *testing.T, data []byte) {
	t.Helper()
	if _, err := l.Propose(t.Context(), data); err != nil {
		t.Fatalf("%s: %v", data, err)
	}
	l.lines = append(l.lines, data)
}

// history makes some of each: what is accepted, what is refused, and each kind that this build knows at least once.
func history(t *testing.T) *taped {
	l := &taped{order: order{book: book.NewBook()}}
	ann, node := fleet.PrincipalOf("acme.example", fleet.Operator, "ann"), fleet.PrincipalOf("acme.example", fleet.Node, "cp-1")
	record(t, l, node, book.Genesis{TrustDomain: "acme.example", Slots: []identity.Slot{{Stage: identity.Active, CertDER: []byte("certificate"), SealedKey: []byte("sealed")}}})
	record(t, l, ann, book.RegisterCustomer{Name: "globex"})
	for _, name := range []fleet.ApplianceID{"eu-1", "eu-2"} {
		record(t, l, ann, book.RegisterAppliance{Name: name, Customer: "globex", Expect: json.RawMessage(`{}`)})
	}
	record(t, l, ann, enrol("n1", "serial-1", "key"))
	record(t, l, ann, enrol("n1", "serial-2", "key")) // refused: the nonce is spent
	record(t, l, node, book.Edge{Name: "eu-1", Serial: "serial-1", Online: true, Node: "cp-1", Route: "https"})
	record(t, l, node, book.NodeIs{Name: "cp-1", Raft: "10.0.0.1:1", API: "10.0.0.1:2", Voter: true, Build: "v1", Knows: []string{"later/1"}})
	record(t, l, ann, book.AddNode{Name: "cp-4", Raft: "10.0.0.4:1", API: "10.0.0.4:2", Voter: true})
	record(t, l, ann, book.NodeChanged{Do: "promote", Name: "cp-4"})
	record(t, l, ann, book.RemoveNode{Name: "cp-4", Reason: "the machine is gone"})
	record(t, l, ann, book.AddNode{Name: "cp-4", Raft: "10.0.0.4:1", API: "10.0.0.4:2"}) // refused
	record(t, l, ann, book.SetAutopilot{Autopilot: book.Autopilot{RemoveDead: true, DeadAfter: time.Hour}})
	record(t, l, ann, book.Ban{Name: "eu-2", Reason: "lost"})
	for _, kind := range l.book.Kinds() {
		if !strings.HasPrefix(kind, "genesis/") {
			l.line(t, fmt.Appendf(nil, `{"kind":%q,"meta":{"at":%q,"by":%q,"request":%q},"body":{}}`, kind, start.Add(time.Hour).Format(time.RFC3339Nano), ann, "bare "+kind))
		}
	}
	return l
}

// TestRecordARelease writes the files of a release, once.
func TestRecordARelease(t *testing.T) {
	l := history(t) // it can be made, at any time
	n := os.Getenv("DEMARC_RECORD")
	if n == "" {
		t.Skip("writes testdata: DEMARC_RECORD=N")
	}
	snap, err := l.book.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := snap.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	root := l.book.Log().Root()
	for name, data := range map[string][]byte{"log-" + n + ".jsonl": append(bytes.Join(l.lines, []byte("\n")), '\n'), "snapshot-" + n: b.Bytes(), "root-" + n: []byte(hex.EncodeToString(root[:]) + "\n")} {
		f, err := os.OpenFile(filepath.Join("testdata", name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAnOldLogReplaysToItsRoot has this build read the log and the snapshot of each release: both give the recorded root and
// the same page, and the log holds each kind that the first release knew.
func TestAnOldLogReplaysToItsRoot(t *testing.T) {
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, n := range releases(t) {
		replayed, restored := &order{book: book.NewBook()}, book.NewBook()
		log := read("log-" + n + ".jsonl")
		for line := range bytes.Lines(log) {
			if _, err := replayed.Propose(t.Context(), bytes.TrimSpace(line)); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
		}
		if err := restored.Restore(bytes.NewReader(read("snapshot-" + n))); err != nil {
			t.Fatal(err)
		}
		want := strings.TrimSpace(string(read("root-" + n)))
		for what, book := range map[string]*ledger.Book[book.State]{"log": replayed.book, "snapshot": restored} {
			if root := book.Log().Root(); hex.EncodeToString(root[:]) != want {
				t.Errorf("release %s: the audit log of the %s has the root %x, want %s", n, what, root, want)
			}
		}
		one, err := json.Marshal(replayed.book.View())
		if err != nil {
			t.Fatal(err)
		}
		two, err := json.Marshal(restored.View())
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(one, two) {
			t.Errorf("release %s: the log gives\n%s\nand the snapshot\n%s", n, one, two)
		}
		for _, kind := range book.FirstKinds() {
			if !strings.HasPrefix(kind, "genesis/2") && !bytes.Contains(log, []byte(`{"kind":"`+kind+`"`)) {
				t.Errorf("the log of release %s has no %s", n, kind)
			}
		}
	}
}
