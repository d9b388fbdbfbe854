// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/tls"
	"fmt"
	"sync"
	"time"

	"github.com/benbjohnson/immutable"
	"golang.org/x/time/rate"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// sessions is the open connections for calls of operators and of other nodes at this node.
type sessions struct {
	mu   *sync.Mutex
	open map[*turn]session
}

type session struct {
	who    fleet.Principal
	serial fleet.Serial
}

func newSessions() sessions { return sessions{new(sync.Mutex), map[*turn]session{}} }

// watch notes a connection whose handshake is done, where it is an operator's or a node's. Its close takes it off.
func (s sessions) watch(t *turn, state tls.ConnectionState) {
	if len(state.PeerCertificates) == 0 {
		return
	}
	p, serial, err := identity.PrincipalOf(&state)
	if class := api.ClassOf(p); err != nil || class != api.Operator && class != api.Node {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[t] = session{p, serial}
	off := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.open, t)
	}
	t.closed.Store(&off)
}

// end closes what passes no more: calls that are under way are cut off with their connection.
func (s sessions) end(passes func(fleet.Principal, fleet.Serial) error) {
	s.mu.Lock()
	var cut []*turn
	for t, one := range s.open {
		if passes(one.who, one.serial) != nil {
			cut = append(cut, t)
		}
	}
	s.mu.Unlock()
	for _, t := range cut {
		go func() { _ = t.Close() }() // one that is not TCP may take its time
	}
}

// proofs is what decides whose certificate passes, of operators and nodes: each of the maps is another one after each change.
type proofs struct {
	operators *immutable.SortedMap[string, Operator]
	certs     *immutable.SortedMap[string, NodeCerts]
	peers     *immutable.SortedMap[string, Peer]
}

func (s State) proofs() proofs { return proofs{s.operators, s.certs, s.peers} }

// stays tells whether an open connection with a certificate goes on, as this page has it.
func (s State) stays(p fleet.Principal, serial fleet.Serial) error {
	if _, role, name, _ := p.Split(); role == fleet.Node {
		if cut, err := s.refusesNode("controlplane.session", name, serial, time.Time{}); cut {
			return err
		}
		return nil
	}
	return s.passes(p, serial)
}

// passes tells whether a certificate of an operator may come in, as this page has it. While the book has no operator any
// may: the first that calls is adopted.
func (s State) passes(p fleet.Principal, serial fleet.Serial) error {
	_, _, name, _ := p.Split()
	o, ok := s.operators.Get(name)
	switch {
	case ok:
		return o.admits(serial)
	case s.operators.Len() == 0:
		return nil
	}
	return unknownOperator(name)
}

// admitOperator is [Server.Admit] for an operator. A refusal is told once this node knows that it is up to date.
func (s *Server) admitOperator(p fleet.Principal, serial fleet.Serial) error {
	err := s.book.View().passes(p, serial)
	if err == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), admitWait)
	defer cancel()
	if s.aside(func() error { return s.Order.Read(ctx) }) == nil {
		err = s.book.View().passes(p, serial)
	}
	if err != nil {
		go s.onRecord(context.Background(), p, Refuse{What: "operator", Name: clip(string(p)), Fault: fault.Denied, Reason: fault.Text(err)})
	}
	return err
}

// rank is what the operator who calls may do, as the book has it now. The first use of a next certificate is put on record
// before it counts, and so is the adoption of the operator of a book that has none.
func (s *Server) rank(ctx context.Context, w api.Who, till time.Time) (fleet.Rank, error) {
	_, _, name, _ := w.Principal.Split()
	page := s.book.View()
	if page.operators.Len() == 0 {
		c := AdoptOperator{FirstOperator{Name: name, Serial: w.Serial, Till: till, Issuer: w.Issuer}}
		if _, err := submit(ctx, s, w.Principal, "", c); err != nil && fault.Of(err) != fault.Denied {
			return "", err
		}
		s.log.Warn("the book had no operators: the first who called is its admin now", "operator", name)
	}
	o, ok := page.operators.Get(name)
	if !ok || o.admits(w.Serial) != nil {
		if err := s.Order.Read(ctx); err != nil {
			return "", err
		}
		if o, ok = s.book.View().operators.Get(name); !ok {
			return "", unknownOperator(name)
		}
	}
	if err := o.admits(w.Serial); err != nil {
		return "", err
	}
	if w.Serial == o.Next {
		if _, err := submit(ctx, s, w.Principal, "", OperatorUses{Name: name, Serial: w.Serial}); err != nil {
			return "", err
		}
	}
	return o.Role, nil
}

// Refusals that go on record for one caller: so many a second, and so many at once. All strangers are one caller.
const (
	recordRate  = 1
	recordBurst = 64
	recordKeys  = 4096 // callers whose rate is known
)

// records bounds what refused callers can add to the log.
type records struct {
	mu *sync.Mutex
	of map[string]*refusals
}

type refusals struct {
	limit   *rate.Limiter
	dropped int
}

func newRecords() records { return records{new(sync.Mutex), map[string]*refusals{}} }

// drop counts a refusal of this caller that does not go on record, where the next one can tell it.
func (r records) drop(key string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if one := r.of[key]; one != nil {
		one.dropped++
	}
}

// take tells whether a refusal of this caller goes on record, and how many before it did not.
func (r records) take(key string) (bool, int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.of[key]
	if one == nil {
		if len(r.of) >= recordKeys {
			clear(r.of)
		}
		one = &refusals{limit: rate.NewLimiter(recordRate, recordBurst)}
		r.of[key] = one
	}
	if !one.limit.Allow() {
		one.dropped++
		return false, 0
	}
	dropped := one.dropped
	one.dropped = 0
	return true, dropped
}

// refused puts a call that the table refused on record, where the caller has a name. What one caller, or all of them,
// bring about faster than that is only counted: nobody fills the log or the book by knocking.
func (s *Server) refused(ctx context.Context, w api.Who, procedure string) {
	if !s.refusers.allow(string(w.Principal)) || w.Principal != "" && !s.refusals.Allow() { // strangers use up nobody's record
		s.meter.Unlogged.Inc()
		s.records.drop(string(w.Principal))
		return
	}
	s.log.Warn("call refused", "caller", w.Class, "principal", w.Principal, "procedure", procedure)
	if w.Principal == "" {
		return
	}
	reason := "not in the table for " + string(w.Class)
	if w.Rank != "" {
		reason = fmt.Sprintf("it needs the role %s, and the caller's is %s", api.Least(procedure), w.Rank)
	}
	s.onRecord(ctx, w.Principal, Refuse{What: procedure, Name: string(w.Principal), Fault: fault.Denied, Reason: reason})
}

// onRecord submits a refusal. That it can't be recorded is logged: the refusal itself stands. A caller who is refused over
// and over does not fill the log: what is left out is counted in the next that goes on record.
func (s *Server) onRecord(ctx context.Context, by fleet.Principal, r Refuse) {
	key := string(by)
	if r.What == "checkpoint" { // a fork is evidence against one appliance, and no other caller hides it
		key = r.What + " " + r.Name
	}
	now, dropped := s.records.take(key)
	if !now {
		return
	}
	if dropped > 0 {
		r.Reason += fmt.Sprintf(" (and %d refusals before this one that were not recorded)", dropped)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if _, err := submit(ctx, s, by, "", r); err != nil {
		s.log.Error("a refusal is not on record", "what", r.What, "reason", r.Reason, "error", err)
	}
}
