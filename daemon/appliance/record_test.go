// SPDX-License-Identifier: Apache-2.0

package appliance_test

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

var ownKey = key(3) // of the appliance

// story is a log that its owner could have written: nothing checks it as it grows.
type story struct {
	t     *testing.T
	log   audit.Log
	other fleet.ApplianceID // in the place of eu-1
}

func (s *story) name() fleet.ApplianceID {
	if s.other != "" {
		return s.other
	}
	return "eu-1"
}

// wrote adds a change to the log.
func wrote[R any](s *story, c ledger.Change[book.State, R]) {
	s.t.Helper()
	body, err := json.Marshal(c)
	if err != nil {
		s.t.Fatal(err)
	}
	s.log = s.log.Append(audit.Entry{At: start, By: fleet.Local, Kind: c.Kind(), Body: body})
}

// begun is a log with the keys of both parties.
func begun(t *testing.T) *story {
	s := &story{t: t}
	wrote(s, book.SetSite{Site: book.Site{TrustDomain: "acme.example",
		Operators: []book.Operator{{Name: "ann", Keys: [][]byte{pem(t, vendor)}}}}})
	wrote(s, book.Pin{Public: pem(t, customer)})
	return s
}

func (s *story) asks(id string, by ed25519.PrivateKey) []byte {
	b := sealed(s.t, operation.Request{ID: id, Appliance: s.name(), Operator: fleet.PrincipalOf("acme.example", fleet.Operator, "ann"),
		Template:       "state",
		TemplateDigest: fleet.DigestOf([]byte("t")), Release: fleet.DigestOf([]byte("r")), Recipient: "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p",
		At: start, NotAfter: start.Add(time.Hour), Nonce: nonce()}, by)
	wrote(s, book.Take{Number: 1, Operation: b})
	return b
}

var argv = []string{"bin/store", "state"}

func (s *story) decides(id, decision string, request []byte, by ed25519.PrivateKey) []byte {
	a := operation.Approval{ID: id, Appliance: s.name(), Request: fleet.DigestOf(request), Decision: decision, At: start.Add(time.Minute),
		NotAfter: start.Add(time.Hour), Nonce: nonce()}
	if decision == operation.DecisionApprove {
		a.Argv = argv
	}
	b := sealed(s.t, a, by)
	wrote(s, book.Consent{Document: b})
	return b
}

func (s *story) ran(id string, request, approval []byte, by ed25519.PrivateKey, edit ...func(*operation.Result)) []byte {
	out := operation.Output{Stdout: []byte(id)}
	r := operation.Result{ID: id, Appliance: s.name(), Request: fleet.DigestOf(request), Approval: fleet.DigestOf(approval), Argv: argv,
		State:   operation.Held,
		Started: start.Add(2 * time.Minute), Ended: start.Add(3 * time.Minute)}
	r.Stdout, r.Stderr = out.Commitments()
	for _, e := range edit {
		e(&r)
	}
	b := sealed(s.t, r, by)
	wrote(s, book.Finish{ID: id, Result: b})
	return b
}

func (s *story) lets(id, decision string, result []byte, by ed25519.PrivateKey) []byte {
	r := operation.Release{ID: id, Appliance: s.name(), Result: fleet.DigestOf(result), Decision: decision, At: start.Add(4 * time.Minute),
		Nonce: nonce()}
	if decision == operation.DecisionRelease {
		r.Output = fleet.DigestOf([]byte("o"))
	}
	b := sealed(s.t, r, by)
	wrote(s, book.Consent{Document: b})
	return b
}

// whole is an operation from request to release.
func (s *story) whole(id string) (request, approval, result, release []byte) {
	request = s.asks(id, vendor)
	approval = s.decides(id, operation.DecisionApprove, request, customer)
	result = s.ran(id, request, approval, ownKey)
	return request, approval, result, s.lets(id, operation.DecisionRelease, result, customer)
}

func keyOf(t *testing.T, k ed25519.PrivateKey) []seal.Key {
	t.Helper()
	p, err := seal.KeyOf(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return []seal.Key{p}
}

// verify has the log's own record of keys count, and then keys that the auditor brought along.
func (s *story) verify(edit func([]string) []string) (out []book.Verified, recorded, given error) {
	s.t.Helper()
	r, err := book.ReadRecord(s.log)
	if err != nil {
		s.t.Fatal(err)
	}
	documents := r.Documents()
	if edit != nil {
		documents = edit(documents)
	}
	c := book.Case{Origin: ownLog, Record: r, Trust: book.Trust{Appliance: keyOf(s.t, ownKey)}}
	out, recorded = book.VerifyDocuments([]book.Case{c}, documents)
	c.Trust.Operators, c.Trust.Customers = keyOf(s.t, vendor), keyOf(s.t, customer)
	_, given = book.VerifyDocuments([]book.Case{c}, documents)
	return out, recorded, given
}

func TestDocumentsOfALogThatIsWell(t *testing.T) {
	s := begun(t)
	s.whole("op-1")
	request := s.asks("op-2", vendor)
	s.decides("op-2", operation.DecisionReject, request, customer)
	request = s.asks("op-3", vendor)
	approval := s.decides("op-3", operation.DecisionApprove, request, customer)
	s.lets("op-3", operation.DecisionWithhold, s.ran("op-3", request, approval, ownKey), customer)
	s.asks("op-4", vendor)
	wrote(s, book.Consent{Document: sealed(t, granted(fleet.OperateRead, 1), customer)})
	wrote(s, book.Consent{Document: sealed(t, grant.Revoke{Appliance: "eu-1", Phase: fleet.OperateRead, At: start, Nonce: nonce()}, customer)})
	s.asks("op-5", thief)                        // it is on record, and nothing came of it
	wrote(s, book.Take{Operation: []byte("{}")}) // nor of that
	wrote(s, book.Take{Operation: sealed(t, granted(fleet.OperateAdmin, 0), vendor)})
	wrote(s, book.Take{Operation: sealed(t, operation.Approval{ID: "op-4"}, vendor)})
	wrote(s, book.Pin{Public: pem(t, key(5)), Endorsement: sealed(t, operation.Endorsement{Appliance: "eu-1", Key: keyOf(t, key(5))[0].ID},
		customer)})
	request = s.asks("op-6", vendor)
	s.decides("op-6", operation.DecisionApprove, request, key(5))
	// op-1 was asked before
	wrote(s, book.SetSite{Site: book.Site{TrustDomain: "acme.example",
		Operators: []book.Operator{{Name: "cal", Keys: [][]byte{pem(t, key(6))}}}}})
	out, recorded, given := s.verify(nil)
	if recorded != nil || given != nil {
		t.Fatalf("%v, %v", recorded, given)
	}
	var got []string
	for _, v := range out {
		got = append(got, v.ID+" "+string(v.State))
	}
	if want := []string{"op-1 released", "op-2 rejected", "op-3 withheld", "op-4 requested", " rejected",
		"op-6 approved"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if out[4].Refused == "" {
		t.Error("a request of a thief is told as one of the vendor's")
	}
}

// TestDocumentsThatAreNoChain has the owner of the log write what it likes, and sign with every key that it has (FAULTS.md C5).
func TestDocumentsThatAreNoChain(t *testing.T) {
	approve, reject := operation.DecisionApprove, operation.DecisionReject
	for name, c := range map[string]struct {
		tell   func(s *story)
		edit   func([]string) []string
		breach audit.Breach
		text   string
	}{
		"the approval of A with the result of B": {func(s *story) {
			a, b := s.asks("a", vendor), s.asks("b", vendor)
			s.decides("a", approve, a, customer)
			s.ran("b", b, s.decides("b", approve, b, customer), ownKey)
			s.ran("a", a, []byte("that of b"), ownKey)
		}, nil, audit.Unchained, "of another approval"},
		"B's result alone": {func(s *story) {
			s.decides("a", approve, s.asks("a", vendor), customer)
			s.ran("b", []byte("b"), []byte("b"), ownKey)
		}, nil, audit.Unchained, "not on record"},
		"another argv than approved": {func(s *story) {
			q := s.asks("a", vendor)
			s.ran("a", q, s.decides("a", approve, q, customer), ownKey, func(r *operation.Result) { r.Argv = []string{"bin/store", "drop"} })
		}, nil, audit.Unchained, "the arguments differ"},
		"a result of a rejected operation": {func(s *story) {
			q := s.asks("a", vendor)
			s.ran("a", q, s.decides("a", reject, q, customer), ownKey)
		}, nil, audit.Unchained, "had said no"},
		"an approval signed by the vendor's operator": {func(s *story) {
			s.decides("a", approve, s.asks("a", vendor), vendor)
		}, nil, audit.Unchained, "the approval, which the customer signs"},
		"a rejection signed by the appliance": {func(s *story) {
			s.decides("a", reject, s.asks("a", vendor), ownKey)
		}, nil, audit.Unchained, "the approval, which the customer signs"},
		"a request signed by the customer": {func(s *story) {
			s.decides("a", approve, s.asks("a", customer), customer)
		}, nil, audit.Unchained, "the request, which an operator of the vendor signs"},
		"a result signed by the vendor's operator": {func(s *story) {
			q := s.asks("a", vendor)
			s.ran("a", q, s.decides("a", approve, q, customer), vendor)
		}, nil, audit.Unchained, "the result, which the appliance signs"},
		"a result signed by the customer": {func(s *story) {
			q := s.asks("a", vendor)
			s.ran("a", q, s.decides("a", approve, q, customer), customer)
		}, nil, audit.Unchained, "the result, which the appliance signs"},
		"a release signed by the appliance": {func(s *story) {
			q := s.asks("a", vendor)
			s.lets("a", operation.DecisionRelease, s.ran("a", q, s.decides("a", approve, q, customer), ownKey), ownKey)
		}, nil, audit.Unchained, "the release, which the customer signs"},
		"a result without request": {func(s *story) { s.ran("a", []byte("q"), []byte("a"), ownKey) }, nil, audit.Unchained,
			"the result is of something that is not on record"},
		"a result without approval": {func(s *story) { s.ran("a", s.asks("a", vendor), []byte("a"), ownKey) }, nil, audit.Unchained,
			"no approval"},
		"an approval without request": {func(s *story) { s.decides("a", approve, []byte("q"), customer) }, nil, audit.Unchained,
			"the approval is of something that is not on record"},
		"a release without result": {func(s *story) { s.lets("a", operation.DecisionRelease, []byte("r"), customer) }, nil, audit.Unchained,
			"the release is of something that is not on record"},
		"a release of what failed": {func(s *story) {
			q := s.asks("a", vendor)
			r := s.ran("a", q, s.decides("a", approve, q, customer), ownKey, func(r *operation.Result) { r.State = operation.Failed })
			s.lets("a", operation.DecisionRelease, r, customer)
		}, nil, audit.Unchained, "it has no output"},
		"two approvals": {func(s *story) {
			q := s.asks("a", vendor)
			s.decides("a", reject, q, customer)
			s.ran("a", q, s.decides("a", approve, q, customer), ownKey)
		}, nil, audit.Unchained, "a second approval"},
		"a grant of the vendor": {func(s *story) {
			wrote(s, book.Consent{Document: sealed(s.t, granted(fleet.OperateAdmin, 0), vendor)})
		}, nil, audit.Unchained, "which the customer signs"},
		"a plan's approval of the appliance": {func(s *story) {
			wrote(s, book.Consent{Document: sealed(s.t, operation.PlanApproval{Appliance: "eu-1", Release: fleet.DigestOf(nil),
				Plan:   fleet.DigestOf(nil),
				Phases: []fleet.Phase{fleet.Deploy}, At: start, NotAfter: start.Add(time.Hour), Nonce: nonce()}, ownKey)})
		}, nil, audit.Unchained, "which the customer signs"},
		"a key of the customer's that is pinned after its approval": {func(s *story) {
			s.decides("a", approve, s.asks("a", vendor), key(5))
			wrote(s, book.Pin{Public: pem(s.t, key(5)), Endorsement: sealed(s.t,
				operation.Endorsement{Appliance: "eu-1", Key: keyOf(s.t, key(5))[0].ID}, customer)})
		}, nil, audit.Unchained, "the approval, which the customer signs"},
		"a chain of another appliance": {func(s *story) {
			s.other = "us-1"
			s.whole("a")
		}, nil, audit.Unchained, "are of appliance"},
		"a document left out": {func(s *story) { s.whole("a") }, func(d []string) []string { return slices.Delete(d, 1, 2) }, audit.Omitted,
			"was left out"},
		"the last left out": {func(s *story) { s.whole("a") }, func(d []string) []string { return d[:3] }, audit.Omitted, "was left out"},
		"all left out":      {func(s *story) { s.whole("a") }, func(d []string) []string { return nil }, audit.Omitted, "was left out"},
		"a document twice": {func(s *story) { s.whole("a") }, func(d []string) []string { return append(d, d[0]) }, audit.Unknown,
			"once more"},
		"a document that no log names": {func(s *story) { s.whole("a") }, func(d []string) []string {
			return append(d, string((&story{t: t}).decides("a", approve, []byte("q"), customer)))
		}, audit.Unknown, "in none of the logs"},
		"one byte": {func(s *story) { s.whole("a") }, func(d []string) []string {
			d[2] = strings.Replace(d[2], `"`, ` "`, 1)
			return d
		}, audit.Unknown, "in none of the logs"},
	} {
		t.Run(name, func(t *testing.T) {
			s := begun(t)
			c.tell(s)
			_, recorded, given := s.verify(c.edit)
			for what, err := range map[string]error{"by the log's own record": recorded, "by the keys that were given": given} {
				if !errors.Is(err, c.breach) || fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err), c.text) {
					t.Errorf("%s: %v, want %s: %q", what, err, c.breach, c.text)
				}
			}
		})
	}
}

// TestGivenKeysGoBeforeTheRecord: a log whose owner pinned a key of its own shows a chain by its own record, and none by the
// customer's key; the same for the vendor's.
func TestGivenKeysGoBeforeTheRecord(t *testing.T) {
	s := begun(t)
	wrote(s, book.Pin{Public: pem(t, thief)}) // nobody endorsed it
	s.decides("a", operation.DecisionApprove, s.asks("a", vendor), thief)
	if _, recorded, given := s.verify(nil); recorded != nil || !errors.Is(given, audit.Unchained) {
		t.Errorf("%v, %v", recorded, given)
	}
	s = begun(t)
	wrote(s, book.SetSite{Site: book.Site{TrustDomain: "acme.example",
		Operators: []book.Operator{{Name: "ann", Keys: [][]byte{pem(t, thief)}}}}})
	s.decides("a", operation.DecisionApprove, s.asks("a", thief), customer)
	if _, recorded, given := s.verify(nil); recorded != nil || !errors.Is(given, audit.Unchained) {
		t.Errorf("%v, %v", recorded, given)
	}
	s = begun(t)
	wrote(s, book.SetSite{Site: book.Site{TrustDomain: "acme.example",
		Operators: []book.Operator{{Name: "bob", Keys: [][]byte{pem(t, vendor)}}}}})
	s.decides("a", operation.DecisionApprove, s.asks("a", vendor), customer) // the request says that ann asks
	if _, recorded, given := s.verify(nil); !errors.Is(recorded, audit.Unchained) || given != nil {
		t.Errorf("in another's name: %v, %v", recorded, given)
	}
	s = begun(t)
	wrote(s, book.SetSite{Site: book.Site{TrustDomain: "acme.example",
		Operators: []book.Operator{{Name: "ann", Keys: [][]byte{pem(t, customer)}}}}})
	s.decides("a", operation.DecisionApprove, s.asks("a", customer), customer)
	if _, recorded, _ := s.verify(nil); !errors.Is(recorded, audit.Unchained) ||
		!strings.Contains(fault.Text(recorded), "can't speak for both") {
		t.Errorf("one key asks and decides: %v", recorded)
	}
}
