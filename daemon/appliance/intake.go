// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"sync"

	"golang.org/x/time/rate"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// What the vendor's orders may add to the customer's book, in bytes a second and at once. An order that comes faster waits in
// its connection, and what is behind it with it; nothing of the customer's waits for it.
const (
	intakeRate   = 32 << 10
	intakeBurst  = 64 << 20
	refusedRate  = 1 << 10 // of orders of which nothing comes
	refusedBurst = 4 << 20
	entryCost    = 512 // bytes of an entry around its body, and of the answer that is remembered
)

// intake bounds what the vendor's orders add to the book.
type intake struct {
	once         sync.Once
	all, refused *rate.Limiter
}

// wait returns when an order may go into the book. size is that of its body, in bytes.
func (i *intake) wait(ctx context.Context, size int, refused bool) error {
	i.once.Do(func() {
		i.all, i.refused = rate.NewLimiter(intakeRate, intakeBurst), rate.NewLimiter(refusedRate, refusedBurst)
	})
	size += entryCost
	err := i.all.WaitN(ctx, min(size, intakeBurst))
	if err == nil && refused {
		err = i.refused.WaitN(ctx, min(size, refusedBurst))
	}
	return fault.At("appliance.intake", fault.Unavailable, err)
}

// takeOrder puts an order on record, and returns the number of the last one that is. Its body goes on record where something
// comes of it; of one that is refused, what it was, its digest and its size. It returns an error where the order can't be the
// next one.
func (a *Appliance) takeOrder(ctx context.Context, o *boundaryv1.Order) (uint64, error) {
	if done := a.book.View().OrdersDone; o.GetNumber() <= done {
		return done, nil
	}
	t := a.take(o)
	took, err := book.DryRun(a.book, t)
	if err != nil {
		leaveOut(&t, o, book.GroundsOf(err))
		took, err = book.Attempt(ctx, a.book, t)
		return took.Done, err
	}
	if took.Reason != "" {
		leaveOut(&t, o, book.Grounds{Why: took.Why, Sentence: took.Reason})
		a.log.Warn("an order came to nothing", "number", o.GetNumber(), "reason", took.Reason)
	}
	if err := a.intake.wait(ctx, sizeOfTake(t), t.Refused != ""); err != nil {
		return 0, err
	}
	took, err = book.Persist(ctx, a.book, t) // nothing is acknowledged before it is written
	return took.Done, err
}

// take turns an order into a change of the book. Each field has a bound, and what is larger is refused here. A checkpoint is
// looked at here, since to countersign takes a clock.
func (a *Appliance) take(o *boundaryv1.Order) book.Take {
	t := book.Take{Number: o.GetNumber(), Epoch: o.GetEpoch().GetNumber()}
	refuse := func(format string, args ...any) book.Take {
		leaveOut(&t, o, book.GroundsOf(fault.New("appliance.take", fault.Invalid, format, args...)))
		return t
	}
	switch body := o.GetBody().(type) {
	case *boundaryv1.Order_Release:
		if len(body.Release) == 0 || len(body.Release) > seal.MaxSealed {
			return refuse("a release has 1 to %d bytes", seal.MaxSealed)
		}
		t.Release = body.Release
	case *boundaryv1.Order_Operation:
		if len(body.Operation) == 0 || len(body.Operation) > seal.MaxSealed {
			return refuse("a request has 1 to %d bytes", seal.MaxSealed)
		}
		t.Operation = body.Operation
	case *boundaryv1.Order_Cancel:
		if err := fleet.CheckName("operation", body.Cancel); err != nil {
			return refuse("%s", fault.Text(err))
		}
		t.Cancel = body.Cancel
	case *boundaryv1.Order_Probe:
		if len(body.Probe.GetId()) > book.MaxProbeID {
			return refuse("a probe's id has at most %d bytes", book.MaxProbeID)
		}
		t.Probe = &book.ProbeIndex{ID: body.Probe.GetId(), Index: body.Probe.GetIndex()}
	case *boundaryv1.Order_Checkpoint:
		c, err := a.countersign(body.Checkpoint)
		if err != nil {
			a.log.Error("the vendor's log does not continue what was countersigned", "err", err)
			return refuse("the vendor's checkpoint was not countersigned: %s", fault.Text(err))
		}
		t.Witnessed = c
	case *boundaryv1.Order_Cosigned:
		if st := a.book.View(); st.Countersigned(body.Cosigned) != nil || len(body.Cosigned) == 0 {
			return refuse("%s", fault.Text(st.Countersigned(body.Cosigned)))
		}
		t.Cosigned = body.Cosigned
	case *boundaryv1.Order_Withdrawn:
		t.Refused = "it was withdrawn: it spoke of an epoch of the vendor's book that is over"
	default:
		t.Refused = "an order that this build does not know"
	}
	return t
}

// leaveOut makes the change one that says why nothing comes of the order, and names its body in place of holding it.
func leaveOut(t *book.Take, o *boundaryv1.Order, b book.Grounds) {
	if t.Left != nil {
		return
	}
	*t = book.Take{Number: t.Number, Epoch: t.Epoch, Refused: fault.ClipTo(b.Sentence, channel.MaxSentence-cut), Why: b.Why}
	left := func(what string, b []byte) {
		t.Left = &book.LeftOut{What: what, Digest: fleet.DigestOf(b), Size: len(b)}
	}
	switch body := o.GetBody().(type) {
	case *boundaryv1.Order_Release:
		left(book.OrderRelease, body.Release)
	case *boundaryv1.Order_Operation:
		left(book.OrderOperation, body.Operation)
		if r, err := seal.Peek[operation.Request](body.Operation); err == nil && fleet.CheckName("operation", r.ID) == nil {
			t.Left.ID = r.ID
		}
	case *boundaryv1.Order_Cancel:
		left(book.OrderCancel, []byte(body.Cancel))
	case *boundaryv1.Order_Probe:
		left(book.OrderProbe, []byte(body.Probe.GetId()))
	case *boundaryv1.Order_Checkpoint:
		left(book.OrderCheckpoint, body.Checkpoint.GetNote())
	case *boundaryv1.Order_Cosigned:
		left(book.OrderCosigned, body.Cosigned)
	}
}

// sizeOfTake is about what the change takes in the book, in bytes, beside [entryCost].
func sizeOfTake(t book.Take) int {
	n := len(t.Release) + len(t.Operation) + len(t.Witnessed) + len(t.Cosigned)
	return n + n/3 + len(t.Cancel) + len(t.Refused)
}
