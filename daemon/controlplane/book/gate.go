// SPDX-License-Identifier: Apache-2.0

package book

import (
	"bytes"
	"encoding/json"
	"slices"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/ledger"
)

var stampPrefix = []byte(`"meta":{"at":"`)

// atOf finds the stamp of a proposal, which is nearly always right after its kind.
func atOf(data []byte) (time.Time, error) {
	if rest, ok := bytes.CutPrefix(data, kindPrefix); ok {
		if _, rest, ok = bytes.Cut(rest, []byte(`",`)); ok {
			if rest, ok = bytes.CutPrefix(rest, stampPrefix); ok {
				if i := bytes.IndexByte(rest, '"'); i >= 0 {
					if at, err := time.Parse(time.RFC3339Nano, string(rest[:i])); err == nil {
						return at, nil
					}
				}
			}
		}
	}
	var in struct {
		Meta struct {
			At time.Time `json:"at"`
		} `json:"meta"`
	}
	if err := json.Unmarshal(data, &in); err != nil {
		return time.Time{}, fault.At("controlplane.atOf", fault.Invalid, err)
	}
	return in.Meta.At, nil
}

// firstKinds are the changes of the first release, which every build knows. A later kind is not added here: it is accepted once each
// voter reports that it knows it.
var firstKinds = []string{"genesis/1", "customer.register/1", "appliance.register/1", "appliance.enrol/1", "refused/1", "appliance.renew/1",
	"appliance.edge/1", "appliance.ban/1", "release.publish/1", "probe.send/1", "checkpoint.send/1", "operation.request/1", "orders.done/1",
	"report/1", "appliance.enrol/2", "appliance.keys/1", "appliance.expect/1", "ca.prepare/1", "ca.activate/1", "ca.retire/1",
	"appliance.renew/2", "appliance.bundle/1", "node.bundle/1",
	"genesis/2", "operator.adopt/1", "operator.invite/1", "operator.enrol/1", "operator.renew/1", "operator.use/1", "operator.role/1",
	"operator.ban/1",
	"operator.remove/1", "secrets.keep/1", "kek.holds/1", "kek.rotate/1", "ca.prepare/2", "node.stops/1", "node.roll/1",
	"appliance.keys/2", "appliance.keys.confirm/1", "appliance.keys.forget/1",
	"node.add/1", "node.is/1", "node.remove/1", "node.changed/1", "autopilot.set/1"}

// Facts is what a node reports to the leader about itself.
type Facts struct {
	Build string   `json:"build"`
	Knows []string `json:"knows"`
	Lacks *int64   `json:"artifacts_missing,omitempty"` // artifacts that releases name and it does not have; nil if not known
}

// Voting is the voters of the cluster, and what each reported about itself to this node while it leads.
type Voting interface {
	Voters() []string
	About(id string) []byte
	// Judge refuses a stamp that is too far from the clocks of the voters.
	Judge(stamp time.Time) error
}

// Gate is the version gate: the vendor's book as the state machine of a cluster whose members may run different builds. A change is
// accepted into the log only if each voter knows its kind, because one that does not would stop, and only if its stamp agrees with the
// clocks of a majority of the voters, because the book takes its time from the stamps.
type Gate struct {
	*ledger.Book[State]
	Cluster func() Voting // nil while there is none
}

var kindPrefix = []byte(`{"kind":"`)

// kindOf finds the kind of a proposal, which is nearly always at its beginning.
func kindOf(data []byte) (string, error) {
	if rest, ok := bytes.CutPrefix(data, kindPrefix); ok {
		if i := bytes.IndexAny(rest, `"\`); i >= 0 && rest[i] == '"' {
			return string(rest[:i]), nil
		}
	}
	var in struct {
		Kind string `json:"kind"`
	}
	if err := json.Unmarshal(data, &in); err != nil {
		return "", fault.At("controlplane.kindOf", fault.Invalid, err)
	}
	return in.Kind, nil
}

// FirstKinds lists the changes that every build knows.
func FirstKinds() []string { return slices.Clone(firstKinds) }

// DryRun implements raft.Machine. A refused change is not checked further, since it will not be in the log.
func (g Gate) DryRun(data []byte) error {
	if err := g.stamped(data); err != nil {
		return err
	}
	if err := g.Foresee(data); err != nil {
		return err
	}
	return g.Book.DryRun(data)
}

// Foresee refuses a change that some voter does not know; the error names the change and the voter. A node also calls it before it
// forwards a change: a leader of an older build would report the change as malformed.
func (g Gate) Foresee(data []byte) error {
	kind, err := kindOf(data)
	if err != nil || !g.Knows(kind) || slices.Contains(firstKinds, kind) {
		return nil // whether it is well-formed is checked in the dry run
	}
	return g.known(kind)
}

func (g Gate) known(kind string) error {
	const op = "controlplane.DryRun"
	c := g.Cluster()
	if c == nil {
		return nil
	}
	st := g.View()
	for _, id := range c.Voters() {
		var facts Facts
		b := c.About(id)
		if b != nil {
			if err := json.Unmarshal(b, &facts); err != nil {
				b = nil
			}
		}
		p, _ := st.Peer(id)
		if b == nil { // no status of it: what it last recorded counts
			facts = Facts{Build: p.Build, Knows: p.Knows}
		}
		switch {
		case slices.Contains(facts.Knows, kind):
		case facts.Knows == nil:
			return fault.New(op, fault.Unavailable, "it is not known whether node %q knows the change %q: it is out of reach or runs an "+
				"older build, so bring it back, upgrade it, or remove it", id, kind)
		default:
			return fault.New(op, fault.Unavailable,
				"node %q does not know the change %q: upgrade it first, it runs the build %q", id, kind, fault.Clip(facts.Build))
		}
	}
	return nil
}

// stamped refuses a proposal whose stamp is off.
func (g Gate) stamped(data []byte) error {
	c := g.Cluster()
	if c == nil {
		return nil
	}
	at, err := atOf(data)
	if err != nil {
		return err
	}
	return c.Judge(at)
}
