// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"bytes"
	"context"
	"time"

	"connectrpc.com/connect"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/audit"
)

// Timing of evidence: how often the vendor is asked to countersign this log, and how many entries one round of asking
// adds by itself, so that a log at rest stays at rest.
const (
	witnessEvery = 10 * time.Second
	quiet        = 8
)

// head signs the present head of the customer's log.
func (a *Appliance) head() (audit.Log, []byte, error) {
	page, log := a.book.Both()
	origin := audit.CustomerOrigin(page.Site.TrustDomain, page.Appliance)
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
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-a.linked:
		}
		if err := a.askWitness(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("could not ask for a countersignature", "err", err)
		}
	}
}

func (a *Appliance) askWitness(ctx context.Context) error {
	page := a.book.View()
	for _, r := range page.Reports {
		if r.Checkpoint != nil {
			return nil // one is on its way
		}
	}
	log, cp, err := a.head()
	if err != nil {
		return err
	}
	c := Checkpoint{Note: cp}
	if n := len(page.Cosigned); n > 0 {
		v, err := audit.NoteVerifier(audit.CustomerOrigin(page.Site.TrustDomain, page.Appliance), a.signer.Public())
		if err != nil {
			return err
		}
		last, err := audit.OpenCheckpoint(page.Cosigned[n-1], v)
		if err != nil {
			return err
		}
		if log.Size() < last.Size+quiet {
			return nil
		}
		c.From = last.Size
		proof, err := log.Consistency(last.Size, log.Size())
		if err != nil {
			return err
		}
		for _, h := range proof {
			c.Proof = append(c.Proof, bytes.Clone(h[:]))
		}
	}
	_, err = submit(ctx, a, Checkpointed{Checkpoint: c})
	return err
}

// ExportEvidence streams the customer's log with its countersignatures, the vendor's heads that this appliance witnessed,
// and the documents of every operation.
func (l local) ExportEvidence(ctx context.Context, _ *connect.Request[localv1.ExportEvidenceRequest], stream *connect.ServerStream[localv1.ExportEvidenceResponse]) error {
	page := l.book.View()
	log, cp, err := l.head()
	if err != nil {
		return err
	}
	e, err := audit.Collect(audit.CustomerOrigin(page.Site.TrustDomain, page.Appliance), l.signer.Public(), log, [][]byte{cp}, page.Cosigned)
	if err != nil {
		return err
	}
	b := audit.Bundle{Version: audit.BundleVersion, Logs: []audit.LogEvidence{e}, Witnessed: []string{}, Documents: []string{}}
	for _, w := range page.Witnessed {
		b.Witnessed = append(b.Witnessed, string(w))
	}
	for _, o := range page.Operations() {
		b.Documents = append(b.Documents, string(o.Request))
		for _, s := range o.statements() {
			b.Documents = append(b.Documents, string(s))
		}
	}
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
