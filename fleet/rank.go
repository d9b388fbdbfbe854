// SPDX-License-Identifier: Apache-2.0

package fleet

import (
	"slices"

	"github.com/demarc-dev/demarc/fault"
)

// Rank is how much an operator of the vendor may do at the vendor's own control plane; people call it the operator's role.
// Each rank may do all that the ones below it may. What the customer's appliance allows is not its business.
type Rank string

// The closed set of ranks.
const (
	Viewer   Rank = "viewer"   // reads what the vendor may know
	Deployer Rank = "deployer" // publishes and offers releases
	Operate  Rank = "operator" // registers and bans appliances, requests operations
	Admin    Rank = "admin"    // operators, CAs, keys, members
)

// Ranks lists every rank, from the least to the most.
func Ranks() []Rank { return []Rank{Viewer, Deployer, Operate, Admin} }

// Check tells whether r is in the closed set.
func (r Rank) Check() error {
	if slices.Contains(Ranks(), r) {
		return nil
	}
	return fault.New("fleet.Rank", fault.Invalid, "%q is no role of an operator: use viewer, deployer, operator or admin",
		fault.Clip(string(r)))
}

// Covers reports whether r may do what least is needed for. A rank outside of the set covers nothing, and nothing covers it.
func (r Rank) Covers(least Rank) bool {
	have, need := slices.Index(Ranks(), r), slices.Index(Ranks(), least)
	return need >= 0 && have >= need
}
