// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
)

// RestartKind is the kind of the entry with which the log of a control plane goes on after its book was set back to an older one: from a
// snapshot, or by one node that went on without the others. The entries that the log had after that point are lost. Its body says how many
// entries it kept, and that number is the entry's own place.
const RestartKind = "epoch.begin/1"

// MetKind is the kind of the entry with which an appliance puts on record that the log of its control plane was restarted.
const MetKind = "vendor.epoch/1"

// restartSlack is by how much the clock of a witness may be ahead of that of the machine where a log was restarted.
const restartSlack = 5 * time.Minute

// Restart says that the log of a control plane was set back: by its own entry of RestartKind, or by the entry of MetKind in a customer's
// log.
type Restart struct {
	Of     string    // origin of the log that was set back
	Kept   int64     // entries that it kept
	Number uint64    // of the epoch that it begins
	Cause  string    // restore or recover
	At     time.Time // by the clock of who says so
	Lost   int64     // entries after those that a pinned witness countersigned before, and that are lost; at least
}

// controlPlane ends the origin of a control plane's log.
const controlPlane = "/control-plane"

// restartsOf finds what a log says of restarts.
func restartsOf(e LogEvidence) (out []Restart) {
	domain, rest, _ := strings.Cut(e.Origin, "/")
	for i, leaf := range e.Entries {
		if !strings.Contains(leaf, RestartKind) && !strings.Contains(leaf, MetKind) {
			continue
		}
		x, err := ParseEntry([]byte(leaf))
		if err != nil || x.Fault != "" {
			continue
		}
		type epoch struct {
			Number uint64    `json:"number"`
			Cause  string    `json:"cause"`
			Begun  time.Time `json:"begun"`
			Size   int64     `json:"size"`
		}
		var body struct {
			Epoch epoch  `json:"epoch"`
			Cause string `json:"cause"`
			Kept  int64  `json:"log_kept"`
			Lost  struct {
				Log struct{ From, To int64 } `json:"log"`
			} `json:"lost"`
		}
		switch {
		case json.Unmarshal(x.Body, &body) != nil:
		case x.Kind == RestartKind && "/"+rest == controlPlane && body.Epoch.Size == int64(i):
			out = append(out, Restart{Of: e.Origin, Kept: body.Epoch.Size, Number: body.Epoch.Number, Cause: body.Epoch.Cause, At: body.Epoch.Begun})
		case x.Kind == MetKind && strings.HasPrefix(rest, "appliance/"):
			out = append(out, Restart{Of: domain + controlPlane, Kept: body.Kept, Number: body.Epoch.Number, Cause: body.Cause, At: x.At,
				Lost: max(0, body.Lost.Log.To-body.Kept)})
		}
	}
	return out
}

// excuses reports whether a head that is not one of the log's was one before a restart, and counts what is lost. A witness saw it before,
// by the witness's clock: what the log's key signed afterwards is a fork.
func excuses(all []Restart, h Head, seen time.Time) bool {
	for i := range all {
		r := &all[i]
		if r.Of == h.Origin && h.Size > r.Kept && !seen.IsZero() && !seen.After(r.At.Add(restartSlack)) {
			r.Lost = max(r.Lost, h.Size-r.Kept)
			return true
		}
	}
	return false
}

// seenAt is when a pinned witness countersigned a checkpoint, zero for never.
func seenAt(text string, v note.Verifier, pinned Pins) (at time.Time) {
	for _, name := range slices.Sorted(maps.Keys(pinned.Witnesses)) {
		w, err := CosignVerifier(name, pinned.Witnesses[name])
		if err != nil {
			continue
		}
		if _, t, err := OpenCosigned([]byte(text), v, w); err == nil && (at.IsZero() || t.Before(at)) {
			at = t
		}
	}
	return at
}

// restarted reports whether a head that one side kept of the other is of what was lost by a restart. Where the log is there, that is what
// the log says itself; where it is not, what a customer's log says, and then only one of two heads of one size is excused.
func restarted(h Head, text string, logs map[string]Log, reports []LogReport, seen map[int64]Head, pinned Pins) bool {
	v, err := logVerifier("audit.Verify", h.Origin, pinned)
	if err != nil {
		return false
	}
	l, paired := logs[h.Origin]
	if paired && l.belongs(h) {
		return false
	}
	if old, ok := seen[h.Size]; !paired && (!ok || old.Root == h.Root) {
		return false
	}
	for i := range reports {
		if paired && reports[i].Origin != h.Origin {
			continue
		}
		if excuses(reports[i].Restarts, h, seenAt(text, v, pinned)) {
			return true
		}
	}
	return false
}

// belongs reports whether a head is one of a log's.
func (l Log) belongs(h Head) bool {
	if h.Size > l.Size() {
		return false
	}
	root, err := l.RootAt(h.Size)
	return err == nil && root == h.Root
}
