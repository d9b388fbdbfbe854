// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"context"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// zeros is an artifact of so many bytes, and a store that has nothing else.
type zeros int64

func (z zeros) Open(fleet.Digest) (controlplane.Artifact, error) { return z, nil }
func (zeros) Put(context.Context, fleet.Digest, func() ([]byte, error)) (int64, error) {
	return 0, fault.New("test", fault.Internal, "nothing is put here")
}
func (zeros) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }
func (z zeros) Size() int64                         { return int64(z) }
func (zeros) Close() error                          { return nil }

// TestEnemyWasBannedWhileConnected: a ban holds on the connections for calls that are open, too. What is under way ends, and no other
// call is answered.
func TestEnemyWasBannedWhileConnected(t *testing.T) {
	const size = 1 << 30
	g := newGate(t, 0)
	g.server.Artifacts = zeros(size)
	cert := g.enrolled(logKey(t))
	c := boundaryv1connect.NewBoundaryClient(g.caller(cert), "https://"+g.addr)
	get := func() (*connect.ServerStreamForClient[boundaryv1.ArtifactChunk], error) {
		return c.Artifact(t.Context(), connect.NewRequest(&boundaryv1.ArtifactRequest{Digest: string(fleet.DigestOf(nil))}))
	}
	s, err := get()
	ok(t, err)
	defer s.Close()
	if !s.Receive() {
		t.Fatal(s.Err())
	}
	submitAs(g, controlplane.Ban{Name: "eu-1", Reason: "stolen"})
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
