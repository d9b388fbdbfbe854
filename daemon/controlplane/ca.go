// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"strconv"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/refusal"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// Bundle signs the CAs and the time for a stranger: an appliance that slept through a change, or whose clock is off; an operator's command
// line that meets a CA which it does not know; a node that was down.
//
// The leader is asked first, so that a node that is behind gives no older bundle than was announced before the call. If no leader can be
// asked, this node gives the newest that it knows: the caller takes none that is older than the one it holds, and a cluster that has no
// leader because one of its nodes slept through a change of CA has one again only once that node was told.
func (b bootstrap) Bundle(ctx context.Context, req *connect.Request[boundaryv1.BundleRequest]) (*connect.Response[boundaryv1.BundleResponse], error) {
	if !b.refusals.Heard(req.Peer().Addr) {
		return nil, refusal.Busy()
	}
	if err := identity.CheckBundleNonce(req.Msg.GetNonce()); err != nil {
		return nil, err
	}
	asked, cancel := context.WithTimeout(ctx, admitWait)
	defer cancel()
	if err := b.replica.Read(asked); err != nil {
		b.log.Debug("the newest bundle of this node is handed out, and no leader was asked", "err", fault.Text(err))
	}
	page := b.replica.View()
	key, err := b.authority.LogSigner()
	if err != nil {
		return nil, err
	}
	sealed, err := identity.SealBundle(page.TrustDomain, page.Bundle(), page.Slots, b.replica.Now(), req.Msg.GetNonce(), key)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&boundaryv1.BundleResponse{Sealed: sealed}), nil
}

// holds records that an appliance stored a bundle, where that says something new.
func (s *Server) holds(ctx context.Context, l *live, number uint64) error {
	if number > s.replica.View().Bundle() {
		// This node is behind, or the appliance says more than it knows: neither is worth its channel. Once the book has
		// that bundle, owed takes the word again.
		l.owes.Store(number)
		if number > s.replica.View().Bundle() {
			return nil
		}
		l.owes.Store(0) // the book went on in between
	}
	a, err := s.replica.View().Appliance(l.name)
	if err != nil || number <= a.Bundle {
		return err
	}
	_, err = book.Submit(ctx, s.replica, l.by, "", book.HoldsBundle{Name: l.name, Number: number})
	return err
}

// owed takes an appliance's word about a bundle that this node had not met when it came. It never waits.
func (s *Server) owed(page book.State, l *live) {
	number := l.owes.Load()
	if number == 0 || number > page.Bundle() || !l.owes.CompareAndSwap(number, 0) {
		return
	}
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), submitFor)
		defer cancel()
		if err := s.holds(ctx, l, number); err != nil {
			l.owes.CompareAndSwap(0, number) // at the next change of the book
			s.log.Info("which bundle an appliance holds is not on record yet", "appliance", l.name, "err", fault.Text(err))
		}
	}()
}

// saw puts on record that an operator called, and which bundle it says that its command line has stored, if that is news. It holds no call
// up for long, and refuses none: what is not on record is tried again with the next call.
func (s *Server) saw(ctx context.Context, w api.Who, says string) {
	_, _, name, _ := w.Principal.Split()
	held, _ := strconv.ParseUint(says, 10, 64) // an older command line says nothing: 0
	ctx, cancel := context.WithTimeout(ctx, admitWait)
	defer cancel()
	if held > s.replica.View().Bundle() && s.replica.Read(ctx) != nil { // this node may be behind
		return
	}
	page := s.replica.View()
	o, ok := page.FindOperator(name)
	if !ok || held > page.Bundle() || held <= o.Bundle && s.replica.Now().Sub(o.Seen) < book.SeenEvery {
		return
	}
	if _, busy := s.seeing.LoadOrStore(name, true); busy { // of the same operator, at this node
		return
	}
	defer s.seeing.Delete(name)
	if _, err := book.Submit(ctx, s.replica, w.Principal, "", book.OperatorSeen{Name: name, Serial: w.Serial, Bundle: held}); err != nil {
		s.log.Info("that an operator called, and which bundle it holds, is not on record yet", "operator", name, "err", fault.Text(err))
	}
}
