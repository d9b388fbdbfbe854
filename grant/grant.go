// SPDX-License-Identifier: Apache-2.0

// Package grant is who may do what, now, and which grant or deny said so. Cedar: forbids win.
//
// # Promise
//
// Nothing is allowed but what a document of the customer allows at this moment, with one exception that the customer can
// switch off: observe, which reads and changes nothing. A deny wins over every grant, a built-in deny over everything.
// A policy that can't be evaluated denies. No grant gives more than its own phase, scope, window and number of uses.
//
// # Documents
//
// Four documents, each sealed by package seal with a key that the customer pinned:
//
//	application/vnd.demarc.grant+json;v=1   Grant: a phase, within a scope and a window, so many times
//	application/vnd.demarc.revoke+json;v=1  Revoke: one grant, a phase, or everything; good for ever, and harmless twice
//	application/vnd.demarc.deny+json;v=1    Deny: forbid policies in Cedar
//	application/vnd.demarc.lift+json;v=1    Lift: takes back one deny
//
// A grant has an end, at most 90 days after it begins and after it is given. The one exception is observe, which is on by
// default: a grant of observe without end and without a number of uses is that default, given back.
//
// A document counts once, by seal.Identity: a grant that comes again, used up or revoked, gives nothing. The book
// remembers the last MaxGone documents that ended, and refuses whatever is dated before all that it remembers.
//
// # What a policy can speak of
//
//	principal  Vendor::"spiffe://acme.example/operator/ann"
//	action     Action::"install" "observe" "deploy" "operate.read" "operate.write" "operate.admin"; the last three in Action::"operate"
//	resource   Operation::"state" in Service::"store" in Appliance::"eu-1", as far as the act has them
//	context    now (milliseconds since 1970), operation, service (strings, "" where there is none), effects (set of strings)
//
// A deny that speaks of anything else is refused when it is signed and when it comes: in Cedar, a policy with a misspelt
// name is no error, it just never applies.
package grant

import (
	"strconv"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// Limits.
const (
	MaxHeld   = 1024     // grants that have not run out
	MaxDenies = 64       // denies in force
	MaxGone   = 1024     // documents that ended and are remembered one by one
	MaxCedar  = 16 << 10 // bytes of one deny
	MaxText   = 64 << 10 // bytes of all denies in force
	maxRules  = 32       // policies in one deny
	maxScope  = 64       // names in a scope
	minNonce  = 16
	maxNonce  = 64
)

// Scope narrows a grant. An empty list means any.
type Scope struct {
	Operations []string `json:"operations,omitempty"` // names of templates
	Services   []string `json:"services,omitempty"`
}

// Grant lets the vendor do the acts of one phase.
type Grant struct {
	Appliance fleet.ApplianceID `json:"appliance"`
	Phase     fleet.Phase       `json:"phase"`
	Scope     Scope             `json:"scope"`
	From      time.Time         `json:"from"`
	Until     time.Time         `json:"until,omitzero"` // exclusive; only observe may be without an end
	Uses      Count             `json:"uses,omitzero"`  // left out: any number
	Nonce     string            `json:"nonce"`
}

// Count is how many times a grant may be used. The zero value is no limit, and a document says that by leaving the
// field out: a document that says 0 is refused when it is read, because its author can only have meant "never".
type Count int

// MaxCount is the largest number of uses that a grant can name.
const MaxCount = 1_000_000

// UnmarshalJSON takes a whole number from 1 to [MaxCount].
func (c *Count) UnmarshalJSON(b []byte) error {
	n, err := strconv.ParseUint(string(b), 10, 32)
	if err != nil || n < 1 || n > MaxCount {
		return fault.New("grant.Count", fault.Invalid, "uses: write a whole number from 1 to %d, or leave it out for any number", MaxCount)
	}
	*c = Count(n)
	return nil
}

// Revoke ends one grant, all grants of a phase, or all. Exactly one of the three is set.
type Revoke struct {
	Appliance fleet.ApplianceID `json:"appliance"`
	Grant     string            `json:"grant,omitempty"`
	Phase     fleet.Phase       `json:"phase,omitempty"`
	All       bool              `json:"all,omitempty"`
	At        time.Time         `json:"at"`
	Nonce     string            `json:"nonce"`
}

// Deny forbids, whatever is granted.
type Deny struct {
	Appliance fleet.ApplianceID `json:"appliance"`
	Name      string            `json:"name"`
	Cedar     string            `json:"cedar"`
	At        time.Time         `json:"at"`
	Nonce     string            `json:"nonce"`
}

// Lift takes back a deny.
type Lift struct {
	Appliance fleet.ApplianceID `json:"appliance"`
	Deny      string            `json:"deny"` // id of the deny, not its name
	At        time.Time         `json:"at"`
	Nonce     string            `json:"nonce"`
}

// PayloadType names the document.
func (Grant) PayloadType() string { return "application/vnd.demarc.grant+json;v=1" }

// PayloadType names the document.
func (Revoke) PayloadType() string { return "application/vnd.demarc.revoke+json;v=1" }

// PayloadType names the document.
func (Deny) PayloadType() string { return "application/vnd.demarc.deny+json;v=1" }

// PayloadType names the document.
func (Lift) PayloadType() string { return "application/vnd.demarc.lift+json;v=1" }

func checkCommon(op string, a fleet.ApplianceID, nonce string) error {
	if err := fleet.CheckName("appliance", string(a)); err != nil {
		return err
	}
	bad := strings.IndexFunc(nonce, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_')
	}) >= 0
	if bad || len(nonce) < minNonce || len(nonce) > maxNonce {
		return fault.New(op, fault.Invalid, "nonce: draw %d to %d characters of A-Z a-z 0-9 - _", minNonce, maxNonce)
	}
	return nil
}

// Check tells the first thing that is wrong with the grant by itself.
func (g Grant) Check() error {
	const op = "grant.Grant"
	if err := checkCommon(op, g.Appliance, g.Nonce); err != nil {
		return err
	}
	if err := g.Phase.Check(); err != nil {
		return err
	}
	for _, part := range []struct {
		field string
		names []string
	}{{"operation", g.Scope.Operations}, {"service", g.Scope.Services}} { // in this order: the book's answers are replayed
		if len(part.names) > maxScope {
			return fault.New(op, fault.Invalid, "scope: at most %d names of a kind", maxScope)
		}
		for _, n := range part.names {
			if err := fleet.CheckName(part.field, n); err != nil {
				return err
			}
		}
	}
	operate := g.Phase == fleet.OperateRead || g.Phase == fleet.OperateWrite || g.Phase == fleet.OperateAdmin
	switch {
	case !operate && (len(g.Scope.Operations) > 0 || len(g.Scope.Services) > 0):
		return fault.New(op, fault.Invalid, "scope: only the phases operate.* have operations and services, %s has none", g.Phase)
	case g.From.IsZero():
		return fault.New(op, fault.Invalid, "from: is missing")
	case g.Until.IsZero() && !g.plainObserve():
		return fault.New(op, fault.Invalid, "until: is missing: a grant ends, at most %s after it begins", days(fleet.MaxConsent))
	case !g.Until.IsZero() && !g.Until.After(g.From):
		return fault.New(op, fault.Invalid, "until: must be later than from")
	case !g.Until.IsZero() && g.Until.Sub(g.From) > fleet.MaxConsent+fleet.MaxSkew:
		return fault.New(op, fault.Invalid, "until: at most %s after from: grant it again when that is over", days(fleet.MaxConsent))
	case g.Uses < 0 || g.Uses > MaxCount:
		return fault.New(op, fault.Invalid, "uses: 1 to %d, or left out for any number", MaxCount)
	}
	return nil
}

func days(d time.Duration) string { return strconv.Itoa(int(d/(24*time.Hour))) + " days" }

// Check tells the first thing that is wrong with the revocation by itself.
func (r Revoke) Check() error {
	const op = "grant.Revoke"
	if err := checkCommon(op, r.Appliance, r.Nonce); err != nil {
		return err
	}
	set := 0
	for _, is := range []bool{r.Grant != "", r.Phase != "", r.All} {
		if is {
			set++
		}
	}
	if set != 1 {
		return fault.New(op, fault.Invalid, "name one grant, one phase, or all")
	}
	if r.Phase != "" {
		if err := r.Phase.Check(); err != nil {
			return err
		}
	}
	if len(r.Grant) > 128 || r.At.IsZero() {
		return fault.New(op, fault.Invalid, "grant: at most 128 bytes; at: must be there")
	}
	return nil
}

// Check tells the first thing that is wrong with the deny by itself; an error in the Cedar text carries its place.
func (d Deny) Check() error {
	const op = "grant.Deny"
	if err := checkCommon(op, d.Appliance, d.Nonce); err != nil {
		return err
	}
	if err := fleet.CheckName("deny", d.Name); err != nil {
		return err
	}
	if d.Name == ObserveDefault {
		return fault.New(op, fault.Invalid, "name: %s is taken by the built-in set, choose another", ObserveDefault)
	}
	if d.At.IsZero() {
		return fault.New(op, fault.Invalid, "at: is missing")
	}
	return checkCedar(d.Cedar)
}

// Check tells the first thing that is wrong with the document by itself.
func (l Lift) Check() error {
	const op = "grant.Lift"
	if err := checkCommon(op, l.Appliance, l.Nonce); err != nil {
		return err
	}
	if l.Deny == "" || len(l.Deny) > 128 || l.At.IsZero() {
		return fault.New(op, fault.Invalid, "deny: the id of one, at most 128 bytes; at: must be there")
	}
	return nil
}

// Held is a grant in the customer's book.
type Held struct {
	ID        string       `json:"id"` // seal.Identity of the document
	Grant     Grant        `json:"grant"`
	Used      int          `json:"used,omitempty"`
	Since     time.Time    `json:"since"`
	RevokedAt time.Time    `json:"revoked_at,omitzero"`
	By        []seal.KeyID `json:"by"`
}

// Denied is a deny in the customer's book.
type Denied struct {
	ID    string       `json:"id"`
	Name  string       `json:"name"`
	Cedar string       `json:"cedar"`
	At    time.Time    `json:"at,omitzero"` // that the document bears
	Since time.Time    `json:"since"`
	By    []seal.KeyID `json:"by"`
}

// Gone is a document that ended, and must not come back.
type Gone struct {
	ID string    `json:"id"`
	At time.Time `json:"at"` // a grant's from, a deny's at
}
