// SPDX-License-Identifier: Apache-2.0

package book

import (
	"reflect"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

const releases = "who signs the vendor's releases"

// owned is a key of the vendor, and its owner.
type owned struct {
	key seal.Key
	who string // releases, or the name of an operator
}

// owned lists the vendor's keys that the customer's file names.
func (s Site) owned() ([]owned, error) {
	var out []owned
	add := func(pem [][]byte, who string) error {
		keys, err := keysOf(pem)
		for _, k := range keys {
			out = append(out, owned{k, who})
		}
		return err
	}
	if err := add(s.ReleaseKeys, releases); err != nil {
		return nil, err
	}
	for _, o := range s.Operators {
		if err := add(o.Keys, o.Name); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// owner returns whom of the vendor a key speaks for, "" if it is no key of the vendor.
func (s Site) owner(id seal.KeyID) string {
	all, _ := s.owned() // they were read when they entered the book
	for _, o := range all {
		switch {
		case o.key.ID != id:
		case o.who == releases:
			return releases
		default:
			return "the vendor's operator " + o.who
		}
	}
	return ""
}

// Check returns the first error in the keys: each must be readable, and have one owner.
func (s Site) Check() error {
	const op = "appliance.Site"
	names := map[string]bool{}
	for _, o := range s.Operators {
		if err := fleet.CheckName("operator", o.Name); err != nil {
			return err
		}
		if names[o.Name] || len(o.Keys) == 0 {
			return fault.New(op, fault.Invalid, "control_plane.operators: name %s once, with at least one key", o.Name)
		}
		names[o.Name] = true
	}
	all, err := s.owned()
	if err != nil {
		return fault.At(op, "", err)
	}
	if len(all) > MaxSiteKeys {
		return fault.New(op, fault.Invalid, "the file names %d keys of the vendor, and %d are the most", len(all), MaxSiteKeys)
	}
	owner := map[seal.KeyID]string{}
	for _, o := range all {
		if other, taken := owner[o.key.ID]; taken {
			return fault.New(op, fault.Invalid,
				"key %s is named twice in control_plane, for %s and for %s: one key speaks for one, so have the vendor draw another", o.key.ID,
				other, o.who)
		}
		owner[o.key.ID] = o.who
	}
	return nil
}

// asker verifies a request, and says who asks by the word of the customer's file: the name that it gives to the key that
// signed. The name in the request must be that very principal, so that nothing rests on what the document claims.
func (s State) asker(sealed []byte) (operation.Request, fleet.Principal, error) {
	const op = "order.operation"
	if len(s.Site.Operators) == 0 {
		return operation.Request{}, "", askerUnknown.With(fault.New(op, fault.Denied,
			"the customer's file names no operator: nobody may ask for operations"))
	}
	all, err := s.Site.owned()
	if err != nil {
		return operation.Request{}, "", err
	}
	names := map[seal.KeyID]fleet.Principal{}
	var keys []seal.Key
	for _, o := range all {
		if o.who != releases {
			names[o.key.ID] = fleet.PrincipalOf(s.Site.TrustDomain, fleet.Operator, o.who)
			keys = append(keys, o.key)
		}
	}
	r, by, err := seal.Open[operation.Request](sealed, keys)
	if err != nil {
		return r, "", askerUnknown.With(fault.At(op, "", err))
	}
	for _, k := range by {
		if names[k.ID] == r.Operator {
			return r, r.Operator, nil
		}
	}
	return r, "", askerUnknown.With(fault.New(op, fault.Denied,
		"the request says that %q asks, and it is signed with the key of %s: everybody asks in their own name",
		fault.Clip(string(r.Operator)), names[by[0].ID]))
}

func sameSite(a, b Site) bool { return reflect.DeepEqual(a, b) }
