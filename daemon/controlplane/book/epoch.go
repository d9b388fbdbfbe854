// SPDX-License-Identifier: Apache-2.0

package book

import (
	"slices"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// ByRestore is the cause of an epoch that began from a restored snapshot.
const ByRestore = "restore"

// ByRecover is the cause of an epoch that one node began because the others were lost.
const ByRecover = "recover"

// maxEpochs is how many epochs a book stores; the oldest is dropped first.
const maxEpochs = 64

// maxSkip bounds how far the numbers of an appliance may be past those of the book, so that no appliance exhausts them.
const maxSkip = 1 << 32

// Epoch is one history of the book, as the book knows it.
type Epoch struct {
	fleet.Epoch
	Cause string    `json:"cause"`
	Begun time.Time `json:"begun"` // by the clock of the machine where it was begun
	Size  int64     `json:"size"`  // entries of the log that it began with
}

// Epoch is the current epoch.
func (s State) Epoch() Epoch {
	if n := len(s.Epochs); n > 0 {
		return s.Epochs[n-1]
	}
	return Epoch{}
}

// EntriesKeptSince is how many entries of the log the current epoch has in common with another one. known is false if the book never had
// that epoch or has dropped it: then size is how many entries all epochs of the book have in common.
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

// BeginEpoch is the first change of a book after a snapshot was restored, or after one node continued without the others. Number, id and
// time are set by the command that does so.
type BeginEpoch struct {
	Epoch Epoch  `json:"epoch"`
	Alone string `json:"alone,omitempty"` // name of the node that continues; every other one is removed permanently
}

// Kind names the change in the log. The audit package recognises it: it tells a recorded restart of a log from a fork.
func (BeginEpoch) Kind() string { return audit.RestartKind }

// Apply begins the epoch. The number of the bundle continues above all that the lost history may have reached (less than one a second).
// An appliance counts as offline until it connects in the new epoch. The other nodes may have the lost history on their disks, and a
// majority of the votes in it: if they were accepted, they would replace this history with it, so they are removed.
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
			s.markRemoved(p.Name, "it was lost when "+e.String()+" began", m.At)
		}
	}
	return Nothing{}, nil
}

// Meet records the point from which an appliance that last knew another epoch and this book continue. It is made at the appliance's
// hello, before the channel carries anything else.
type Meet struct {
	Name        fleet.ApplianceID `json:"name"`
	Epoch       fleet.Epoch       `json:"epoch"` // of the book
	Held        fleet.Epoch       `json:"held"`  // by the appliance
	OrdersDone  uint64            `json:"orders_done"`
	ReportsDone uint64            `json:"reports_done"`
	ReportsFrom uint64            `json:"reports_from"` // the oldest report that it can still send
	LogFrom     int64             `json:"log_from"`     // size of the newest countersigned head that this log still contains; 0: none
	Lost        Lost              `json:"lost"`
}

// Lost is what an appliance has of a former epoch and this book has not.
type Lost struct {
	Orders  fleet.Span `json:"orders,omitzero"`  // numbers of orders that it has taken
	Reports fleet.Span `json:"reports,omitzero"` // numbers of reports that it can't send again
	Log     fleet.Span `json:"log,omitzero"`     // entries of the vendor's log that it countersigned, counted from 1
	Again   int        `json:"again,omitempty"`  // pending orders of a former epoch that it may have received under another number
}

func (Meet) Kind() string { return "appliance.meet/1" }

// Meeting is what the book knew of an appliance before their [Meet] in an epoch. It is stored until the appliance reports in that epoch,
// so that a repeated hello gets the same answer.
type Meeting struct {
	Epoch   fleet.Epoch `json:"epoch"`
	Orders  uint64      `json:"orders"`
	Reports uint64      `json:"reports"`
}

// OrdersKnown is the number of the newest order from before the last [Meet] of the appliance and the book; later ones are pending and
// have no number yet.
func (a Appliance) OrdersKnown() uint64 { return a.OrdersSent() - uint64(a.Unmet) }

// Apply continues from the numbers of the appliance: orders that it has taken are done, and pending orders get the numbers after them. No
// number is used for two orders that it could take, and no order is lost.
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
	case c.OrdersDone > a.OrdersKnown() && c.OrdersDone-a.OrdersKnown() > maxSkip,
		c.ReportsDone > a.ReportsDone && c.ReportsDone-a.ReportsDone > maxSkip,
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
		if o.Checkpoint != nil { // its proof begins with a head that may be lost
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

// met records that the appliance reported in the current epoch: the numbers of the orders that it was sent are final.
func (s State) met(a *Appliance) {
	a.Met, a.Unmet, a.Meeting = s.Epoch().Epoch, 0, Meeting{}
}

// Unmet is the number of enrolled appliances that have not connected in the current epoch.
func (s State) Unmet() (n uint32) {
	e := s.Epoch().Epoch
	for a := range s.appliances.all() {
		if a.Status == Enrolled && a.Met != e && a.Meeting.Epoch != e {
			n++
		}
	}
	return n
}
