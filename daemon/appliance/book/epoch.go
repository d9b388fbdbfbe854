// SPDX-License-Identifier: Apache-2.0

package book

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// Bounds on what the vendor can do by saying that its book has another epoch.
const (
	maxEpochs   = 32             // that are stored; the oldest is dropped first
	epochsEach  = 8              // epochs within epochEvery; more are refused until some are older
	epochEvery  = 24 * time.Hour // by the time of the customer's book
	maxResent   = 256            // acknowledged reports that are stored to be sent again
	resentBytes = 256 << 10      // of them, at most
	maxForgot   = 64             // heads of former epochs that are stored as evidence
)

// Met is an epoch of the vendor's book, as this appliance met it.
type Met struct {
	Epoch   fleet.Epoch `json:"epoch"`
	Cause   string      `json:"cause"`
	At      time.Time   `json:"at"`
	LogKept int64       `json:"log_kept"` // entries of the vendor's log that both histories have
	Lost    Lost        `json:"lost"`
}

// Lost is what the vendor's book had before, as far as this appliance knows, and has no more.
type Lost struct {
	Orders  fleet.Span `json:"orders,omitzero"`  // numbers of orders that were taken here
	Reports fleet.Span `json:"reports,omitzero"` // numbers of reports that were acknowledged, and are not kept here any more
	Log     fleet.Span `json:"log,omitzero"`     // entries of the vendor's log that were countersigned here, counted from 1
	Again   fleet.Span `json:"again,omitzero"`   // numbers of reports that are sent again: they are not lost
}

// MeetEpoch records that the vendor's book has another epoch, and the point from which both sides continue. Nothing that the customer
// decided is touched: no grant, approval, use, posture, and no order that was taken is taken again.
type MeetEpoch struct {
	Epoch        fleet.Epoch `json:"epoch"`
	Cause        string      `json:"cause"`
	LogKept      int64       `json:"log_kept"`
	OrdersKnown  uint64      `json:"orders_known"`
	ReportsKnown uint64      `json:"reports_known"`
	Witnessed    int64       `json:"witnessed"`
	Lost         Lost        `json:"lost"` // what follows from the rest and from the book, for readers of the log
}

// Kind names the change in the log.
func (MeetEpoch) Kind() string { return "vendor.epoch/1" }

// Apply refuses an epoch that is over, one that would exhaust the numbers, and more than a few a day.
func (c MeetEpoch) Apply(s *State, m ledger.Meta) (none, error) {
	const op = "vendor.epoch"
	if c.Epoch == s.Epoch {
		return none{}, nil
	}
	if err := s.CheckEpoch(c, m.At); err != nil {
		return none{}, err
	}
	if c.Lost != s.LossOf(c) {
		return none{}, fault.New(op, fault.Conflict, "the book went on since the entry was made: come again")
	}
	s.Epoch = c.Epoch
	s.Epochs = append(slices.Clip(s.Epochs), Met{Epoch: c.Epoch, Cause: c.Cause, At: m.At, LogKept: c.LogKept, Lost: c.Lost})
	s.Epochs = s.Epochs[max(0, len(s.Epochs)-maxEpochs):]
	if s.LeastKept == 0 || c.LogKept < s.LeastKept {
		s.LeastKept = c.LogKept
	}
	s.VendorHolds = &c.Witnessed
	s.rewind(c.ReportsKnown)
	s.withdraw()
	s.forget(c.LogKept)
	return none{}, nil
}

// CheckEpoch returns nil if the vendor's book may be in this epoch, else why not.
func (s State) CheckEpoch(c MeetEpoch, at time.Time) error {
	const op = "vendor.epoch"
	if err := s.Epoch.CheckNext(c.Epoch); err != nil {
		return err
	}
	recent := 0
	for _, e := range s.Epochs {
		if at.Sub(e.At) < epochEvery {
			recent++
		}
	}
	switch {
	case c.Cause != "restore" && c.Cause != "recover" || c.LogKept < 0 || c.Witnessed < 0:
		return fault.New(op, fault.Invalid, "an epoch begins by restore or recover")
	case c.ReportsKnown > s.ReportsSent():
		return fault.New(op, fault.Conflict,
			"the vendor knows report %d, and %d is the last that was written: this appliance's own book was set back", c.ReportsKnown,
			s.ReportsSent())
	case recent >= epochsEach:
		return fault.New(op, fault.Busy, "the vendor's book began %d epochs within %s: another one is taken when that is over", recent,
			epochEvery)
	}
	return nil
}

// sizeOf reads the size of a head that was verified when it was taken.
func sizeOf(head []byte) int64 {
	lines := strings.SplitN(string(head), "\n", 3)
	if len(lines) < 3 {
		return 0
	}
	n, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// WitnessedSizes is the sizes of the heads of the vendor's log that were countersigned here.
func (s State) WitnessedSizes() []int64 {
	out := make([]int64, 0, len(s.Witnessed))
	for _, w := range s.Witnessed {
		out = append(out, sizeOf(w))
	}
	return out
}

// OldestReport is the number of the oldest report that can still be sent.
func (s State) OldestReport() uint64 { return s.ReportsDone - uint64(len(s.Resend)) + 1 }

// LossOf is what is lost if the vendor's book is as it reports.
func (s State) LossOf(c MeetEpoch) Lost {
	seen := uint64(0)
	if n := len(s.Witnessed); n > 0 {
		seen = uint64(max(sizeOf(s.Witnessed[n-1]), 0))
	}
	first := max(c.ReportsKnown+1, s.OldestReport())
	return Lost{Orders: fleet.SpanOf(c.OrdersKnown+1, s.OrdersDone), Reports: fleet.SpanOf(c.ReportsKnown+1, first-1),
		Again: fleet.SpanOf(first, s.ReportsDone),
		Log:   fleet.SpanOf(uint64(c.LogKept)+1, seen)}
}

// rewind makes the reports after a number wait again, as far as they are stored. If the vendor has more than it acknowledged, those are
// done.
func (s *State) rewind(known uint64) {
	if known >= s.ReportsDone {
		s.acknowledge(known)
		return
	}
	first := max(known+1, s.OldestReport())
	i := first - s.OldestReport()
	s.Reports = slices.Concat(s.Resend[i:], s.Reports)
	s.Resend = slices.Clone(s.Resend[:i])
	s.ReportsDone = first - 1
}

// acknowledge moves reports from those that wait to those that are stored to be sent again, and drops the oldest of these.
func (s *State) acknowledge(upto uint64) {
	n := upto - s.ReportsDone
	done := slices.Concat(s.Resend, s.Reports[:n])
	s.Reports = slices.Clone(s.Reports[n:])
	s.ReportsDone = upto
	from, bytes := len(done), 0
	for from > 0 && len(done)-from < maxResent {
		if bytes += done[from-1].bytes(); bytes > resentBytes {
			break
		}
		from--
	}
	s.Resend = slices.Clone(done[from:])
}

// bytes is about how much of the book a report takes.
func (r Report) bytes() int {
	n := 64 + len(r.Cosigned)
	if r.Operation != nil {
		n += len(r.Operation.Statement) + len(r.Operation.Output)
	}
	if r.Checkpoint != nil {
		n += len(r.Checkpoint.Note) + 32*len(r.Checkpoint.Proof)
	}
	if r.Deploy != nil {
		n += 512 + len(r.Deploy.Reason)
	}
	if r.Status != nil {
		n += 64 * (len(r.Status.Services) + len(r.Status.Secrets) + len(r.Status.Transports))
	}
	return n
}

// withdraw empties the reports that wait and speak of heads: the vendor's book may not have what they continue. Their numbers stay.
func (s *State) withdraw() {
	s.Reports = slices.Clone(s.Reports)
	for i, r := range s.Reports {
		if r.Checkpoint != nil || r.Cosigned != nil {
			s.Reports[i] = Report{At: r.At, Withdrawn: true}
		}
	}
}

// forget sets aside the vendor's heads that are not heads of its present log: they are evidence of what it had. What it proves next must
// begin with the newest that is left.
func (s *State) forget(kept int64) {
	i := slices.IndexFunc(s.Witnessed, func(head []byte) bool { return sizeOf(head) > kept })
	if i < 0 {
		i = len(s.Witnessed)
	}
	s.Forgotten = slices.Concat(s.Forgotten, s.Witnessed[i:])
	s.Forgotten = s.Forgotten[max(0, len(s.Forgotten)-maxForgot):]
	s.Witnessed = slices.Clone(s.Witnessed[:i])
}

// RefuseEpoch puts on record that a node said that the vendor's book has an epoch which is not taken.
type RefuseEpoch struct {
	Epoch  fleet.Epoch `json:"epoch"`
	Node   string      `json:"node"`
	Reason string      `json:"reason"`
	Left   int         `json:"left,omitempty"` // refusals before this one that are not on record
}

// Kind names the change in the log.
func (RefuseEpoch) Kind() string { return "vendor.epoch.refused/1" }

// Apply keeps the newest one, for the status.
func (c RefuseEpoch) Apply(s *State, m ledger.Meta) (none, error) {
	s.EpochRefused = fmt.Sprintf("%s, at node %s: %s", m.At.Format(time.RFC3339), c.Node, c.Reason)
	return none{}, nil
}

// Sentences says what is lost, and what is sent again.
func (l Lost) Sentences() []string {
	var out []string
	add := func(s fleet.Span, text string) {
		if s.Len() > 0 {
			out = append(out, fmt.Sprintf(text, s))
		}
	}
	add(l.Orders, "orders %s were taken here, and are not in the vendor's book")
	add(l.Reports, "reports %s were acknowledged, are not in the vendor's book, and are not kept here")
	add(l.Again, "reports %s were acknowledged, were not in the vendor's book, and are sent again")
	add(l.Log, "entries %s of the vendor's log were countersigned here, and are not in it: it goes on in another way from the one before them")
	return out
}
