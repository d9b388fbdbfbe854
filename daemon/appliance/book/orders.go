// SPDX-License-Identifier: Apache-2.0

package book

import (
	"bytes"
	"slices"
	"time"

	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// Take puts one numbered order of the vendor into the customer's book, before it is acknowledged. Exactly one of its
// fields is set. It starts nothing: an order that is not signed by a key of the customer's file, or that no grant
// allows, is on record with the reason, and that is all that becomes of it.
type Take struct {
	Number    uint64      `json:"number"`
	Epoch     uint64      `json:"epoch,omitempty"` // number of the epoch of the vendor's book that it came in
	Release   []byte      `json:"release,omitempty"`
	Operation []byte      `json:"operation,omitempty"`
	Cancel    string      `json:"cancel,omitempty"`
	Probe     *ProbeIndex `json:"probe,omitempty"`
	Witnessed []byte      `json:"witnessed,omitempty"` // the vendor's checkpoint, found to continue the last one, countersigned here
	Cosigned  []byte      `json:"cosigned,omitempty"`  // our checkpoint, countersigned by the vendor
	Refused   string      `json:"refused,omitempty"`   // why nothing comes of it, found before it was put on record
	Left      *LeftOut    `json:"left,omitempty"`      // with Refused: its body

	Why fleet.Reason `json:"why,omitzero"` // with Refused: what the vendor is told of an operation
}

// What an order is, in [LeftOut].
const (
	OrderRelease    = "release"
	OrderOperation  = "operation"
	OrderCancel     = "cancel"
	OrderProbe      = "probe"
	OrderCheckpoint = "checkpoint"
	OrderCosigned   = "cosigned"
)

// MaxProbeID is the most bytes of the id of a probe.
const MaxProbeID = 64

// Took is the result of an order.
type Took struct {
	Done   uint64 `json:"done"`             // number of the last order in the book
	Reason string `json:"reason,omitempty"` // why it had no effect

	Why fleet.Reason `json:"why,omitzero"` // likewise, for the vendor
}

// Kind names the change in the log.
func (Take) Kind() string { return "order.take/1" }

// Apply takes each order once and in order: one that is in the book already is answered and changes nothing, one that
// is out of sequence is refused.
func (c Take) Apply(s *State, m ledger.Meta) (Took, error) {
	if c.Epoch != s.Epoch.Number {
		return Took{}, fault.New("order.take", fault.Conflict,
			"order %d is of epoch %d of the vendor's book, and epoch %d is the one that was met", c.Number, c.Epoch, s.Epoch.Number)
	}
	if c.Number <= s.OrdersDone {
		return Took{Done: s.OrdersDone}, nil
	}
	if c.Number != s.OrdersDone+1 {
		return Took{}, fault.New("order.take", fault.Conflict, "order %d is out of sequence: expected %d", c.Number, s.OrdersDone+1)
	}
	s.OrdersDone = c.Number
	var err error
	switch {
	case c.Release != nil:
		err = s.offer(c.Release, m.At)
	case c.Operation != nil:
		err = s.request(c.Operation, m)
	case c.Cancel != "":
		err = s.cancel(c.Cancel, m)
	case c.Probe != nil:
		err = s.echo(*c.Probe, m)
	case c.Witnessed != nil:
		err = s.witnessed(c.Witnessed, m)
	case c.Cosigned != nil:
		err = s.Countersigned(c.Cosigned)
	case c.Left != nil && c.Left.What == OrderOperation:
		s.refuseOperation(*c.Left, Grounds{c.Why, c.Refused}, m)
	}
	out := Took{Done: c.Number, Reason: c.Refused, Why: c.Why}
	if err != nil {
		out.Reason, out.Why = fault.Text(err), fleet.ReasonOf(err)
	}
	return out, nil
}

// echo answers one message of a probe.
func (s *State) echo(p ProbeIndex, m ledger.Meta) error {
	const op = "order.probe"
	if len(p.ID) > MaxProbeID {
		return fault.New(op, fault.Invalid, "a probe's id has at most %d bytes", MaxProbeID)
	}
	if n := s.waiting(func(r Report) bool { return r.Probe != nil }); n >= MaxEchoes {
		return fault.New(op, fault.Busy, "%d echoes of probes wait for the vendor already: it is not answered", n)
	}
	s.ProbesSeen++
	s.report(Report{At: m.At, Probe: &p})
	return nil
}

// witnessed stores a checkpoint of the vendor with this appliance's countersignature, and reports it.
func (s *State) witnessed(note []byte, m ledger.Meta) error {
	const op = "order.checkpoint"
	if len(note) > 2*channel.MaxNote {
		return fault.New(op, fault.Invalid, "a checkpoint has at most %d bytes", channel.MaxNote)
	}
	if n := s.waiting(func(r Report) bool { return r.Cosigned != nil }); n >= MaxHeads {
		return fault.New(op, fault.Busy, "%d countersigned checkpoints wait for the vendor already: this one is not countersigned", n)
	}
	if n := len(s.Witnessed); n == 0 || !bytes.Equal(s.Witnessed[n-1], note) { // else it is sent again: the vendor did not have it
		s.Witnessed = appendBounded(s.Witnessed, note)
	}
	s.report(Report{At: m.At, Cosigned: note})
	return nil
}

// Countersigned stores the vendor's countersignature of a head that was sent to it, and drops that head and the older ones from those
// that wait. Anything else from the vendor is refused: it proves nothing, and would make the exported evidence invalid.
func (s *State) Countersigned(b []byte) error {
	k, err := seal.ParseKey(s.VendorLogKey)
	if err != nil {
		return err
	}
	witness, err := audit.CosignVerifier(audit.VendorOrigin(s.Site.TrustDomain), k.Public)
	if err != nil {
		return err
	}
	_, i, err := audit.Countersigned(b, s.Asked, witness)
	if err != nil {
		return err
	}
	s.Cosigned, s.Asked, s.VendorHolds = appendBounded(s.Cosigned, b), slices.Clone(s.Asked[i+1:]), nil
	return nil
}

// offer stores a signed release. The newest [MaxOffers] are stored; one that is deployed or approved stays in any case.
func (s *State) offer(sealed []byte, at time.Time) error {
	const op = "order.release"
	keys, err := keysOf(s.Site.ReleaseKeys)
	if err != nil {
		return err
	}
	rel, _, err := seal.Open[manifest.Release](sealed, keys)
	if err != nil {
		return fault.At(op, "", err)
	}
	if err := rel.Check(); err != nil {
		return fault.At(op, "", err)
	}
	d := fleet.DigestOf(sealed)
	if slices.ContainsFunc(s.Offers, func(o Offer) bool { return o.Digest == d }) {
		return nil
	}
	offers := append(slices.Clone(s.Offers), Offer{Digest: d, App: rel.App, Version: rel.Version, Sealed: sealed, At: at})
	for i := 0; len(offers) > MaxOffers && i < len(offers); {
		if d := offers[i].Digest; d == s.Approved.Release || d == s.Deploy.Release || d == s.Good.Release {
			i++
			continue
		}
		offers = slices.Delete(offers, i, i+1)
	}
	s.Offers = offers
	return nil
}

// release opens an offered release, whose signature was checked when it entered the book.
func (s State) release(d fleet.Digest) (manifest.Release, Offer, error) {
	o, err := s.Offer(d)
	if err != nil {
		return manifest.Release{}, o, err
	}
	rel, err := seal.Peek[manifest.Release](o.Sealed)
	return rel, o, err
}

// Plan compiles what would run of a release, with the customer's choices.
func (s State) Plan(d fleet.Digest) (manifest.Plan, manifest.Release, Offer, error) {
	rel, o, err := s.release(d)
	if err != nil {
		return manifest.Plan{}, rel, o, err
	}
	p, err := manifest.Compile(rel, s.choices())
	return p, rel, o, err
}

// choices is what the customer chose that a plan depends on.
func (s State) choices() manifest.Choices { return manifest.Choices{Runtime: s.Site.Runtime} }

// Decision reports whether a phase is granted at all now.
func (s State) Decision(p fleet.Phase, at time.Time) grant.Decision {
	return grant.Decide(grant.Input{Appliance: s.Appliance, Phase: p, Now: at}, s.Grants)
}

// request puts an operation on the list, or rejects it with the reason.
func (s *State) request(sealed []byte, m ledger.Meta) error {
	claimed, err := seal.Peek[operation.Request](sealed)
	if err != nil {
		return err
	}
	if fleet.CheckName("operation", claimed.ID) != nil {
		return fault.New("order.operation", fault.Invalid, "the operation has no proper id")
	}
	if _, known := s.operations.Get(claimed.ID); known {
		return fault.New("order.operation", fault.Conflict, "operation %q was requested before", claimed.ID)
	}
	if err := s.room(); err != nil {
		return err
	}
	s.evict()
	o := Operation{ID: claimed.ID, State: operation.Requested, Request: sealed, At: m.At}
	why := s.admit(&o, m.At)
	if why == nil {
		s.operations = s.operations.Set(o.ID, o)
		return nil
	}
	if err := s.move(&o, operation.Reject, GroundsOf(why), m, nil, nil); err != nil {
		return err
	}
	return why
}

// admit checks everything about a request that can be checked before a person looks at it.
func (s State) admit(o *Operation, at time.Time) error {
	const op = "order.operation"
	r, who, err := s.asker(o.Request)
	if err != nil {
		return err
	}
	if err := r.Check(); err != nil {
		return fault.At(op, "", err)
	}
	if r.Appliance != s.Appliance {
		return fault.New(op, fault.Denied, "the request is for appliance %q", r.Appliance)
	}
	if err := operation.InForce("request", r.NotAfter, at); err != nil {
		why := wrongTime
		if fault.Of(err) == fault.Expired {
			why.Kind = fleet.RequestEnded
		}
		return why.With(fault.At(op, "", err))
	}
	if err := operation.Dated("request", r.At, at); err != nil {
		return wrongTime.With(fault.At(op, "", err))
	}
	t, err := s.Template(r)
	if err != nil {
		return err
	}
	if o.Argv, err = t.Argv(r.Vars); err != nil {
		return fault.At(op, "", err)
	}
	o.Phase, o.Service = t.Tier, t.Service
	if d := s.decide(r, who, t, at, t.Limit()); !d.Allow {
		return notGranted.With(fault.New(op, fault.Denied, "%s", d.Why))
	}
	return nil
}

// Template finds the template that a request names in the release that runs.
func (s State) Template(r operation.Request) (operation.Template, error) {
	const op = "order.operation"
	unknown := fleet.Reason{Kind: fleet.TemplateUnknown}
	if s.Good.Release == "" || s.Good.Release != r.Release {
		return operation.Template{}, fleet.Reason{Kind: fleet.OtherRelease}.With(fault.New(op, fault.Conflict,
			"the request is for release %s, and that is not what runs here", r.Release.Short()))
	}
	rel, _, err := s.release(r.Release)
	if err != nil {
		return operation.Template{}, err
	}
	text, ok := rel.Templates[r.Template]
	if !ok {
		return operation.Template{}, unknown.With(fault.New(op, fault.NotFound, "the release has no operation %q", fault.Clip(r.Template)))
	}
	t, err := operation.ParseTemplate([]byte(text))
	if err != nil {
		return t, fault.At(op, "", err)
	}
	if t.Digest() != r.TemplateDigest {
		return t, unknown.With(fault.New(op, fault.Conflict, "the request binds another text of the template %q", fault.Clip(r.Template)))
	}
	return t, nil
}

// decide evaluates the grants and the denies; who is the result of [State.asker], limit how long the act may still take.
func (s State) decide(r operation.Request, who fleet.Principal, t operation.Template, at time.Time, limit time.Duration) grant.Decision {
	return grant.Decide(grant.Input{Appliance: s.Appliance, Phase: t.Tier, Limit: limit, Who: who, Operation: r.Template, Service: t.Service,
		Effects: effects(t), Now: at}, s.Grants)
}

// effects names what a template declares, so that a deny can speak of it.
func effects(t operation.Template) []string {
	var out []string
	if len(t.Effects.Writes) > 0 {
		out = append(out, "writes")
	}
	if t.Effects.Network {
		out = append(out, "network")
	}
	if t.Effects.Credentials {
		out = append(out, "credentials")
	}
	return out
}

// room refuses an operation while too many are open, or too many reports of them wait: how each of those ends that are open
// can always be reported.
func (s State) room() error {
	const op = "order.operation"
	active, held, bytes, edges := 0, 0, 0, 0
	for _, o := range s.Operations() {
		switch o.State {
		case operation.Requested, operation.Approved, operation.Running:
			active++
		case operation.Held:
			held++
		}
		bytes += len(o.Output)
	}
	for _, r := range s.Reports {
		if r.Operation != nil {
			edges++
			bytes += len(r.Operation.Statement) + len(r.Operation.Output)
		}
	}
	switch {
	case active >= MaxActive:
		return tooManyOpen.With(fault.New(op, fault.Busy,
			"%d operations wait for the customer or run, and that is the most: ask again when some are over", active))
	case held >= MaxHeld:
		return tooManyOpen.With(fault.New(op, fault.Busy,
			"the outputs of %d operations wait for the customer, and that is the most: ask again when some are released or withheld", held))
	case edges >= MaxOperationEdges || bytes >= MaxOperationsBytes:
		return tooManyOpen.With(fault.New(op, fault.Busy,
			"%d reports of operations wait for the vendor, and %d MiB of outputs and documents are held: ask again when they are acknowledged",
			edges, bytes>>20))
	}
	return nil
}

// evict drops ended operations if the list is full: the oldest of those that were refused before a decision of the customer, which never
// evict others, or the oldest of the others.
func (s *State) evict() {
	refused, others := []Operation{}, []Operation{}
	for _, o := range s.Operations() {
		switch {
		case o.Left != nil:
			refused = append(refused, o)
		case o.State.Final():
			others = append(others, o)
		}
	}
	drop := func(list []Operation, most int) {
		slices.SortStableFunc(list, func(a, b Operation) int { return a.At.Compare(b.At) })
		for i := range max(0, len(list)-most+1) {
			s.operations = s.operations.Delete(list[i].ID)
		}
	}
	drop(refused, MaxRefused)
	drop(others, MaxOperations-MaxRefused-MaxActive-MaxHeld)
}

// refuseOperation lists a request that was refused before it was put on record, without its text, and tells the vendor.
func (s *State) refuseOperation(l LeftOut, b Grounds, m ledger.Meta) {
	if fleet.CheckName("operation", l.ID) != nil {
		return
	}
	if _, known := s.operations.Get(l.ID); known {
		return
	}
	s.evict()
	o := Operation{ID: l.ID, State: operation.Rejected, Reason: fault.ClipTo(b.Sentence, channel.MaxSentence), Left: &l, At: m.At}
	s.operations = s.operations.Set(o.ID, o)
	if s.waiting(func(r Report) bool { return r.Operation != nil }) < 2*MaxOperationEdges {
		s.report(Report{At: m.At, Operation: &OperationReport{ID: o.ID, State: string(o.State), Why: b.Why.Clipped()}})
	}
}

// cancel cancels an operation at the vendor's request: a running one is killed by the runner, which watches the book.
func (s *State) cancel(id string, m ledger.Meta) error {
	if err := fleet.CheckName("operation", id); err != nil {
		return err
	}
	o, err := s.Operation(id)
	if err != nil {
		return err
	}
	return s.move(&o, operation.Stop, Grounds{fleet.Reason{Kind: fleet.CancelledByVendor}, "cancelled by the vendor"}, m, nil, nil)
}
