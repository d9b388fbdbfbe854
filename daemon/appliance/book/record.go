// SPDX-License-Identifier: Apache-2.0

package book

import (
	"encoding/json"
	"slices"
	"strings"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// Record is what the log of one appliance contains about the documents of consent, read from its entries only: which documents there are,
// and which keys were trusted when each arrived. It proves nothing before the entries are verified.
type Record struct {
	documents []recorded // in the order of the log, each once
	pins      []pinning
}

type recorded struct {
	sealed []byte
	digest fleet.Digest
	kind   string // payload type, of a statement the type of its predicate
	entry  int64
	site   Site // what the customer's file said at that moment
	pins   int  // how many keys of the customer were pinned before it
}

type pinning struct {
	key         seal.Key
	endorsement []byte
}

// ReadRecord reads the entries of an appliance's log. Entries of kinds without a document are skipped, and so are refused ones, which had
// no effect.
func ReadRecord(log audit.Log) (Record, error) {
	const op = "appliance.ReadRecord"
	var r Record
	var site Site
	known := map[fleet.Digest]bool{}
	for i := range log.Size() {
		var e struct {
			Kind  string          `json:"kind"`
			Body  json.RawMessage `json:"body"`
			Fault string          `json:"fault"`
		}
		if err := json.Unmarshal(log.Entry(i), &e); err != nil {
			return r, fault.Because(err, op, fault.Invalid, "entry %d is not one of a log", i)
		}
		if e.Fault != "" || len(e.Body) == 0 {
			continue
		}
		sealed, err := r.read(e.Kind, e.Body, &site)
		if err != nil {
			return r, fault.Because(err, op, fault.Invalid, "entry %d can't be read: %s", i, fault.Text(err))
		}
		if sealed == nil {
			continue
		}
		d := recorded{sealed: sealed, digest: fleet.DigestOf(sealed), entry: i, site: site, pins: len(r.pins)}
		// The vendor may send an invalid request, or the same one twice: it has no effect.
		if d.kind, err = typeOf(sealed); err != nil || known[d.digest] || (e.Kind == Take{}.Kind() && d.kind != operation.TypeRequest) {
			continue
		}
		known[d.digest] = true
		r.documents = append(r.documents, d)
	}
	return r, nil
}

// read takes the keys of an entry into the record, and returns its document.
func (r *Record) read(kind string, body []byte, site *Site) ([]byte, error) {
	switch kind {
	case SetSite{}.Kind():
		var c SetSite
		if err := json.Unmarshal(body, &c); err != nil {
			return nil, err
		}
		_, err := c.Site.owned() // its keys can be read
		*site = c.Site
		return nil, err
	case Pin{}.Kind():
		var c Pin
		if err := json.Unmarshal(body, &c); err != nil {
			return nil, err
		}
		k, err := seal.ParseKey(c.Public)
		r.pins = append(r.pins, pinning{k, c.Endorsement})
		return nil, err
	case Take{}.Kind():
		var c Take
		err := json.Unmarshal(body, &c)
		return c.Operation, err
	case Consent{}.Kind():
		var c struct { // see its Record: of an output the log has the digest
			Document []byte `json:"document"`
		}
		err := json.Unmarshal(body, &c)
		return c.Document, err
	case Finish{}.Kind():
		var c struct {
			Result []byte `json:"result"`
		}
		err := json.Unmarshal(body, &c)
		return c.Result, err
	}
	return nil, nil
}

func typeOf(sealed []byte) (string, error) {
	kind, err := seal.TypeOf(sealed)
	if err == nil && kind == (operation.Approval{}).PayloadType() {
		return operation.Kind(sealed)
	}
	return kind, err
}

// Documents lists the sealed documents that the log names, oldest first: they are part of the evidence.
func (r Record) Documents() []string {
	out := []string{}
	for _, d := range r.documents {
		out = append(out, string(d.sealed))
	}
	return out
}

// Trust is the keys that are trusted for the documents of one appliance. For a party without keys here, those are trusted that the log
// has on record at the time of a document: the statement of the log's owner, and no more.
type Trust struct {
	Operators []seal.Key // of the vendor, who send requests
	Customers []seal.Key // who decide; keys that these endorsed are trusted from then on
	Appliance []seal.Key // that signs results: the key of its log
}

func (t Trust) operators(d recorded) []seal.Key {
	if len(t.Operators) > 0 {
		return t.Operators
	}
	var out []seal.Key
	all, _ := d.site.owned() // they were read with the log
	for _, o := range all {
		if o.who != releases {
			out = append(out, o.key)
		}
	}
	return out
}

// customers lists the keys of the customer that were trusted when d was written to the log with this origin.
func (t Trust) customers(origin string, r Record, d recorded) []seal.Key {
	trusted := slices.Clip(t.Customers)
	for _, p := range r.pins[:d.pins] {
		if len(t.Customers) == 0 {
			trusted = append(trusted, p.key)
			continue
		}
		if e, _, err := seal.Open[operation.Endorsement](p.endorsement, trusted); err == nil && e.Key == p.key.ID && at(origin, e.Appliance) {
			trusted = append(trusted, p.key)
		}
	}
	return trusted
}

// Case is the log of one appliance and the keys that are trusted for it.
type Case struct {
	Origin string // of the log
	Record Record
	Trust  Trust
}

// Verified is one operation whose documents make a chain.
type Verified struct {
	ID      string
	Origin  string
	State   operation.State
	Refused string // a request that nothing followed, and why the appliance had to refuse it
}

// VerifyDocuments checks that the documents of a bundle are exactly those that the logs name, that those of each operation make
// a chain in which each link is signed by the party whose word it is, and that all else that was decided is signed by the
// customer. The logs must have been verified. An error has an [audit.Breach] as its cause: Omitted, Unknown or Unchained.
func VerifyDocuments(cases []Case, documents []string) ([]Verified, error) {
	if err := complete(cases, documents); err != nil {
		return nil, err
	}
	var out []Verified
	for _, c := range cases {
		chains, err := c.chains()
		if err != nil {
			return nil, err
		}
		for _, l := range chains {
			v, err := c.verify(l)
			if err != nil {
				return nil, err
			}
			out = append(out, v)
		}
	}
	return out, nil
}

const opDocuments = "appliance.VerifyDocuments"

func complete(cases []Case, documents []string) error {
	type place struct {
		origin string
		d      recorded
	}
	named := map[fleet.Digest]place{}
	for _, c := range cases {
		for _, d := range c.Record.documents {
			named[d.digest] = place{c.Origin, d}
		}
	}
	seen := map[fleet.Digest]int{}
	for i, text := range documents {
		d := fleet.DigestOf([]byte(text))
		if _, ok := named[d]; !ok {
			return fault.Because(audit.Unknown, opDocuments, fault.Denied,
				"document %d is in none of the logs: nobody knows when it was made, or whether it counted", i)
		}
		if first, twice := seen[d]; twice {
			return fault.Because(audit.Unknown, opDocuments, fault.Denied, "document %d is document %d once more", i, first)
		}
		seen[d] = i
	}
	for _, c := range cases {
		for _, d := range c.Record.documents {
			if _, ok := seen[d.digest]; !ok {
				return fault.Because(audit.Omitted, opDocuments, fault.Denied, "log %q: the document of entry %d (%s) was left out", c.Origin,
					d.entry, d.kind)
			}
		}
	}
	return nil
}

// links are the documents of one operation.
type links struct{ request, approval, result, release recorded }

func (c Case) unchained(d recorded, format string, args ...any) error {
	err := fault.New(opDocuments, fault.Denied, format, args...)
	return fault.Because(audit.Unchained, opDocuments, fault.Denied, "log %q, entry %d: %s", c.Origin, d.entry, fault.Text(err))
}

// chains sorts the documents by the digests that they name, and verifies those that belong to no operation's chain.
func (c Case) chains() ([]*links, error) {
	var out []*links
	asked, ended := map[fleet.Digest]*links{}, map[fleet.Digest]*links{}
	put := func(at *recorded, l *links, d recorded, what string) error {
		switch {
		case l == nil:
			return c.unchained(d, "the %s is of something that is not on record", what)
		case at.sealed != nil:
			return c.unchained(d, "a second %s of the same operation, after that of entry %d", what, at.entry)
		}
		*at = d
		return nil
	}
	for _, d := range c.Record.documents {
		var err error
		switch d.kind {
		case operation.TypeRequest:
			l := &links{request: d}
			out, asked[d.digest] = append(out, l), l
		case operation.TypeApproval:
			var a operation.Approval
			if a, err = seal.Peek[operation.Approval](d.sealed); err == nil {
				l := asked[a.Request]
				err = put(&orNew(l).approval, l, d, "approval")
			}
		case operation.TypeResult:
			var r operation.Result
			if r, err = seal.Peek[operation.Result](d.sealed); err == nil {
				l := asked[r.Request]
				ended[d.digest] = l
				err = put(&orNew(l).result, l, d, "result")
			}
		case operation.TypeRelease:
			var r operation.Release
			if r, err = seal.Peek[operation.Release](d.sealed); err == nil {
				l := ended[r.Result]
				err = put(&orNew(l).release, l, d, "release")
			}
		default: // a grant, a deny, a plan's approval, a cancellation
			_, _, err = seal.Verify(d.sealed, c.Trust.customers(c.Origin, c.Record, d))
			if err != nil {
				err = c.unchained(d, "the document (%s), which the customer signs: %s", d.kind, fault.Text(err))
			}
		}
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// at reports whether the log with this origin is that of the appliance.
func at(origin string, a fleet.ApplianceID) bool {
	return strings.HasSuffix(origin, audit.CustomerOrigin("", a))
}

func orNew(l *links) *links {
	if l == nil {
		return new(links)
	}
	return l
}

// verify checks the chain of one operation with the keys of each party.
func (c Case) verify(l *links) (Verified, error) {
	last := l.request
	for _, d := range []recorded{l.approval, l.result, l.release} {
		if d.sealed != nil {
			if d.entry < last.entry {
				return Verified{}, c.unchained(d, "it came before what it follows, entry %d", last.entry)
			}
			last = d
		}
	}
	keys := operation.Keys{Operators: c.Trust.operators(l.request), Customers: c.Trust.customers(c.Origin, c.Record, last),
		Appliance: c.Trust.Appliance}
	chain, err := operation.VerifyChain(l.request.sealed, l.approval.sealed, l.result.sealed, l.release.sealed, keys)
	if err == nil && len(c.Trust.Operators) == 0 {
		_, _, err = State{Site: l.request.site}.asker(l.request.sealed) // the key is that of the operator whom the request names
	}
	if err == nil && !at(c.Origin, chain.Request.Appliance) {
		err = fault.New(opDocuments, fault.Denied, "the documents are of appliance %q", chain.Request.Appliance)
	}
	if err == nil {
		return Verified{ID: chain.Request.ID, Origin: c.Origin, State: chain.State}, nil
	}
	if last.entry == l.request.entry { // it had no effect, so its sender can't make the evidence invalid
		return Verified{Origin: c.Origin, State: operation.Rejected, Refused: fault.Text(err)}, nil
	}
	return Verified{}, c.unchained(last, "%s", fault.Text(err))
}
