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
	Unwitnessed Breach = "unwitnessed" // no pinned witness signed, or not enough of it
	Unknown     Breach = "unknown"     // a document that no log names, or one that is there twice
	Unchained   Breach = "unchained"   // documents that are not one chain, or a link that another party signed
)

// Error makes a Breach usable as the target of errors.Is.
func (b Breach) Error() string { return string(b) }

// Pins are the public keys that an auditor brings along. All trust comes from here.
type Pins struct {
	Logs        map[string]crypto.PublicKey // by origin, Ed25519
	Witnesses   map[string]crypto.PublicKey // by the witness's name, Ed25519
	NeedWitness bool                        // refuse a log that no pinned witness signed
	// WitnessLag refuses a log of which no pinned witness saw the entries that are older than this when the newest one was made,
	// by the clock of the log's owner. Zero asks for nothing.
	WitnessLag time.Duration
}

// Report is what a whole bundle shows.
type Report struct {
	Logs      []LogReport
	Unpaired  []Head   // witnessed checkpoints of logs that are not in the bundle: signed, and not compared with entries
	Unchecked int      // witnessed checkpoints of logs without a pinned key: not even their signatures were looked at
	Missing   []string // pinned logs that are not in the bundle
}

// LogReport is about one log: entries 0 to Size-1 are complete and as they were signed.
type LogReport struct {
	Head
	Checkpoints int
	Witnessed   int64         // the entries below this were seen by a pinned witness, and so can't be rewritten by the log's owner
	WitnessedAt time.Time     // by the witness's clock
	First, Last time.Time     // of the entries, by the clock of the log's owner
	Lag         time.Duration // from the first entry that no pinned witness saw to the last one; zero if all were seen
	Restarts    []Restart     // that the log says happened, to itself or to the vendor's log
	Worthless   []string      // cosignatures that are not over a checkpoint of this log: why. They were passed over
}

// Verify checks the logs of a bundle offline. Each must be whole and as signed, and each checkpoint of it (its own, cosigned, or
// kept by the other side) must be a beginning of it. What others sent for it and is no cosignature is passed over and told: it
// is not the log's. A log is never its own witness, under whatever name. Documents are not looked at. The first failure is
// returned: a fault with the sentence for the auditor, and a Breach as its cause.
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
	if r.Unpaired, r.Unchecked, err = verifyWitnessed(op, b.Witnessed, rebuilt, r.Logs, pinned); err != nil {
		return Report{}, err
	}
	for _, origin := range slices.Sorted(maps.Keys(pinned.Logs)) {
		if _, ok := rebuilt[origin]; !ok {
			r.Missing = append(r.Missing, origin)
		}
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
		return Head{}, fault.Because(Unsigned, op, fault.Denied, "log %q, %s %d is of another log, %q", fault.Clip(v.Name()), what, i,
			fault.Clip(h.Origin))
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
		return none, Log{}, fault.Because(Unsigned, op, fault.Denied, "log %q: the bundle was made with another key than the pinned one",
			fault.Clip(e.Origin))
	}
	if len(e.Entries) == 0 {
		return none, Log{}, fault.Because(Omitted, op, fault.Denied, "log %q is empty: it would show nothing, and each log begins with an entry",
			fault.Clip(e.Origin))
	}
	if len(e.Checkpoints) == 0 {
		return none, Log{}, fault.Because(Uncovered, op, fault.Denied, "log %q: no checkpoint covers its %d entries", fault.Clip(e.Origin),
			len(e.Entries))
	}
	restarts := restartsOf(e)
	var whole Log // of use where there are restarts only
	if len(restarts) > 0 {
		for _, leaf := range e.Entries {
			whole = whole.AppendLeaf([]byte(leaf))
		}
	}
	var heads []Head
	for i, c := range e.Checkpoints {
		h, err := openOf(op, "checkpoint", i, c, v)
		if err != nil {
			return none, Log{}, err
		}
		heads = append(heads, h)
	}
	r := LogReport{Checkpoints: len(heads), Restarts: restarts}
	for i, c := range e.Cosignatures {
		h, at, known, err := openCosigned(op, i, c, v, pinned)
		if err != nil { // whoever sent it is no witness, and must not spoil the log of another
			r.Worthless = append(r.Worthless, fault.Text(err))
			continue
		}
		if len(restarts) > 0 && !whole.belongs(h) && excuses(restarts, h, at) {
			continue // of what was lost
		}
		heads = append(heads, h)
		if known && h.Size >= r.Witnessed {
			r.Witnessed, r.WitnessedAt = h.Size, at
		}
	}
	slices.SortStableFunc(heads, func(a, b Head) int { return int(min(max(a.Size-b.Size, -1), 1)) })
	for i := 1; i < len(heads); i++ {
		if a, b := heads[i-1], heads[i]; a.Size == b.Size && a.Root != b.Root {
			return none, Log{}, fault.Because(Forked, op, fault.Conflict, "log %q is forked: its key signed two histories of %d entries",
				fault.Clip(e.Origin), a.Size)
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
	if (pinned.NeedWitness || pinned.WitnessLag > 0) && r.WitnessedAt.IsZero() {
		return none, Log{}, fault.Because(Unwitnessed, op, fault.Denied, "log %q: no pinned witness signed a checkpoint of it",
			fault.Clip(e.Origin))
	}
	if pinned.WitnessLag > 0 && r.Lag > pinned.WitnessLag {
		return none, Log{}, fault.Because(Unwitnessed, op, fault.Denied,
			"log %q: entry %d and what follows, made within %s, was seen by no pinned witness: %s is allowed",
			fault.Clip(e.Origin), r.Witnessed, r.Lag, pinned.WitnessLag)
	}
	return r, l, nil
}

// readable reads each entry, all of which are known to be as signed.
func readable(op string, e LogEvidence, r *LogReport) error {
	var unseen time.Time
	for i, leaf := range e.Entries {
		x, err := ParseEntry([]byte(leaf))
		if err != nil {
			return fault.Because(err, op, fault.Invalid, "log %q, entry %d was signed and can't be read: %s", fault.Clip(e.Origin), i,
				fault.Text(err))
		}
		if i == 0 {
			r.First = x.At
		}
		if r.Last = x.At; int64(i) == r.Witnessed {
			unseen = x.At
		}
	}
	if !unseen.IsZero() {
		r.Lag = max(r.Last.Sub(unseen), 1)
	}
	return nil
}

// openCosigned opens a cosigned checkpoint. known is false where no pinned witness is among the signers.
func openCosigned(op string, i int, text string, v note.Verifier, pinned Pins) (h Head, at time.Time, known bool, err error) {
	if h, err = openOf(op, "cosignature", i, text, v); err != nil {
		return Head{}, time.Time{}, false, err
	}
	own, err := edKey(op, pinned.Logs[v.Name()])
	if err != nil {
		return Head{}, time.Time{}, false, err
	}
	for _, name := range slices.Sorted(maps.Keys(pinned.Witnesses)) {
		if own.Equal(pinned.Witnesses[name]) {
			continue // whoever writes a log says nothing new by signing it twice
		}
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
				return Log{}, fault.Because(Forked, op, fault.Conflict, "log %q is forked: its key signed another history of the first %d entries, "+
					"apart from this one among entries %d to %d",
					origin, h.Size, good, h.Size-1)
			}
			if l.Size() < newest.Size {
				return Log{}, fault.Because(Omitted, op, fault.Conflict,
					"log %q: %d of its %d entries were left out, the first of them among entries %d to %d",
					origin, newest.Size-l.Size(), newest.Size, good, h.Size-1)
			}
			return Log{}, fault.Because(Edited, op, fault.Conflict, "log %q: one of the entries %d to %d is not the one that was signed", origin,
				good, h.Size-1)
		}
		good = h.Size
	}
	switch {
	case l.Size() < newest.Size:
		return Log{}, fault.Because(Omitted, op, fault.Conflict, "log %q: its key signed %d entries, and entry %d and what follows is not in "+
			"the bundle", origin, newest.Size, l.Size())
	case l.Size() > newest.Size:
		return Log{}, fault.Because(Uncovered, op, fault.Denied, "log %q: entry %d and what follows is covered by no checkpoint", origin,
			newest.Size)
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
func verifyWitnessed(op string, notes []string, logs map[string]Log, reports []LogReport,
	pinned Pins) (unpaired []Head, unchecked int, err error) {
	seen := map[string]map[int64]Head{}
	for i, text := range notes {
		if _, ok := pinned.Logs[originOf(text)]; !ok {
			unchecked++
			continue
		}
		h, err := openWitnessed(op, i, text, pinned)
		if err != nil {
			return nil, 0, err
		}
		if restarted(h, text, logs, reports, seen[h.Origin], pinned) {
			continue
		}
		if old, ok := seen[h.Origin][h.Size]; ok && old.Root != h.Root {
			return nil, 0, fault.Because(Forked, op, fault.Conflict, "log %q is forked: witnessed checkpoint %d is a second history of %d entries",
				fault.Clip(h.Origin), i, h.Size)
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
			return nil, 0, fault.Because(Omitted, op, fault.Conflict,
				"log %q: witnessed checkpoint %d has %d entries, and entry %d and what follows is not in the bundle", fault.Clip(h.Origin), i, h.Size,
				l.Size())
		}
		if root, err := l.RootAt(h.Size); err != nil || root != h.Root {
			return nil, 0, fault.Because(Forked, op, fault.Conflict, "log %q is forked: witnessed checkpoint %d, of %d entries, is not a "+
				"beginning of the log in the bundle", fault.Clip(h.Origin), i, h.Size)
		}
	}
	return unpaired, unchecked, nil
}

// originOf is the first line of a note, unverified: it chooses the key.
func originOf(text string) string {
	for n := range min(len(text), maxOrigin+1) {
		if text[n] == '\n' {
			return text[:n]
		}
	}
	return ""
}

// openWitnessed finds the pinned log that signed the note. The origin that the note states only chooses the key.
func openWitnessed(op string, i int, text string, pinned Pins) (Head, error) {
	v, err := logVerifier(op, originOf(text), pinned)
	if err != nil {
		return Head{}, fault.Because(err, op, fault.Of(err), "witnessed checkpoint %d: %s", i, fault.Text(err))
	}
	return openOf(op, "witnessed checkpoint", i, text, v)
}
