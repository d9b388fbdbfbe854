// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// huge is a store with one artifact of so many zeros, by a digest that is not theirs.
func huge(t *testing.T, size int64) (*artifact.Store, fleet.Digest) {
	t.Helper()
	dir, d := t.TempDir(), fleet.DigestOf(nil)
	s, err := artifact.Open(dir)
	ok(t, err)
	f, err := os.Create(filepath.Join(dir, "blobs/sha256", strings.TrimPrefix(string(d), "sha256:")))
	ok(t, err)
	ok(t, errors.Join(f.Truncate(size), f.Close()))
	return s, d
}

// JoinNames is a sealed release that names artifacts.
func JoinNames(t *testing.T, version string, of ...fleet.Digest) []byte {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	ok(t, err)
	services, all := "", map[string]fleet.Digest{}
	for i, d := range of {
		name := fmt.Sprint("s", i)
		services += "  " + name + ":\n    command: [bin/app]\n    x-demarc: {artifact: " + name + "}\n"
		all[name] = d
	}
	b, err := seal.Seal(manifest.Release{App: "notes", Version: version, Compose: "x-demarc: {app: notes, version: " + version + "}\nservices:\n" + services, Artifacts: all}, key)
	ok(t, err)
	return b
}

// TestEnemyWasBannedWhileConnected: a ban holds on the connections for calls that are open, too. What is under way ends, and no other
// call is answered.
func TestEnemyWasBannedWhileConnected(t *testing.T) {
	const size = 1 << 30
	g := newGate(t, 0)
	store, d := huge(t, size)
	g.server.Keep(store)
	cert := g.enrolled(logKey(t))
	sealed := JoinNames(t, "1.0.0", d)
	submitAs(g, book.Publish{Digest: fleet.DigestOf(sealed), App: "notes", Version: "1.0.0", Sealed: sealed, To: []fleet.ApplianceID{"eu-1"}})
	c := boundaryv1connect.NewBoundaryClient(g.caller(cert), "https://"+g.addr)
	get := func() (*connect.ServerStreamForClient[boundaryv1.ArtifactChunk], error) {
		return c.Artifact(t.Context(), connect.NewRequest(&boundaryv1.ArtifactRequest{Digest: string(d)}))
	}
	s, err := get()
	ok(t, err)
	defer s.Close()
	if !s.Receive() {
		t.Fatal(s.Err())
	}
	submitAs(g, book.Ban{Name: "eu-1", Reason: "stolen"})
	got := 0
	for s.Receive() {
		got += len(s.Msg().GetData())
	}
	refusedWith(t, api.FromWire("test", s.Err()), fault.Denied, "is banned")
	if got > size/2 {
		t.Errorf("%d bytes came after the ban", got)
	}
	again, err := get()
	if err == nil {
		again.Receive()
		err = again.Err()
		again.Close()
	}
	refusedWith(t, api.FromWire("test", err), fault.Denied, "is banned") // a new connection would end in its handshake
	_, err = c.Renew(t.Context(), connect.NewRequest(&boundaryv1.RenewRequest{}))
	refusedWith(t, api.FromWire("test", err), fault.Denied, "is banned")
	log := g.order.book.Log()
	if e := string(log.Entry(log.Size() - 1)); !strings.Contains(e, "refused/1") || !strings.Contains(e, "is banned") {
		t.Errorf("the refusal is not on record: %s", e)
	}
}

// TestAnArtifactIsForThoseItWasOfferedTo (FAULTS.md I5): an appliance gets the artifacts of releases that were offered to it, after the
// offer was acknowledged and when the release is offered to others too, and is told the same of those of other releases as of those
// that are nowhere.
func TestAnArtifactIsForThoseItWasOfferedTo(t *testing.T) {
	g := newGate(t, 0)
	store, err := artifact.Open(t.TempDir())
	ok(t, err)
	g.server.Keep(store)
	cert := g.enrolled(logKey(t))
	put := func(text string) fleet.Digest {
		d := fleet.DigestOf([]byte(text))
		_, err := store.Put(t.Context(), d, strings.NewReader(text))
		ok(t, err)
		return d
	}
	mine, theirs, none, shared := put("mine"), put("theirs"), put("none"), put("shared")
	submitAs(g, book.RegisterAppliance{Name: "us-1", Customer: "globex", Expect: []byte(`{}`)})
	publish := func(version string, to fleet.ApplianceID, of ...fleet.Digest) {
		sealed := JoinNames(t, version, of...)
		submitAs(g, book.Publish{Digest: fleet.DigestOf(sealed), App: "notes", Version: version, Sealed: sealed, To: []fleet.ApplianceID{to}})
	}
	publish("1.0.0", "us-1", theirs)
	publish("1.0.1", "eu-1", mine)
	publish("1.0.2", "us-1", theirs, shared)
	publish("1.0.3", "eu-1", shared)
	submitAs(g, book.OrdersDone{Name: "eu-1", Upto: 2})
	c := boundaryv1connect.NewBoundaryClient(g.caller(cert), "https://"+g.addr)
	get := func(d fleet.Digest) (string, error) {
		s, err := c.Artifact(t.Context(), connect.NewRequest(&boundaryv1.ArtifactRequest{Digest: string(d)}))
		ok(t, err)
		defer s.Close()
		var b []byte
		for s.Receive() {
			b = append(b, s.Msg().GetData()...)
		}
		if s.Err() != nil {
			return "", api.FromWire("test", s.Err())
		}
		return string(b), nil
	}
	for d, want := range map[fleet.Digest]string{mine: "mine", shared: "shared"} {
		if got, err := get(d); err != nil || got != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	for what, d := range map[string]fleet.Digest{"another's": theirs, "of no release": none, "nowhere": fleet.DigestOf([]byte("nowhere"))} {
		if got, err := get(d); fault.Of(err) != fault.NotFound || !strings.Contains(fault.Text(err), "no release that was offered to appliance") {
			t.Errorf("%s: %q, %v", what, got, err)
		}
	}
}

// TestEnemySpellsLongNames: of what a stranger says of itself, little goes on record, however much of it there is.
func TestEnemySpellsLongNames(t *testing.T) {
	g := newGate(t, 0)
	long := strings.Repeat("n", 24<<10)
	for name, change := range map[string]func(*boundaryv1.EnrolRequest){
		"name":    func(m *boundaryv1.EnrolRequest) { m.Appliance = long },
		"nonce":   func(m *boundaryv1.EnrolRequest) { m.Nonce = long },
		"token":   func(m *boundaryv1.EnrolRequest) { m.Token = long },
		"request": func(m *boundaryv1.EnrolRequest) { m.Csr = []byte(long) },
		"log key": func(m *boundaryv1.EnrolRequest) { m.LogKey = []byte(long) },
		"region":  func(m *boundaryv1.EnrolRequest) { m.Aws = &boundaryv1.SignedIdentity{Region: long} },
	} {
		t.Run(name, func(t *testing.T) {
			m, _ := g.request(logKey(t))
			change(m)
			size := g.order.book.Log().Size()
			if _, err := g.enrol(m); err == nil {
				t.Fatal("it was taken")
			}
			log := g.order.book.Log()
			if log.Size() != size+1 {
				t.Fatalf("the refusal made %d entries", log.Size()-size)
			}
			if n := len(log.Entry(size)); n > 1<<10 {
				t.Errorf("a stranger put %d bytes on record", n)
			}
		})
	}
}
