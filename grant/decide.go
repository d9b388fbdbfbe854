// SPDX-License-Identifier: Apache-2.0

package grant

import (
	"fmt"
	"slices"
	"strings"
	"time"

	cedar "github.com/cedar-policy/cedar-go"

	"github.com/demarc-dev/demarc/fleet"
)

// Effects that no phase lifts: an act that declares one of them is refused by the built-in set.
const (
	DeletePersistentData = "delete_persistent_data"
	ReadSecretValues     = "read_secret_values"
	LeaveScope           = "leave_scope"
	ChangeAuditLog       = "change_audit_log"
	ChangeConsent        = "change_consent"
)

func builtins() []string {
	return []string{DeletePersistentData, ReadSecretValues, LeaveScope, ChangeAuditLog, ChangeConsent}
}

// ObserveDefault is the name under which a decision cites the one thing that is allowed without a grant.
const ObserveDefault = "observe-by-default"

// Input is one act, now.
type Input struct {
	Appliance fleet.ApplianceID
	Phase     fleet.Phase
	Who       fleet.Principal // "" for the vendor as such
	Operation string          // name of the template, "" where there is none
	Service   string
	Effects   []string // that the act declares
	Now       time.Time
	Limit     time.Duration // that the act may take: no grant that ends sooner allows it
}

// Decision is the answer, with its reasons.
type Decision struct {
	Allow    bool
	Phase    fleet.Phase
	Grant    string    // id of the grant whose use is to be counted, "" where none is
	By       []string  // ids of grants, names of denies, names of the built-in set
	Why      string    // one sentence for people
	Until    time.Time // end of the grant, zero for none; from Access: when the vendor can do nothing of the phase any more
	UsesLeft int       // -1 for any number; from Access: of all grants that are in force now
	Reach    []Reach   // from Access only: what is granted, by scope, now and later
}

// Reach is a stretch of time in which a scope is granted without a gap.
type Reach struct {
	Scope    Scope
	From     time.Time
	Until    time.Time // zero: no end
	UsesLeft int       // in this stretch: -1 for any number
	Grants   []string  // ids of those that it is made of
}

// law is the policies that decide the acts of one phase at one moment.
type law struct {
	state  State
	phase  fleet.Phase
	now    time.Time
	set    *cedar.PolicySet
	names  map[cedar.PolicyID]string // what By calls them
	unread string                    // the first policy that can't be read, "" for none
}

// law compiles what the customer decided: forbids for the built-in set and the denies, permits for the grants.
func (s State) law(p fleet.Phase, now time.Time) law {
	l := law{state: s, phase: p, now: now, set: cedar.NewPolicySet(), names: map[cedar.PolicyID]string{}}
	for _, e := range builtins() {
		l.add("builtin:"+e, "builtin:"+e, builtin(e))
	}
	for _, d := range s.Denies {
		l.add("deny:"+d.ID, d.Name, d.Cedar)
	}
	if !s.ObserveOff {
		l.add(ObserveDefault, ObserveDefault, observe)
	}
	for _, h := range s.Held {
		if h.Grant.Phase == p && h.stale(now) == "" {
			l.add("grant:"+h.ID, h.ID, h.Grant.policy())
		}
	}
	return l
}

func (l *law) add(id, name, text string) {
	list, err := cedar.NewPolicyListFromBytes("", []byte(text))
	if err != nil && l.unread == "" {
		l.unread = name
	}
	for i, p := range list {
		pid := cedar.PolicyID(fmt.Sprintf("%s#%d", id, i))
		l.names[pid] = name
		l.set.Add(pid, p)
	}
}

// Decide says whether an act may be done now. It is pure: the same input and state give the same decision.
func Decide(in Input, s State) Decision { return s.law(in.Phase, in.Now).decide(in) }

func (l law) decide(in Input) Decision {
	out := Decision{Phase: in.Phase, UsesLeft: -1}
	if err := in.Phase.Check(); err != nil {
		out.Why = "no such phase"
		return out
	}
	if l.unread != "" {
		out.By = []string{l.unread}
		out.Why = fmt.Sprintf("the policy %s in the book can't be read: nothing is allowed until it is lifted", l.unread)
		return out
	}
	req, entities := in.request()
	verdict, diag := cedar.Authorize(l.set, entities, req)
	if len(diag.Errors) > 0 { // Cedar skips a policy that fails: a forbid that is skipped would be a hole
		for _, e := range diag.Errors {
			out.By = append(out.By, l.names[e.PolicyID])
		}
		out.By = unique(out.By)
		out.Why = fmt.Sprintf("the policy %s can't be evaluated for this act: what can't be judged is denied; lift it and write it anew",
			strings.Join(out.By, ", "))
		return out
	}
	for _, r := range diag.Reasons {
		out.By = append(out.By, l.names[r.PolicyID])
	}
	out.By = unique(out.By)
	if verdict != cedar.Allow {
		out.Why = l.state.whyNot(in, out.By)
		return out
	}
	out.Allow = true
	return l.state.choose(in, out)
}

// choose picks the grant that the act is counted on: one without a limit of uses first, then the one that ends first.
// What is allowed by default is counted on none.
func (s State) choose(in Input, out Decision) Decision {
	var best *Held
	var last time.Time // end of the last grant that ends too soon
	for i, h := range s.Held {
		switch {
		case !slices.Contains(out.By, h.ID):
		case !h.Grant.Until.IsZero() && h.Grant.Until.Before(in.Now.Add(in.Limit)):
			last = later(last, h.Grant.Until)
		case best == nil || h.before(*best):
			best = &s.Held[i]
		}
	}
	byDefault := slices.Contains(out.By, ObserveDefault)
	if best == nil && !byDefault && !last.IsZero() {
		out.Allow = false
		out.Why = fmt.Sprintf("it may take %s, and %s is granted for %s more, until %s: what would outlast its grant is not begun (the "+
			"customer can: demarc local grant %s --for TIME)",
			in.Limit, in.Phase, last.Sub(in.Now).Round(time.Second), last.UTC().Format(time.RFC3339), in.Phase)
		return out
	}
	if best == nil || byDefault {
		out.Why = "observing is allowed by default; the customer can switch it off (demarc local revoke observe)"
		return out
	}
	g := best.Grant
	out.Grant, out.Until = best.ID, g.Until
	out.UsesLeft = best.left()
	out.Why = fmt.Sprintf("the customer granted %s on %s", in.Phase, best.Since.UTC().Format(time.RFC3339))
	return out
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// before orders grants by which is used up first: those without limit cost nothing.
func (h Held) before(o Held) bool {
	if free, other := h.Grant.Uses == 0, o.Grant.Uses == 0; free != other {
		return free
	}
	if h.Grant.Until.Equal(o.Grant.Until) {
		return h.ID < o.ID
	}
	if h.Grant.Until.IsZero() || o.Grant.Until.IsZero() {
		return o.Grant.Until.IsZero()
	}
	return h.Grant.Until.Before(o.Grant.Until)
}

// whyNot makes the sentence of a refusal: the deny that forbade it, or what became of the grant that comes nearest.
func (s State) whyNot(in Input, by []string) string {
	if len(by) > 0 {
		return fmt.Sprintf("forbidden by %s, which wins over every grant", strings.Join(by, ", "))
	}
	why := ""
	for _, h := range s.Held {
		if h.Grant.Phase != in.Phase || h.Grant.Appliance != in.Appliance {
			continue
		}
		if stale := h.stale(in.Now); stale != "" {
			why = stale
		} else if len(h.Grant.Scope.Operations)+len(h.Grant.Scope.Services) > 0 {
			why = "the grant's scope does not reach it"
		}
	}
	if in.Phase == fleet.Observe && s.ObserveOff {
		why = "the customer switched observing off"
	}
	if why == "" {
		why = "the customer has not granted it"
	}
	return fmt.Sprintf("%s is not allowed: %s (the customer can: demarc local grant %s)", in.Phase, why, in.Phase)
}

// policy is the grant in Cedar. Its window and its uses are checked before it is asked; it is bound to them again here,
// so that the text that `demarc local access explain` shows is the whole truth but for the uses.
func (g Grant) policy() string {
	var b strings.Builder
	fmt.Fprintf(&b, "permit (principal, action == Action::%q, resource in Appliance::%q)\nwhen { context.now >= %d", string(g.Phase),
		string(g.Appliance), g.From.UnixMilli())
	if !g.Until.IsZero() {
		fmt.Fprintf(&b, " && context.now < %d", g.Until.UnixMilli())
	}
	for _, part := range []struct {
		field string
		names []string
	}{{"operation", g.Scope.Operations}, {"service", g.Scope.Services}} {
		if len(part.names) == 0 {
			continue
		}
		quoted := make([]string, len(part.names))
		for i, n := range part.names {
			quoted[i] = fmt.Sprintf("%q", n)
		}
		fmt.Fprintf(&b, " && [%s].contains(context.%s)", strings.Join(quoted, ", "), part.field)
	}
	b.WriteString(" };")
	return b.String()
}

// observe is the one permit that no document gave.
const observe = `permit (principal, action == Action::"observe", resource);`

func builtin(effect string) string {
	return fmt.Sprintf("forbid (principal, action, resource)\nwhen { context.effects.contains(%q) };", effect)
}

// request spells the act in Cedar.
func (in Input) request() (cedar.Request, cedar.EntityMap) {
	who := string(in.Who)
	if who == "" {
		who = "vendor"
	}
	uid := func(kind, id string) cedar.EntityUID {
		return cedar.NewEntityUID(cedar.EntityType(kind), cedar.String(id))
	}
	entities := cedar.EntityMap{}
	put := func(id cedar.EntityUID, parents ...cedar.EntityUID) cedar.EntityUID {
		entities[id] = cedar.Entity{UID: id, Parents: cedar.NewEntityUIDSet(parents...)}
		return id
	}
	principal := put(uid("Vendor", who))
	action := uid("Action", string(in.Phase))
	if strings.HasPrefix(string(in.Phase), "operate.") {
		put(action, put(uid("Action", "operate")))
	} else {
		put(action)
	}
	resource := put(uid("Appliance", string(in.Appliance)))
	parents := []cedar.EntityUID{resource}
	if in.Service != "" {
		resource = put(uid("Service", in.Service), parents...)
		parents = append(parents, resource)
	}
	if in.Operation != "" {
		resource = put(uid("Operation", in.Operation), parents...)
	}
	effects := make([]cedar.Value, 0, len(in.Effects))
	for _, e := range in.Effects {
		effects = append(effects, cedar.String(e))
	}
	return cedar.Request{Principal: principal, Action: action, Resource: resource, Context: cedar.NewRecord(cedar.RecordMap{
		"now": cedar.Long(in.Now.UnixMilli()), "operation": cedar.String(in.Operation), "service": cedar.String(in.Service),
		"effects": cedar.NewSet(effects...),
	})}, entities
}

func unique(s []string) []string {
	slices.Sort(s)
	return slices.Compact(s)
}
