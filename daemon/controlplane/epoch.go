// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"math"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/refusal"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// How an epoch begins.

// DrawEpoch draws the next epoch of a book that is not in use: now is the time of this machine, and the number is above the one that is given.
func DrawEpoch(stored *ledger.Book[book.State], cause string, now time.Time, above uint64) (book.BeginEpoch, error) {
	page, log := stored.Both()
	id := make([]byte, 16)
	_, _ = rand.Read(id) // crypto/rand.Read never fails
	last := page.Epoch().Epoch
	e := book.Epoch{Epoch: fleet.Epoch{Number: max(last.Number+1, above+1, uint64(max(now.Unix(), 0))), ID: hex.EncodeToString(id)}, Cause: cause, Begun: now.UTC().Truncate(time.Second), Size: log.Size()}
	return book.BeginEpoch{Epoch: e}, last.CheckNext(e.Epoch)
}

// begin puts a new epoch into a book that is not in use. The entry has the book's own time: this machine's clock is not judged by anybody.
func begin(stored *ledger.Book[book.State], node, cause string, above uint64) error {
	const op = "controlplane.begin"
	c, err := DrawEpoch(stored, cause, time.Now(), above)
	if err != nil {
		return err
	}
	c.Alone = node
	meta := ledger.Meta{At: time.Unix(1, 0).UTC(), By: fleet.PrincipalOf(stored.View().TrustDomain, fleet.Node, node), Request: fleet.RequestID("epoch-" + c.Epoch.ID)}
	data, err := ledger.Encode(meta, c)
	if err != nil {
		return err
	}
	if _, err := stored.Apply(stored.Index(), data); err != nil {
		return err
	}
	if stored.View().Epoch().ID != c.Epoch.ID {
		return fault.New(op, fault.Internal, "the book did not take the new epoch")
	}
	return nil
}

// lost is what the entry of a meeting says is lost.
func lost(a book.Appliance, c book.Meet, size, seen int64) book.Lost {
	return book.Lost{Orders: fleet.SpanOf(a.OrdersKnown()+1, c.OrdersDone), Reports: fleet.SpanOf(a.ReportsDone+1, min(c.ReportsFrom, c.ReportsDone+1)-1),
		Log: fleet.SpanOf(uint64(size)+1, uint64(seen))}
}

// epochOf reads an epoch from the wire.
func epochOf(w *boundaryv1.Epoch) (fleet.Epoch, error) {
	e := fleet.Epoch{Number: w.GetNumber(), ID: w.GetId()}
	return e, e.Check()
}

func epochToWire(e fleet.Epoch) *boundaryv1.Epoch {
	if e == (fleet.Epoch{}) {
		return nil
	}
	return &boundaryv1.Epoch{Number: e.Number, Id: e.ID}
}

// meet compares the epoch of hello with that of the book. An appliance that knows an earlier one is told what the book kept; one that knows a
// later one is at the wrong node.
func (s *Server) meet(ctx context.Context, l *live, hello *boundaryv1.Hello) (*boundaryv1.Restart, error) {
	const op = "controlplane.Channel"
	held, err := epochOf(hello.GetEpoch())
	if err != nil {
		return nil, err
	}
	page := s.replica.View()
	now := page.Epoch()
	l.epoch = now.Epoch
	if held == now.Epoch {
		return nil, s.done(ctx, l.by, l.name, hello.GetOrdersDone())
	}
	if err := held.CheckNext(now.Epoch); err != nil {
		err = fault.New(op, fault.Conflict, "the appliance has met %s, and this node's book is in %s: where this book is the one to go on with, stop its nodes and run "+
			"demarc control-plane recover --epoch-above %d on one; else this node must not run", held, now.Epoch, held.Number)
		if may, left := s.refusals.Count(refusal.Principal(l.by)); may {
			s.log.Error("an appliance has met a later epoch of the book than this node has", "appliance", l.name, "epoch", held.String())
			s.refusals.Record(ctx, l.by, book.Refuse{What: "epoch", Name: string(l.name), Fault: fault.Of(err), Reason: fault.Text(err)}, left)
		}
		return nil, stale{err, now.Epoch}
	}
	a, err := page.Appliance(l.name)
	if err != nil {
		return nil, err
	}
	size, related := page.EntriesKeptSince(held)
	if least := hello.GetLogLeast(); !related && least > 0 {
		size = min(size, least) // each of the two may have kept less of what was before both
	}
	out := &boundaryv1.Restart{Cause: now.Cause, LogKept: size, OrdersKnown: a.OrdersKnown(), ReportsKnown: a.ReportsDone, Witnessed: s.evidence.WitnessedSize(page, a)}
	c := book.Meet{Name: l.name, Epoch: now.Epoch, Held: held, OrdersDone: hello.GetOrdersDone(), ReportsDone: hello.GetReportsDone(), ReportsFrom: hello.GetReportsFrom()}
	heads := hello.GetLogHeads()
	c.LogFrom = newest(heads, size)
	c.Lost = lost(a, c, size, newest(heads, math.MaxInt64))
	if related && a.Met != held {
		c.Lost.Again = a.Unmet
	}
	if m := a.Meeting; m.Epoch == now.Epoch { // it did not come as far as to say that it has met the epoch
		out.OrdersKnown, out.ReportsKnown = m.Orders, m.Reports
	}
	if a.Meeting.Epoch == now.Epoch && c.OrdersDone <= a.OrdersDone && c.ReportsFrom <= a.ReportsDone+1 && a.LogFrom != nil && *a.LogFrom == c.LogFrom {
		return out, nil // it comes again, and has not met the epoch yet
	}
	if err := s.comes(ctx, l.name); err != nil { // the entry is bounded as comings are
		return nil, err
	}
	_, err = book.Submit(ctx, s.replica, l.by, "", c)
	return out, err
}

// stale is why an appliance that has met another epoch gets no channel. It is told the node's, and judges for itself.
type stale struct {
	error
	epoch fleet.Epoch
}

// Unwrap returns the reason.
func (s stale) Unwrap() error { return s.error }

// newest is the greatest of the sizes that is not above most; 0 for none.
func newest(sizes []int64, most int64) (out int64) {
	for _, n := range sizes {
		if n <= most {
			out = max(out, n)
		}
	}
	return out
}
