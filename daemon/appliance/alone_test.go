// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"crypto/ed25519"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/workload"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// Alone is an appliance with its book in dir and a runtime of the test's, and nothing that connects it to anybody.
func Alone(t testing.TB, dir string, run Runtime, now func() time.Time) *Appliance {
	t.Helper()
	cfg := &configs.Appliance{Dir: dir, Name: "eu-1", Customer: "globex", TrustDomain: "acme.example"}
	a := &Appliance{cfg: cfg, now: now, log: slog.New(slog.DiscardHandler), run: run, secret: workload.NewFiles(t.TempDir()),
		signer: ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))}
	a.running.live = map[string]*execution{}
	f, err := os.OpenFile(filepath.Join(dir, "book"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if a.book, err = book.New(unsynced{f}, book.Config{Appliance: "eu-1", Customer: "globex", Clock: now}); err != nil {
		t.Fatal(err)
	}
	if a.store, err = artifact.Open(filepath.Join(dir, "artifacts")); err != nil {
		t.Fatal(err)
	}
	if err := a.openGate(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.gate.Close() })
	return a
}

// unsynced is a file whose test is not about loss of power.
type unsynced struct{ *os.File }

func (unsynced) Sync() error { return nil }

// Artifacts is the store of the appliance's artifacts, and Customer what the customer calls.
func (a *Appliance) Artifacts() *artifact.Store            { return a.store }
func (a *Appliance) Customer() localv1connect.LocalHandler { return local{a} }

// TakeOrder takes an order as the channel does.
func (a *Appliance) TakeOrder(ctx context.Context, o *boundaryv1.Order) (uint64, error) {
	return a.takeOrder(ctx, o)
}

// Acked takes the vendor's acknowledgement of reports.
func (a *Appliance) Acked(ctx context.Context, upto uint64) error {
	return a.acked(ctx, a.book.View().Epoch, upto)
}

// Hint is the vendor's time, as a channel tells it.
func (a *Appliance) Hint(at time.Time) { a.book.VendorTime(at) }

// Put makes a change as the appliance itself does, by its own stamp.
func Put[R any](ctx context.Context, a *Appliance, c ledger.Change[book.State, R]) (R, error) {
	return book.Submit(ctx, a.book, c)
}

// Loops are those that watch the book and act.
func (a *Appliance) Loops() map[string]func(context.Context, func()) error {
	return map[string]func(context.Context, func()) error{"deploy": a.reconcile, "operations": a.operate, "witness": a.witness,
		"clock": a.tendTime}
}
