// SPDX-License-Identifier: Apache-2.0

package audit

import (
	"crypto"
	"encoding/base64"
	"maps"
	"slices"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// Breach says how a bundle fails. It is the cause of the fault that Verify returns: errors.Is(err, audit.Forked).
type Breach string

// The closed set of breaches.
const (
	Edited      Breach = "edited"      // an entry is not the one that was signed
	Omitted     Breach = "omitted"     // entries that a checkpoint covers are not there
	Forked      Breach = "forked"      // two signed histories that are not one
	Unsigned    Breach = "unsigned"    // not signed by the pinned key
	Uncovered   Breach = "uncovered"   // entries that no checkpoint covers
	Unwitnessed Breach = "unwitnessed" // no pinned witness ever signed
)

// Error makes a Breach usable as the target of errors.Is.
func (b Breach) Error() string { return string(b) }

// Pins are the public keys that an auditor brings along. All trust comes from here.
type Pins struct {
	Logs        map[string]crypto.PublicKey // by origin, Ed25519
	Witnesses   map[string]crypto.PublicKey // by the witness's name, Ed25519
	Documents   []seal.Key                  // who may have signed documents
	NeedWitness bool                        // refuse a log that no pinned witness signed
}

// Report is what a whole bundle shows.
type Report struct {
	Logs      []LogReport
	Unpaired  []Head // witnessed checkpoints of logs that are not in the bundle: signed, and not compared with entries
	Documents []DocumentReport
}

// LogReport is about one log: entries 0 to Size-1 are complete and as they were signed.
type LogReport struct {
	Head
	Checkpoints int
	Witnessed   int64     // the entries below this were seen by a pinned witness, and so can't be rewritten by the log's owner
	WitnessedAt time.Time // by the witness's clock
	First, Last time.Time // of the entries, by the clock of the log's owner
}

// DocumentReport is about one sealed document.
type DocumentReport struct {
	Digest fleet.Digest
	Type   string
	By     []seal.KeyID
}

// Verify checks a bundle offline. Each log must be whole and as signed, each checkpoint of it (its own, cosigned, or
// kept by the other side) must be a beginning of it, and each document must be signed by a pinned key. The first
// failure is returned: a fault with the sentence for the auditor, and a Breach as its cause.
func Verify(bundle []byte, pinned Pins) (Report, error) {
	const op = "audit.Verify"
	b, err := ParseBundle(bundle)
	if err != nil {
		return Report{}, err
	}
	if len(b.Logs) == 0 {
		return Report{}, fault.New(op, fault.Invalid, "the bundle holds no log: there is nothing to verify")
	}
	var r Report
	rebuilt := map[string]Log{}
	for _, e := range b.Logs {
		lr, l, err := verifyLog(op, e, pinned)
		if err != nil {
			return Report{}, err
		}
		rebuilt[e.Origin] = l
		r.Logs = append(r.Logs, lr)
	}
	if r.Unpaired, err = verifyWitnessed(op, b.Witnessed, rebuilt, pinned); err != nil {
		return Report{}, err
	}
	for i, d := range b.Documents {
		typ, by, err := seal.Verify([]byte(d), pinned.Documents)
		if err != nil {
			return Report{}, fault.Because(err, op, fault.Of(err), "document %d: %s", i, fault.Text(err))
		}
		dr := DocumentReport{Digest: fleet.DigestOf([]byte(d)), Type: typ}
		for _, k := range by {
			dr.By = append(dr.By, k.ID)
		}
		r.Documents = append(r.Documents, dr)
	}
	return r, nil
}

func logVerifier(op, origin string, pinned Pins) (note.Verifier, error) {
	key, ok := pinned.Logs[origin]
	if !ok {
		return nil, fault.Because(Unsigned, op, fault.Denied, "no key is pinned for the log %q: bring its public key along", fault.Clip(origin))
	}
	return NoteVerifier(origin, key)
}

// openOf opens a checkpoint of the log with the given origin.
func openOf(op, what string, i int, text string, v note.Verifier) (Head, error) {
	h, err := OpenCheckpoint([]byte(text), v)
	if err != nil {
		return Head{}, fault.Because(err, op, fault.Of(err), "log %q, %s %d: %s", fault.Clip(v.Name()), what, i, fault.Text(err))
	}
	if h.Origin != v.Name() {
		return Head{}, fault.Because(Unsigned, op, fault.Denied, "log %q, %s %d is of another log, %q", fault.Clip(v.Name()), what, i, fault.Clip(h.Origin))
	}
	return h, nil
}

func verifyLog(op string, e LogEvidence, pinned Pins) (LogReport, Log, error) {
	var none LogReport
	v, err := logVerifier(op, e.Origin, pinned)
	if err != nil {
		return none, Log{}, err
	}
	if k, err := edKey(op, pinned.Logs[e.Origin]); err != nil {
		return none, Log{}, err
	} else if e.Key != "" && e.Key != base64.StdEncoding.EncodeToString(k) {
		return none, Log{}, fault.Because(Unsigned, op, fault.Denied, "log %q: the bundle was made with another key than the pinned one", fault.Clip(e.Origin))
	}
	if len(e.Checkpoints) == 0 {
		return none, Log{}, fault.Because(Uncovered, op, fault.Denied, "log %q: no checkpoint covers its %d entries", fault.Clip(e.Origin), len(e.Entries))
	}
	var heads []Head
	for i, c := range e.Checkpoints {
		h, err := openOf(op, "checkpoint", i, c, v)
		if err != nil {
			return none, Log{}, err
		}
		heads = append(heads, h)
	}
	r := LogReport{Checkpoints: len(heads)}
	for i, c := range e.Cosignatures {
		h, at, known, err := openCosigned(op, i, c, v, pinned)
		if err != nil {
			return none, Log{}, err
		}
		heads = append(heads, h)
		if known && h.Size >= r.Witnessed {
			r.Witnessed, r.WitnessedAt = h.Size, at
		}
	}
	slices.SortStableFunc(heads, func(a, b Head) int { return int(min(max(a.Size-b.Size, -1), 1)) })
	for i := 1; i < len(heads); i++ {
		if a, b := heads[i-1], heads[i]; a.Size == b.Size && a.Root != b.Root {
			return none, Log{}, fault.Because(Forked, op, fault.Conflict, "log %q is forked: its key signed two histories of %d entries", fault.Clip(e.Origin), a.Size)
		}
	}
	l, err := rebuild(op, e, heads)
	if err != nil {
		return none, Log{}, err
	}
	r.Head = heads[len(heads)-1]
	if err := readable(op, e, &r); err != nil {
		return none, Log{}, err
	}
	if pinned.NeedWitness && r.WitnessedAt.IsZero() {
		return none, Log{}, fault.Because(Unwitnessed, op, fault.Denied, "log %q: no pinned witness signed a checkpoint of it", fault.Clip(e.Origin))
	}
	return r, l, nil
}

// readable reads each entry, all of which are known to be as signed.
func readable(op string, e LogEvidence, r *LogReport) error {
	for i, leaf := range e.Entries {
		x, err := ParseEntry([]byte(leaf))
		if err != nil {
			return fault.Because(err, op, fault.Invalid, "log %q, entry %d was signed and can't be read: %s", fault.Clip(e.Origin), i, fault.Text(err))
		}
		if i == 0 {
			r.First = x.At
		}
		r.Last = x.At
	}
	return nil
}

// openCosigned opens a cosigned checkpoint. known is false where no pinned witness is among the signers.
func openCosigned(op string, i int, text string, v note.Verifier, pinned Pins) (h Head, at time.Time, known bool, err error) {
	if h, err = openOf(op, "cosignature", i, text, v); err != nil {
		return Head{}, time.Time{}, false, err
	}
	for _, name := range slices.Sorted(maps.Keys(pinned.Witnesses)) {
		w, err := CosignVerifier(name, pinned.Witnesses[name])
		if err != nil {
			return Head{}, time.Time{}, false, err
		}
		if _, t, err := OpenCosigned([]byte(text), v, w); err == nil {
			if !known || t.Before(at) {
				at = t
			}
			known = true
		}
	}
	return h, at, known, nil
}

// rebuild hashes the entries and compares them with each head, the smallest first.
func rebuild(op string, e LogEvidence, heads []Head) (Log, error) {
	origin, newest := fault.Clip(e.Origin), heads[len(heads)-1]
	var l Log
	for _, leaf := range e.Entries {
		l = l.AppendLeaf([]byte(leaf))
	}
	if i, missing, ok := suspect(e, heads); ok {
		if missing {
			return Log{}, fault.Because(Omitted, op, fault.Conflict, "log %q: entry %d was left out", origin, i)
		}
		return Log{}, fault.Because(Edited, op, fault.Conflict, "log %q: entry %d is not the one that was signed", origin, i)
	}
	// Entries that hash to the newest head are as signed: an older head that differs is a second history.
	signed := l.Size() == newest.Size && l.Root() == newest.Root
	good := int64(0)
	for _, h := range heads {
		if h.Size > l.Size() {
			break
		}
		if root, err := l.RootAt(h.Size); err != nil || root != h.Root {
			if signed {
				return Log{}, fault.Because(Forked, op, fault.Conflict, "log %q is forked: its key signed another history of the first %d entries, apart from this one among entries %d to %d",
					origin, h.Size, good, h.Size-1)
			}
			if l.Size() < newest.Size {
				return Log{}, fault.Because(Omitted, op, fault.Conflict, "log %q: %d of its %d entries were left out, the first of them among entries %d to %d",
					origin, newest.Size-l.Size(), newest.Size, good, h.Size-1)
			}
			return Log{}, fault.Because(Edited, op, fault.Conflict, "log %q: one of the entries %d to %d is not the one that was signed", origin, good, h.Size-1)
		}
		good = h.Size
	}
	switch {
	case l.Size() < newest.Size:
		return Log{}, fault.Because(Omitted, op, fault.Conflict, "log %q: its key signed %d entries, and entry %d and what follows is not in the bundle", origin, newest.Size, l.Size())
	case l.Size() > newest.Size:
		return Log{}, fault.Because(Uncovered, op, fault.Denied, "log %q: entry %d and what follows is covered by no checkpoint", origin, newest.Size)
	}
	return l, nil
}

// suspect names the first entry that differs, where the leaf hashes in the bundle are themselves as signed.
func suspect(e LogEvidence, heads []Head) (index int, missing, ok bool) {
	newest := heads[len(heads)-1]
	if int64(len(e.Hashes)) != newest.Size || newest.Size == 0 {
		return 0, false, false
	}
	hs := make([]tlog.Hash, len(e.Hashes))
	for i, s := range e.Hashes {
		raw, err := base64.StdEncoding.Strict().DecodeString(s)
		if err != nil || len(raw) != tlog.HashSize {
			return 0, false, false
		}
		copy(hs[i][:], raw)
	}
	if rootOf(hs) != newest.Root {
		return 0, false, false
	}
	for i, h := range hs {
		if i >= len(e.Entries) {
			return i, true, true
		}
		if tlog.RecordHash([]byte(e.Entries[i])) == h {
			continue
		}
		// The signed entry that follows stands here: this one was taken out.
		gone := len(e.Entries) < len(hs) && i+1 < len(hs) && tlog.RecordHash([]byte(e.Entries[i])) == hs[i+1]
		return i, gone, true
	}
	return 0, false, false
}

// rootOf computes a root from leaf hashes alone. There is at least one.
func rootOf(hs []tlog.Hash) tlog.Hash {
	if len(hs) == 1 {
		return hs[0]
	}
	k := 1
	for k*2 < len(hs) {
		k *= 2
	}
	return tlog.NodeHash(rootOf(hs[:k]), rootOf(hs[k:]))
}

// verifyWitnessed compares the checkpoints that one side kept of the other with each other and with the entries.
func verifyWitnessed(op string, notes []string, logs map[string]Log, pinned Pins) ([]Head, error) {
	var unpaired []Head
	seen := map[string]map[int64]Head{}
	for i, text := range notes {
		h, err := openWitnessed(op, i, text, pinned)
		if err != nil {
			return nil, err
		}
		if old, ok := seen[h.Origin][h.Size]; ok && old.Root != h.Root {
			return nil, fault.Because(Forked, op, fault.Conflict, "log %q is forked: witnessed checkpoint %d is a second history of %d entries", fault.Clip(h.Origin), i, h.Size)
		}
		if seen[h.Origin] == nil {
			seen[h.Origin] = map[int64]Head{}
		}
		seen[h.Origin][h.Size] = h
		l, ok := logs[h.Origin]
		if !ok {
			unpaired = append(unpaired, h)
			continue
		}
		if h.Size > l.Size() {
			return nil, fault.Because(Omitted, op, fault.Conflict, "log %q: witnessed checkpoint %d has %d entries, and entry %d and what follows is not in the bundle", fault.Clip(h.Origin), i, h.Size, l.Size())
		}
		if root, err := l.RootAt(h.Size); err != nil || root != h.Root {
			return nil, fault.Because(Forked, op, fault.Conflict, "log %q is forked: witnessed checkpoint %d, of %d entries, is not a beginning of the log in the bundle", fault.Clip(h.Origin), i, h.Size)
		}
	}
	return unpaired, nil
}

// openWitnessed finds the pinned log that signed the note. The origin that the note states only chooses the key.
func openWitnessed(op string, i int, text string, pinned Pins) (Head, error) {
	origin := ""
	for n := range min(len(text), maxOrigin+1) {
		if text[n] == '\n' {
			origin = text[:n]
			break
		}
	}
	v, err := logVerifier(op, origin, pinned)
	if err != nil {
		return Head{}, fault.Because(err, op, fault.Of(err), "witnessed checkpoint %d: %s", i, fault.Text(err))
	}
	return openOf(op, "witnessed checkpoint", i, text, v)
}
