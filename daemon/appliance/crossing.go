// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"slices"

	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fleet"
)

// names are what the vendor's own manifests call things: those of the release that runs, and of the one that was approved.
type names struct{ services, secrets []string }

func (a *Appliance) names(st book.State) (n names) {
	for _, d := range []fleet.Digest{st.Good.Release, st.Approved.Release} {
		if d == "" {
			continue
		}
		plan, _, _, err := a.plans.Plan(st, d)
		if err != nil {
			continue // of that one nothing runs
		}
		for _, x := range plan.Services {
			n.services = append(n.services, x.Name)
		}
		for _, x := range plan.Secrets {
			n.secrets = append(n.secrets, x.Name)
		}
	}
	return n
}

// reason returns a reason with nothing but words of the closed sets and names of the vendor's own.
func (n names) reason(r fleet.Reason) fleet.Reason {
	if !slices.Contains(n.services, r.Service) {
		r.Service = ""
	}
	if !slices.Contains(n.secrets, r.Secret) {
		r.Secret = ""
	}
	return r.Clipped()
}

// forVendor is what of a status the vendor may know: of a service or a secret that no manifest of the vendor's has, nothing.
func (n names) forVendor(in book.Status) book.Status {
	out := in
	out.Services, out.Secrets = nil, nil
	for _, h := range in.Services {
		if slices.Contains(n.services, h.Name) {
			h.Why = n.reason(h.Why)
			out.Services = append(out.Services, h)
		}
	}
	for _, p := range in.Secrets {
		if slices.Contains(n.secrets, p.Name) {
			out.Secrets = append(out.Secrets, p)
		}
	}
	return out
}
