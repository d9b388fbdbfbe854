// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/tls"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// sessions is the open connections for calls at this node whose peer showed a certificate: an operator, another node, or an appliance.
type sessions struct {
	mu   *sync.Mutex
	open map[*session]struct{}
}

type session struct {
	end    func() // cuts it
	who    fleet.Principal
	serial fleet.Serial
	issuer fleet.Digest
}

func newSessions() sessions { return sessions{new(sync.Mutex), map[*session]struct{}{}} }

// watch notes a connection whose handshake is done, if its peer showed a certificate. The function that it returns takes it off.
func (s sessions) watch(end func(), state tls.ConnectionState) (closed func()) {
	if len(state.PeerCertificates) == 0 {
		return func() {}
	}
	p, serial, err := identity.PrincipalOf(&state)
	if err != nil {
		return func() {}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	one := &session{end, p, serial, identity.IssuerOf(&state)}
	s.open[one] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.open, one)
	}
}

// end closes what passes no more: calls that are under way are cut off with their connection.
func (s sessions) end(passes func(fleet.Principal, fleet.Serial, fleet.Digest) error) {
	s.mu.Lock()
	var cut []*session
	for one := range s.open {
		if passes(one.who, one.serial, one.issuer) != nil {
			cut = append(cut, one)
		}
	}
	s.mu.Unlock()
	for _, one := range cut {
		go one.end() // one that is not TCP may take its time
	}
}

// admitOperator is [Server.Admit] for an operator. A refusal is told once this node knows that it is up to date.
func (s *Server) admitOperator(p fleet.Principal, serial fleet.Serial) error {
	err := s.replica.View().AcceptsOperator(p, serial, "")
	if err == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), admitWait)
	defer cancel()
	if s.desk.Yield(func() error { return s.replica.Read(ctx) }) == nil {
		err = s.replica.View().AcceptsOperator(p, serial, "")
	}
	if err != nil {
		go s.refusals.Named(context.Background(), p, book.Refuse{What: "operator", Name: fault.Clip(string(p)), Fault: fault.Denied, Reason: fault.Text(err)})
	}
	return err
}

// rank is what the operator who calls may do, as the book has it now. The first use of a next certificate is put on record
// before it counts, and so is the adoption of the operator of a book that has none.
func (s *Server) rank(ctx context.Context, w api.Who, till time.Time) (fleet.Rank, error) {
	_, _, name, _ := w.Principal.Split()
	page := s.replica.View()
	if page.OperatorCount() == 0 {
		c := book.AdoptOperator{FirstOperator: book.FirstOperator{Name: name, Serial: w.Serial, Till: till, Issuer: w.Issuer}}
		if _, err := book.Submit(ctx, s.replica, w.Principal, "", c); err != nil && fault.Of(err) != fault.Denied {
			return "", err
		}
		s.log.Warn("the book had no operators: the first who called is its admin now", "operator", name)
	}
	o, ok := page.FindOperator(name)
	if !ok || o.Accepts(w.Serial, w.Issuer) != nil {
		if err := s.replica.Read(ctx); err != nil {
			return "", err
		}
		if o, ok = s.replica.View().FindOperator(name); !ok {
			return "", book.UnknownOperator(name)
		}
	}
	if err := o.Accepts(w.Serial, w.Issuer); err != nil {
		return "", err
	}
	if w.Serial == o.Next {
		if _, err := book.Submit(ctx, s.replica, w.Principal, "", book.OperatorUses{Name: name, Serial: w.Serial}); err != nil {
			return "", err
		}
	}
	return o.Role, nil
}
