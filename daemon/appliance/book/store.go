// SPDX-License-Identifier: Apache-2.0

package book

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"os"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/mesh"
)

// NewBook makes the customer's book with every change that this build knows.
func NewBook(name fleet.ApplianceID, customer fleet.CustomerID) *ledger.Book[State] {
	return ledger.NewBook(NewState(name, customer), ledger.Learn[SetSite](), ledger.Learn[MeetVendor](), ledger.Learn[Pin](),
		ledger.Learn[SetPosture](),
		ledger.Learn[UseTransport](), ledger.Learn[ReportsDone](), ledger.Learn[Observe](), ledger.Learn[ObserveTransports](),
		ledger.Learn[Checkpointed](), ledger.Learn[Take](),
		ledger.Learn[Unsaid](), ledger.Learn[ledger.SetTime[State]](), ledger.Learn[Consent](), ledger.Learn[BeginDeploy](),
		ledger.Learn[EndDeploy](), ledger.Learn[Start](), ledger.Learn[Finish](), ledger.Learn[Expire](),
		ledger.Learn[MeetEpoch](), ledger.Learn[RefuseEpoch]())
}

// Config is what a [Store] is made of.
type Config struct {
	Appliance fleet.ApplianceID
	Customer  fleet.CustomerID
	Clock     func() time.Time // of the host; nil: time.Now
	Logger    *slog.Logger     // nil: none
}

// Store is the customer's book in its file, and the way to change it. Its methods may be called concurrently.
type Store struct {
	book    *ledger.Book[State]
	local   *ledger.Local[State]
	host    func() time.Time
	log     *slog.Logger
	time    bookTime
	disk    diskState
	refused refusals
	file    *os.File // nil if the caller of [New] closes it
}

// New replays the book in a file. The caller closes the file after its last use.
func New(f ledger.File, cfg Config) (*Store, error) {
	s := &Store{book: NewBook(cfg.Appliance, cfg.Customer), host: cfg.Clock, log: cfg.Logger}
	if s.host == nil {
		s.host = time.Now
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.disk.wake = make(chan struct{}, 1)
	local, rec, err := ledger.OpenLocal(f, s.book)
	if err != nil {
		return nil, fault.At("appliance.openBook", "", err)
	}
	s.local = local
	s.time.begin(s.host().UTC(), s.book.At())
	if rec.Cut > 0 {
		s.log.Warn("the book ended in a write that nobody was told of: it was cut off", "bytes", rec.Cut)
	}
	return s, nil
}

// Open locks and replays the book at path; it is made if there is none. It fails with fault.Conflict if another process has it.
func Open(path string, cfg Config) (*Store, error) {
	const op = "appliance.openBook"
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the book can't be opened: %s", path)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fault.Because(err, op, fault.Conflict, "another process has the book %s: one appliance, one process", path)
	}
	s, err := New(f, cfg)
	if err != nil {
		f.Close()
		return nil, err
	}
	s.file = f
	return s, nil
}

// ReadOnly is a Store of a book that is written elsewhere. Nothing may be submitted.
func ReadOnly(b *ledger.Book[State], clock func() time.Time) *Store {
	return &Store{book: b, host: clock, log: slog.New(slog.DiscardHandler)}
}

// Propose implements [ledger.Proposer].
func (s *Store) Propose(ctx context.Context, data []byte) ([]byte, error) {
	return s.local.Propose(ctx, data)
}

// Close closes the file. Nothing may be submitted any more.
func (s *Store) Close() error {
	if s.file == nil {
		return nil
	}
	return s.file.Close()
}

// Begin puts the decisions of the customer's file into the book if they are others than before. It fails if the book refuses them, and
// does not if its disk takes nothing: they are put there before anything else, once it does.
func (s *Store) Begin(ctx context.Context, site Site) error {
	if sameSite(s.View().Site, site) {
		return nil
	}
	s.disk.site = &site
	if err := s.settle(ctx); err != nil {
		if s.local.Failed() == nil {
			return err
		}
		s.disk.failed(s.host()) // the application does not wait for space; whatever the vendor asks does
	}
	return nil
}

// Book is the state machine with its log.
func (s *Store) Book() *ledger.Book[State] { return s.book }

// View is the newest state. It never changes.
func (s *Store) View() State { return s.book.View() }

// Both is the newest state and the log of that moment.
func (s *Store) Both() (State, audit.Log) { return s.book.Both() }

// Changed is closed at the next change of the state.
func (s *Store) Changed() <-chan struct{} { return s.book.Changed() }

// Log is the audit log.
func (s *Store) Log() audit.Log { return s.book.Log() }

// Index is the number of the newest entry.
func (s *Store) Index() uint64 { return s.book.Index() }

// Failed returns why the book takes no changes now, nil if it does.
func (s *Store) Failed() error { return s.local.Failed() }

// FailedSince is when the newest failure began.
func (s *Store) FailedSince() time.Time { return s.disk.failedSince() }

// Now is the time that the book judges by: see [bookTime], but never before the book's last entry.
func (s *Store) Now() time.Time {
	now := s.stamp()
	if at := s.book.At(); at.After(now) {
		return at
	}
	return now
}

// Submit stamps a change of the appliance itself and puts it into the book. While the book's disk takes nothing, it is refused at once:
// the caller looks at the [State] later and tries again.
func Submit[R any](ctx context.Context, s *Store, c ledger.Change[State, R]) (R, error) {
	if err := s.local.Failed(); err != nil {
		var zero R
		return zero, mesh.For(mesh.OwnDisk, err)
	}
	return SubmitAs(ctx, s, drawID(), c)
}

// SubmitAs is Submit with a request id of the caller; "": it draws one.
func SubmitAs[R any](ctx context.Context, s *Store, id fleet.RequestID, c ledger.Change[State, R]) (R, error) {
	if id == "" {
		id = drawID()
	}
	var r R
	err := s.settle(ctx)
	if err == nil { // what is in the book must not depend on whether a connection lives
		r, err = ledger.Submit(context.WithoutCancel(ctx), s.local, s.Meta(id), c)
	}
	if err != nil && s.local.Failed() != nil {
		s.disk.failed(s.host())
		err = mesh.For(mesh.OwnDisk, err)
	}
	return r, err
}

// Meta is what a change of the appliance itself, made now, is stamped with.
func (s *Store) Meta(id fleet.RequestID) ledger.Meta {
	return ledger.Meta{At: s.stamp(), By: fleet.Local, Request: id}
}

func drawID() fleet.RequestID {
	var b [16]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails
	return fleet.RequestID(hex.EncodeToString(b[:]))
}
