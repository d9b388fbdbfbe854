// SPDX-License-Identifier: Apache-2.0

package fleettest

import (
	"encoding/json"
	"slices"
	"time"

	"connectrpc.com/connect"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
)

// Saved is the vendor's book at one moment, as a snapshot has it.
type Saved [][]byte

// Save saves the vendor's book.
func (f *Fleet) Save() Saved {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.record)
}

// Wake crashes the node and starts it with what was saved, as if nothing had been done since: a node that nobody told.
func (f *Fleet) Wake(s Saved) {
	f.t.Helper()
	f.CrashNode()
	f.mu.Lock()
	f.record = slices.Clone(s)
	f.mu.Unlock()
	f.StartNode()
}

// Restore crashes the node, forgets what was done since the book was saved, and begins another epoch with it, as demarc control-plane
// snapshot restore does. It gives what was forgotten.
func (f *Fleet) Restore(s Saved) (forgotten Saved) {
	f.t.Helper()
	forgotten = f.Save()
	f.CrashNode()
	stored := book.NewBook()
	for i, data := range s {
		_, err := stored.Apply(uint64(i+1), data)
		f.must(err)
	}
	c, err := controlplane.DrawEpoch(stored, book.ByRestore, time.Now(), 0)
	f.must(err)
	data, err := ledger.Encode(ledger.Meta{At: time.Unix(1, 0).UTC(), By: fleet.PrincipalOf(Domain, fleet.Node, nodeName),
		Request: fleet.RequestID("epoch-" + c.Epoch.ID)}, c)
	f.must(err)
	f.mu.Lock()
	f.record = append(slices.Clone(s), data)
	f.mu.Unlock()
	f.StartNode()
	return forgotten
}

// entry is one entry of a log.
type entry struct {
	Kind  string
	Fault string
	Body  json.RawMessage
}

func entriesOf(leaves [][]byte) (out []entry) {
	for _, leaf := range leaves {
		if e, err := audit.ParseEntry(leaf); err == nil {
			out = append(out, entry{e.Kind, string(e.Fault), e.Body})
		}
	}
	return out
}

// Entries lists the bodies of the entries of a kind in the vendor's log that were not refused.
func (f *Fleet) Entries(kind string) (out []json.RawMessage) {
	f.t.Helper()
	f.mu.Lock()
	log := f.book.Log()
	f.mu.Unlock()
	leaves, err := log.Entries(0, log.Size())
	f.must(err)
	for _, e := range entriesOf(leaves) {
		if e.Kind == kind && e.Fault == "" {
			out = append(out, e.Body)
		}
	}
	return out
}

// Entries is the same of the customer's log.
func (a *Appliance) Entries(kind string) (out []json.RawMessage) {
	a.f.t.Helper()
	for from := int64(0); ; {
		res, err := a.app.Local().ListLog(a.f.t.Context(), connect.NewRequest(&localv1.ListLogRequest{From: from}))
		a.f.must(err)
		if len(res.Msg.GetEntries()) == 0 {
			return out
		}
		from += int64(len(res.Msg.GetEntries()))
		for _, e := range entriesOf(res.Msg.GetEntries()) {
			if e.Kind == kind && e.Fault == "" {
				out = append(out, e.Body)
			}
		}
	}
}

// Status is what the customer is told.
func (a *Appliance) Status() *localv1.StatusResponse {
	a.f.t.Helper()
	res, err := a.app.Local().Status(a.f.t.Context(), connect.NewRequest(&localv1.StatusRequest{}))
	a.f.must(err)
	return res.Msg
}
