// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"math"
	"slices"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// How an epoch begins.
const (
	ByRestore = "restore" // from a snapshot
	ByRecover = "recover" // with one node, the others are lost
)

// maxEpochs is how many epochs a book remembers; the oldest goes first.
const maxEpochs = 64

// maxAhead bounds by how many numbers an appliance may be ahead of the book, so that no appliance uses the numbers up.
const maxAhead = 1 << 32

// Epoch is one history of the book, as the book knows it.
type Epoch struct {
	fleet.Epoch
	Cause string    `json:"cause"`
	Begun time.Time `json:"begun"` // by the clock of the machine where it was begun
	Size  int64     `json:"size"`  // entries of the log that it kept
}

// Epoch is the present one.
func (s State) Epoch() Epoch {
	if n := len(s.Epochs); n > 0 {
		return s.Epochs[n-1]
	}
	return Epoch{}
}

// EntriesKeptSince is how many entries of the log the present epoch has in common with another one. known is false where the book never had that
// one, or has forgotten it: then it is how many all epochs of the book have in common.
func (s State) EntriesKeptSince(e fleet.Epoch) (size int64, known bool) {
	after := s.Epochs
	if e == (fleet.Epoch{}) {
		known = len(s.Epochs) < maxEpochs
	} else if i := slices.IndexFunc(s.Epochs, func(x Epoch) bool { return x.Epoch == e }); i >= 0 {
		after, known = s.Epochs[i+1:], true
	}
	for i, x := range after {
		if i == 0 || x.Size < size {
			size = x.Size
		}
	}
	return size, known
}

// BeginEpoch is the first change of a book after a snapshot was restored, or after one node went on without the others. Number, id and time
// are drawn where that is done.
type BeginEpoch struct {
	Epoch Epoch  `json:"epoch"`
	Alone string `json:"alone,omitempty"` // name of the node that goes on; every other one is removed for good
}

// Kind names the change in the log. The audit room knows it: an honest restart of a log is told from a fork by it.
func (BeginEpoch) Kind() string { return audit.RestartKind }

// Apply begins the epoch. The number of the bundle goes on above those that the forgotten history may have reached, which can't have been
// one a second since then. Nobody is online in the new epoch until it comes. The nodes that do not go on may have the forgotten history on their
// disks, and a majority of the votes in it: were they heard, they would write it over this one.
func (c BeginEpoch) Apply(s *State, m ledger.Meta) (Nothing, error) {
	e := c.Epoch
	if err := s.Epoch().CheckNext(e.Epoch); err != nil {
		return Nothing{}, err
	}
	if e.Cause != ByRestore && e.Cause != ByRecover || e.Size < 0 {
		return Nothing{}, fault.New("epoch.begin", fault.Invalid, "an epoch begins by restore or recover, with a log of 0 entries or more")
	}
	s.Epochs = append(slices.Clip(s.Epochs), e)
	s.Epochs = s.Epochs[max(0, len(s.Epochs)-maxEpochs):]
	if len(s.Slots) > 0 {
		s.number = max(s.Bundle()+1, e.Number)
	}
	for _, a := range s.Appliances() {
		if a.Online {
			a.Online = false
			s.appliances = s.appliances.Set(a.Name, a)
		}
	}
	for _, p := range s.Peers() {
		if c.Alone != "" && p.Name != c.Alone && !p.Removed {
			s.bury(p.Name, "it was lost when "+e.String()+" began", m.At)
		}
	}
	return Nothing{}, nil
}

// DrawEpoch draws the next epoch of a book that is not in use: now is the time of this machine, and the number is above the one that is given.
func DrawEpoch(stored *ledger.Book[State], cause string, now time.Time, above uint64) (BeginEpoch, error) {
	page, log := stored.Both()
	id := make([]byte, 16)
	_, _ = rand.Read(id) // crypto/rand.Read never fails
	last := page.Epoch().Epoch
	e := Epoch{Epoch: fleet.Epoch{Number: max(last.Number+1, above+1, uint64(max(now.Unix(), 0))), ID: hex.EncodeToString(id)}, Cause: cause, Begun: now.UTC().Truncate(time.Second), Size: log.Size()}
	return BeginEpoch{Epoch: e}, last.CheckNext(e.Epoch)
}

// begin puts a new epoch into a book that is not in use. The entry has the book's own time: this machine's clock is not judged by anybody.
func begin(stored *ledger.Book[State], node, cause string, above uint64) error {
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

// Meet puts on record where an appliance that knew another epoch and this book meet again. It is made when the appliance says hello, before
// the channel carries anything.
type Meet struct {
	Name        fleet.ApplianceID `json:"name"`
	Epoch       fleet.Epoch       `json:"epoch"` // of the book
	Held        fleet.Epoch       `json:"held"`  // by the appliance
	OrdersDone  uint64            `json:"orders_done"`
	ReportsDone uint64            `json:"reports_done"`
	ReportsFrom uint64            `json:"reports_from"` // the oldest report that it can still send
	LogFrom     int64             `json:"log_from"`     // size of the newest head that it countersigned of what this log still has; 0 for none
	Lost        Lost              `json:"lost"`
}

// Lost is what an appliance holds, or has been told, of a former epoch, and this book has not.
type Lost struct {
	Orders  fleet.Span `json:"orders,omitzero"`  // numbers of orders that it has taken
	Reports fleet.Span `json:"reports,omitzero"` // numbers of reports that it can't send again
	Log     fleet.Span `json:"log,omitzero"`     // entries of the vendor's log that it countersigned, counted from 1
	Again   int        `json:"again,omitempty"`  // orders of a former epoch that wait, and may have come to it under another number
}

// Kind names the change in the log.
func (Meet) Kind() string { return "appliance.meet/1" }

// Meeting is what the book knew of an appliance before both met in an epoch. It stays until the appliance is heard in that epoch, so that it is
// told the same however often it has to come.
type Meeting struct {
	Epoch   fleet.Epoch `json:"epoch"`
	Orders  uint64      `json:"orders"`
	Reports uint64      `json:"reports"`
}

// OrdersKnown is the number of the newest order that was made before the appliance and the book last met; those after it wait, and have no number yet.
func (a Appliance) OrdersKnown() uint64 { return a.OrdersSent() - uint64(a.Unmet) }

// lost is what the entry of a meeting says is lost.
func lost(a Appliance, c Meet, size, seen int64) Lost {
	return Lost{Orders: fleet.SpanOf(a.OrdersKnown()+1, c.OrdersDone), Reports: fleet.SpanOf(a.ReportsDone+1, min(c.ReportsFrom, c.ReportsDone+1)-1),
		Log: fleet.SpanOf(uint64(size)+1, uint64(seen))}
}

// Apply goes on with the numbers of the appliance: what it has taken is done, and what waits for it gets the numbers after that. No number is
// used for two orders that it could take, and none is lost.
func (c Meet) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	const op = "appliance.meet"
	a, err := s.Appliance(c.Name)
	switch {
	case err != nil:
		return Nothing{}, err
	case a.Status != Enrolled:
		return Nothing{}, fault.New(op, fault.Denied, "appliance %q is not enrolled", c.Name)
	case c.Epoch != s.Epoch().Epoch:
		return Nothing{}, fault.New(op, fault.Conflict, "the book is in another epoch: come again")
	case c.OrdersDone > a.OrdersKnown() && c.OrdersDone-a.OrdersKnown() > maxAhead, c.ReportsDone > a.ReportsDone && c.ReportsDone-a.ReportsDone > maxAhead,
		c.ReportsFrom == 0, c.LogFrom < 0, c.ReportsFrom > c.ReportsDone+1:
		return Nothing{}, fault.New(op, fault.Invalid, "appliance %q says numbers that no history of this book can have reached", c.Name)
	}
	known := a.OrdersKnown()
	if a.Meeting.Epoch != c.Epoch {
		a.Meeting = Meeting{Epoch: c.Epoch, Orders: known, Reports: a.ReportsDone}
	}
	if c.OrdersDone > a.OrdersDone {
		a.Orders = slices.Clone(a.Orders[min(c.OrdersDone, known)-a.OrdersDone:])
		a.OrdersDone = c.OrdersDone
	} else {
		a.Orders = slices.Clone(a.Orders)
	}
	for i, o := range a.Orders {
		if o.Checkpoint != nil { // its proof begins with a head that may be forgotten
			a.Orders[i] = Order{Withdrawn: true}
		}
	}
	if len(a.Orders) == 0 {
		a.Orders = nil
	}
	a.ReportsDone = max(a.ReportsDone, c.ReportsFrom-1)
	from := c.LogFrom
	a.LogFrom = &from
	s.appliances = s.appliances.Set(c.Name, a)
	return Nothing{}, nil
}

// met notes that the appliance was heard in the present epoch: what it was sent has a number for good.
func (s State) met(a *Appliance) {
	a.Met, a.Unmet, a.Meeting = s.Epoch().Epoch, 0, Meeting{}
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
		if may, left := s.unlessTooMany(ofCaller(l.by)); may {
			s.log.Error("an appliance has met a later epoch of the book than this node has", "appliance", l.name, "epoch", held.String())
			s.putOnRecord(ctx, l.by, Refuse{What: "epoch", Name: string(l.name), Fault: fault.Of(err), Reason: fault.Text(err)}, left)
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
	out := &boundaryv1.Restart{Cause: now.Cause, LogKept: size, OrdersKnown: a.OrdersKnown(), ReportsKnown: a.ReportsDone, Witnessed: s.witnessed(page, a)}
	c := Meet{Name: l.name, Epoch: now.Epoch, Held: held, OrdersDone: hello.GetOrdersDone(), ReportsDone: hello.GetReportsDone(), ReportsFrom: hello.GetReportsFrom()}
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
	_, err = Submit(ctx, s.replica, l.by, "", c)
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

// witnessed is the size of the newest head of the customer's log that the book has.
func (s *Server) witnessed(page State, a Appliance) int64 {
	v, err := verifier(audit.CustomerOrigin(page.TrustDomain, a.Name), a.LogKey)
	if n := len(a.Witnessed); err == nil && n > 0 {
		if head, err := audit.OpenCheckpoint(a.Witnessed[n-1], v); err == nil {
			return head.Size
		}
	}
	return 0
}

// Unmet is the number of enrolled appliances that have not been heard in the present epoch.
func (s State) Unmet() (n uint32) {
	e := s.Epoch().Epoch
	for a := range s.appliances.all() {
		if a.Status == Enrolled && a.Met != e && a.Meeting.Epoch != e {
			n++
		}
	}
	return n
}
