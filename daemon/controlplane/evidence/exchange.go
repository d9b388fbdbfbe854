// SPDX-License-Identifier: Apache-2.0

// Package evidence countersigns the customers' logs, asks for the vendor's log to be countersigned, and exports both.
package evidence

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/sync/errgroup"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/refusal"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// Exchange countersigns the customers' logs, has the vendor's log countersigned, and exports both. Its methods may be called concurrently.
type Exchange struct {
	replica   *book.Replica
	keys      *authority.Store
	refusals  *refusal.Recorder
	connected func() []fleet.ApplianceID // in order
	log       *slog.Logger
}

// NewExchange makes an exchange. connected lists the appliances that have a channel at this node, in order.
func NewExchange(r *book.Replica, keys *authority.Store, refusals *refusal.Recorder, connected func() []fleet.ApplianceID, log *slog.Logger) *Exchange {
	return &Exchange{replica: r, keys: keys, refusals: refusals, connected: connected, log: log}
}

// head signs the present head of the vendor's log.
func (s *Exchange) head() (audit.Log, []byte, error) {
	log := s.replica.Log()
	origin := audit.VendorOrigin(s.replica.View().TrustDomain)
	key, err := s.keys.LogSigner()
	if err != nil {
		return log, nil, err
	}
	signer, err := audit.NoteSigner(origin, key)
	if err != nil {
		return log, nil, err
	}
	cp, err := audit.Checkpoint(origin, log.Size(), log.Root(), signer)
	return log, cp, err
}

// Countersign checks that a customer's checkpoint continues the last one that was countersigned, and sends it back
// with this control plane's line. What does not continue it is a fork: it is refused and on record.
func (s *Exchange) Countersign(ctx context.Context, name fleet.ApplianceID, c book.Checkpoint) error {
	page := s.replica.View()
	a, err := page.Appliance(name)
	if err != nil {
		return err
	}
	v, err := Verifier(audit.CustomerOrigin(page.TrustDomain, name), a.LogKey)
	if err != nil {
		return err
	}
	var last []byte
	if n := len(a.Witnessed); n > 0 {
		last = a.Witnessed[n-1]
	}
	if last != nil {
		if head, err := audit.OpenCheckpoint(last, v); err == nil && c.From < head.Size {
			return s.sendAgain(ctx, a, last)
		}
	}
	if _, err := audit.Continues(c.Note, c.Proof, v, last); err != nil {
		if now, left := s.refusals.Count(refusal.Fork(name)); now {
			s.log.Error("a customer's log does not continue what was countersigned", "appliance", name, "err", err)
			s.refusals.Record(ctx, s.replica.Self(), book.Refuse{What: "checkpoint", Name: string(name), Fault: fault.Of(err), Reason: fault.Text(err)}, left)
		}
		return nil // the channel stays: the fork is evidence, not a reason to stop listening
	}
	key, err := s.keys.LogSigner()
	if err != nil {
		return err
	}
	cosigned, err := audit.Cosign(c.Note, audit.VendorOrigin(page.TrustDomain), key, s.replica.Now())
	if err != nil {
		return err
	}
	_, err = book.Submit(ctx, s.replica, s.replica.Self(), "", book.Countersign{To: name, Cosigned: cosigned})
	return err
}

// sendAgain sends the newest countersignature to an appliance whose proof begins below it, unless it is on its way: the
// appliance did not take it, and what it proves next must begin there.
func (s *Exchange) sendAgain(ctx context.Context, a book.Appliance, last []byte) error {
	if slices.ContainsFunc(a.Orders, func(o book.Order) bool { return o.Cosigned != nil }) {
		return nil
	}
	_, err := book.Submit(ctx, s.replica, s.replica.Self(), "", book.Countersign{To: a.Name, Cosigned: last})
	return err
}

// WithoutInvalid is the report with the reason in place of a countersignature that is none: the log keeps its size and its
// digest, and not what a stranger to our evidence wrote. [book.Report.Apply] looks once more.
func (s *Exchange) WithoutInvalid(r book.Report) book.Report {
	if r.Cosigned == nil {
		return r
	}
	page := s.replica.View()
	a, err := page.Appliance(r.Name)
	if err == nil {
		err = a.CheckCountersigned(page.TrustDomain, r.Cosigned)
	}
	if err != nil {
		r.Cosigned, r.Refused = nil, fault.Text(err)
	}
	return r
}

func Verifier(origin string, pem []byte) (note.Verifier, error) {
	k, err := seal.ParseKey(pem)
	if err != nil {
		return nil, err
	}
	return audit.NoteVerifier(origin, k.Public)
}

// The fleet is asked in turns, in a round for each tick: as many as finish it in witnessRounds, and witnessEach at least.
// Those of a round are asked side by side, so that their proposals share log entries.
const (
	witnessEach   = 64
	witnessRounds = 16
)

// Witness asks appliances with a channel here, in turns, to countersign the vendor's log where it has news for them, until ctx ends.
func (s *Exchange) Witness(ctx context.Context, every time.Duration) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	var n Growth
	asked := map[fleet.ApplianceID]int64{} // size of the head that was sent: one that gives no line for it is not asked again for the same
	var last fleet.ApplianceID             // the one that was asked last
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		n.Read(s.replica.Log())
		names := s.connected()
		from, found := slices.BinarySearch(names, last)
		if found {
			from++ // the next one
		}
		var ask []fleet.ApplianceID
		for i := range min(len(names), max(witnessEach, len(names)/witnessRounds)) {
			name := names[(from+i)%len(names)]
			last = name
			if asked[name] < n.Upto {
				ask = append(ask, name)
			}
		}
		for i, size := range s.askAll(ctx, ask, n.Upto) {
			asked[ask[i]] = max(asked[ask[i]], size)
		}
	}
}

// askAll asks each, witnessEach at once, and gives the sizes of their heads.
func (s *Exchange) askAll(ctx context.Context, names []fleet.ApplianceID, upto int64) []int64 {
	sizes := make([]int64, len(names))
	var g errgroup.Group
	g.SetLimit(witnessEach)
	for i, name := range names {
		g.Go(func() error {
			var err error
			if sizes[i], err = s.Ask(ctx, name, upto); err != nil && ctx.Err() == nil {
				s.log.Warn("could not ask for a countersignature", "appliance", name, "err", err)
			}
			return nil
		})
	}
	_ = g.Wait() // each failure is logged
	return sizes
}

// Growth is the size of the vendor's log up to its last entry that is worth a question. What countersigning adds itself,
// who comes and goes, and who renews a certificate, is not: else a large fleet would never be quiet.
type Growth struct{ Seen, Upto int64 }

func (n *Growth) Read(log audit.Log) {
	for ; n.Seen < log.Size(); n.Seen++ {
		var e struct {
			Kind string `json:"kind"`
			Body struct {
				Checkpoint json.RawMessage `json:"checkpoint"`
				Cosigned   json.RawMessage `json:"cosigned"`
				Refused    json.RawMessage `json:"refused"`
			} `json:"body"`
		}
		if err := json.Unmarshal(log.Entry(n.Seen), &e); err == nil {
			switch e.Kind {
			case book.Countersign{}.Kind(), book.OrdersDone{}.Kind(), book.Edge{}.Kind(), book.HoldsBundle{}.Kind(), book.NodeBundle{}.Kind(), book.Meet{}.Kind(), book.Renew{}.Kind(), book.RenewBy{}.Kind():
				continue
			case book.Report{}.Kind():
				if e.Body.Checkpoint != nil || e.Body.Cosigned != nil || e.Body.Refused != nil {
					continue
				}
			}
		}
		n.Upto = n.Seen + 1
	}
}

// Ask asks one appliance, where the log has news since the last head that it countersigned. It gives the size of the
// head that the appliance has, or was sent.
func (s *Exchange) Ask(ctx context.Context, name fleet.ApplianceID, upto int64) (int64, error) {
	page := s.replica.View()
	a, err := page.Appliance(name)
	if err != nil {
		return 0, err
	}
	for _, o := range a.Orders {
		if o.Checkpoint != nil {
			return 0, nil // one is on its way
		}
	}
	v, err := Verifier(audit.VendorOrigin(page.TrustDomain), s.keys.LogPublicKey())
	if err != nil {
		return 0, err
	}
	var from int64
	if a.LogFrom != nil {
		from = *a.LogFrom
	} else if last, ok := a.NewestVouched(page.TrustDomain, v); ok {
		if from = last.Size; upto <= from {
			return from, nil
		}
	}
	log, cp, err := s.head()
	if err != nil {
		return 0, err
	}
	from = min(from, log.Size())
	c := &book.Checkpoint{Note: cp, From: from}
	proof, err := log.Consistency(from, log.Size())
	if err != nil {
		return 0, err
	}
	for _, h := range proof {
		c.Proof = append(c.Proof, bytes.Clone(h[:]))
	}
	if _, err = book.Submit(ctx, s.replica, s.replica.Self(), "", book.Countersign{To: name, Checkpoint: c}); err != nil {
		return 0, err
	}
	return log.Size(), nil
}

// exportChunk is how much of an export is in one message, in bytes.
const exportChunk = 256 << 10

// ExportEvidence streams the vendor's log with its countersignatures, and the customers' heads that it witnessed.
func (s *Exchange) ExportEvidence(ctx context.Context, _ *connect.Request[controlv1.ExportEvidenceRequest], stream *connect.ServerStream[controlv1.ExportEvidenceResponse]) error {
	if err := s.replica.Read(ctx); err != nil {
		return err
	}
	b, err := s.Bundle()
	if err != nil {
		return err
	}
	file, err := b.Encode()
	if err != nil {
		return err
	}
	for len(file) > 0 {
		n := min(exportChunk, len(file))
		if err := stream.Send(&controlv1.ExportEvidenceResponse{Data: file[:n]}); err != nil {
			return err
		}
		file = file[n:]
	}
	return nil
}

// Bundle gathers what the book holds now.
func (s *Exchange) Bundle() (audit.Bundle, error) {
	page := s.replica.View()
	log, cp, err := s.head()
	if err != nil {
		return audit.Bundle{}, err
	}
	key, err := s.keys.LogSigner()
	if err != nil {
		return audit.Bundle{}, err
	}
	origin := audit.VendorOrigin(page.TrustDomain)
	own, err := audit.NoteVerifier(origin, key.Public())
	if err != nil {
		return audit.Bundle{}, err
	}
	b := audit.Bundle{Version: audit.BundleVersion, Witnessed: []string{}, Documents: []string{}}
	var cosigned [][]byte
	for _, a := range page.Appliances() {
		cosigned = append(cosigned, a.Vouched(page.TrustDomain, own)...)
		for _, w := range a.Witnessed {
			b.Witnessed = append(b.Witnessed, string(w))
		}
	}
	e, err := audit.Collect(origin, key.Public(), log, [][]byte{cp}, cosigned)
	if err != nil {
		return audit.Bundle{}, err
	}
	b.Logs = []audit.LogEvidence{e}
	return b, nil
}

// WitnessedSize is the size of the newest head of the customer's log that the book has.
func (s *Exchange) WitnessedSize(page book.State, a book.Appliance) int64 {
	v, err := Verifier(audit.CustomerOrigin(page.TrustDomain, a.Name), a.LogKey)
	if n := len(a.Witnessed); err == nil && n > 0 {
		if head, err := audit.OpenCheckpoint(a.Witnessed[n-1], v); err == nil {
			return head.Size
		}
	}
	return 0
}
