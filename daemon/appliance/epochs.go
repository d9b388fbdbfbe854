// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"sync"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// epochRetry is the time between two entries about refused epochs.
const epochRetry = 10 * time.Minute

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

// meet compares the epoch of a welcome with the one that was met last, and gives the one that the channel is of.
func (a *Appliance) meet(ctx context.Context, w *boundaryv1.Welcome) (fleet.Epoch, error) {
	now, err := epochOf(w.GetEpoch())
	if err != nil {
		return now, err
	}
	for try := 0; ; try++ {
		st := a.book.View()
		if now == st.Epoch {
			return now, nil
		}
		r := w.GetRestart()
		c := book.MeetEpoch{Epoch: now, Cause: r.GetCause(), LogKept: r.GetLogKept(), OrdersKnown: r.GetOrdersKnown(),
			ReportsKnown: r.GetReportsKnown(), Witnessed: r.GetWitnessed()}
		if err = st.CheckEpoch(c, a.now().UTC()); err == nil {
			c.Lost = st.LossOf(c)
			if _, err = book.Submit(ctx, a.book, c); fault.Of(err) == fault.Conflict && try < 8 {
				continue // a report was written meanwhile
			}
		}
		if err == nil {
			a.log.Warn("the vendor's book has begun another epoch: what it forgot is on record", "epoch", now.String(), "cause", c.Cause, "lost",
				c.Lost.Sentences())
			return now, nil
		}
		a.refuseEpoch(ctx, now, w.GetNode(), err)
		return now, err
	}
}

// refusals of epochs are on record one in epochRetry.
type epochRefusals struct {
	mu   sync.Mutex
	next time.Time
	left int
}

func (a *Appliance) refuseEpoch(ctx context.Context, e fleet.Epoch, node string, why error) {
	if k := fault.Of(why); k == fault.Unavailable || k == fault.Internal {
		return // it is this appliance's own trouble
	}
	a.epochs.mu.Lock()
	if a.now().Before(a.epochs.next) {
		a.epochs.left++
		a.epochs.mu.Unlock()
		return
	}
	c := book.RefuseEpoch{Epoch: e, Node: fault.Clip(node), Reason: fault.Text(why), Left: a.epochs.left}
	a.epochs.next, a.epochs.left = a.now().Add(epochRetry), 0
	a.epochs.mu.Unlock()
	a.log.Error("a node of the vendor's is refused: its book has an epoch that is not taken", "node", node, "epoch", e.String(), "err",
		fault.Text(why))
	if _, err := book.Submit(ctx, a.book, c); err != nil {
		a.log.Error("that an epoch was refused is not on record", "err", err)
	}
}
