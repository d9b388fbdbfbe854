// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"time"

	"connectrpc.com/connect"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
)

// Timing of evidence: how often the vendor is asked to countersign this log where it has news.
const (
	witnessEvery  = 10 * time.Second
	witnessAtMost = time.Hour // between two questions that are not answered
)

// head signs the present head of the customer's log.
func (a *Appliance) head() (audit.Log, []byte, error) {
	st, log := a.book.Both()
	origin := audit.CustomerOrigin(st.Site.TrustDomain, st.Appliance)
	signer, err := audit.NoteSigner(origin, a.signer)
	if err != nil {
		return log, nil, err
	}
	cp, err := audit.Checkpoint(origin, log.Size(), log.Root(), signer)
	return log, cp, err
}

// witness sends the vendor a checkpoint of this log where it grew, so that it can't be rewritten afterwards.
func (a *Appliance) witness(ctx context.Context, ready func()) error {
	ready()
	tick := time.NewTicker(witnessEvery)
	defer tick.Stop()
	var p backoff
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-a.linked:
		}
		if err := a.askWitness(ctx, &p); a.book.Reportable(ctx, err) {
			a.log.Warn("could not ask for a countersignature", "err", err)
		}
	}
}

// backoff waits longer from question to question for as long as the vendor's countersignatures don't come: each question
// costs entries of both logs.
type backoff struct {
	answered int64 // size of the newest head that the vendor countersigned
	wait     time.Duration
	next     time.Time
}

// due reports whether it is time for the next question, and counts it as asked.
func (p *backoff) due(now time.Time, answered int64) bool {
	if answered != p.answered || p.wait == 0 {
		p.answered, p.wait, p.next = answered, witnessEvery, time.Time{}
	}
	if now.Before(p.next) {
		return false
	}
	p.next, p.wait = now.Add(p.wait), min(2*p.wait, witnessAtMost)
	return true
}

func (a *Appliance) askWitness(ctx context.Context, p *backoff) error {
	st := a.book.View()
	for _, r := range st.Reports {
		if r.Checkpoint != nil {
			return nil // one is on its way
		}
	}
	log, cp, err := a.head()
	if err != nil {
		return err
	}
	c := book.Checkpoint{Note: cp}
	if st.VendorHolds != nil {
		if err := prove(&c, log, min(*st.VendorHolds, log.Size())); err != nil {
			return err
		}
	}
	for last := range st.VerifiedCosigned(a.signer.Public()) {
		if st.VendorHolds != nil {
			break
		}
		if !news(log, last.Size) {
			return nil
		}
		if err := prove(&c, log, last.Size); err != nil {
			return err
		}
		break
	}
	if !p.due(time.Now(), c.From) {
		return nil
	}
	_, err = book.Attempt(ctx, a.book, book.Checkpointed{Checkpoint: c})
	return err
}

// prove proves that the log only grew since it had that size.
func prove(c *book.Checkpoint, log audit.Log, size int64) error {
	proof, err := log.Consistency(size, log.Size())
	if err != nil {
		return err
	}
	c.From = size
	for _, h := range proof {
		c.Proof = append(c.Proof, bytes.Clone(h[:]))
	}
	return nil
}

// news reports whether the log has an entry from this one on that is worth a question. What countersigning adds itself is not:
// else two logs would never be at rest.
func news(log audit.Log, from int64) bool {
	for i := from; i < log.Size(); i++ {
		var e struct {
			Kind string `json:"kind"`
			Body struct {
				Witnessed json.RawMessage `json:"witnessed"`
				Cosigned  json.RawMessage `json:"cosigned"`
				Refused   string          `json:"refused"`
			} `json:"body"`
		}
		if err := json.Unmarshal(log.Entry(i), &e); err != nil {
			return true
		}
		switch {
		case e.Kind == book.Checkpointed{}.Kind(), e.Kind == book.ReportsDone{}.Kind():
		case e.Kind == book.Take{}.Kind() && (e.Body.Witnessed != nil || e.Body.Cosigned != nil || e.Body.Refused != ""):
		default:
			return true
		}
	}
	return false
}

// ExportEvidence streams the customer's log with its countersignatures, the vendor's heads that this appliance witnessed,
// and every document that the log names.
func (l local) ExportEvidence(ctx context.Context, _ *connect.Request[localv1.ExportEvidenceRequest],
	stream *connect.ServerStream[localv1.ExportEvidenceResponse]) error {
	st := l.book.View()
	log, cp, err := l.head()
	if err != nil {
		return err
	}
	var cosigned [][]byte
	for h := range st.VerifiedCosigned(l.signer.Public()) {
		cosigned = append(cosigned, h.Note)
	}
	slices.Reverse(cosigned)
	e, err := audit.Collect(audit.CustomerOrigin(st.Site.TrustDomain, st.Appliance), l.signer.Public(), log, [][]byte{cp}, cosigned)
	if err != nil {
		return err
	}
	b := audit.Bundle{Version: audit.BundleVersion, Logs: []audit.LogEvidence{e}, Witnessed: []string{}, Documents: []string{}}
	for _, w := range slices.Concat(st.Forgotten, st.Witnessed) {
		b.Witnessed = append(b.Witnessed, string(w))
	}
	record, err := book.ReadRecord(log)
	if err != nil {
		return err
	}
	b.Documents = record.Documents()
	file, err := b.Encode()
	if err != nil {
		return err
	}
	const chunk = 256 << 10
	for len(file) > 0 {
		n := min(chunk, len(file))
		if err := stream.Send(&localv1.ExportEvidenceResponse{Data: file[:n]}); err != nil {
			return err
		}
		file = file[n:]
	}
	return nil
}
