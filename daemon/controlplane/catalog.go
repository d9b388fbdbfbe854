// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"slices"
	"sync"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/seal"
)

// catalog is which artifacts the releases of a book name. It reads each release once.
type catalog struct {
	mu   sync.Mutex
	at   book.Version
	read map[fleet.Digest]uint64 // number of each release
	by   map[fleet.Digest][]uint64
}

// of tells, for each artifact, the numbers of the releases that name it. The caller does not modify it.
func (c *catalog) of(page book.State) map[fleet.Digest][]uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at == page.ReleasesVersion() {
		return c.by
	}
	fresh := c.at == (book.Version{}) || page.ReleaseCount() < len(c.read) // a book that was restored begins anew
	if !fresh {
		for known, number := range c.read {
			if r, ok := page.Release(known); !ok || r.Number != number {
				fresh = true
				break
			}
		}
	}
	if fresh {
		c.read, c.by = map[fleet.Digest]uint64{}, map[fleet.Digest][]uint64{}
	}
	by := make(map[fleet.Digest][]uint64, len(c.by)+4) // who has the old one goes on with it
	for d, n := range c.by {
		by[d] = n
	}
	for d, r := range page.Releases() {
		if _, done := c.read[d]; done {
			continue
		}
		c.read[d] = r.Number
		for _, x := range artifactsOf(r.Sealed) {
			by[x] = append(slices.Clip(by[x]), r.Number)
		}
	}
	c.at, c.by = page.ReleasesVersion(), by
	return by
}

// artifactsOf lists the artifacts that a sealed release names; none of what can't be read.
func artifactsOf(sealed []byte) (out []fleet.Digest) {
	rel, err := seal.Peek[manifest.Release](sealed)
	if err != nil {
		return nil
	}
	for _, d := range rel.Artifacts {
		if d.Check() == nil && !slices.Contains(out, d) {
			out = append(out, d)
		}
	}
	return out
}

// offers reports whether a release that was offered to an appliance names an artifact.
func (d *depot) offers(page book.State, name fleet.ApplianceID, x fleet.Digest) bool {
	a, err := page.Appliance(name)
	return err == nil && slices.ContainsFunc(d.named.of(page)[x], a.Offered.Has)
}

// offered refuses an appliance an artifact that no release names which was offered to it. Who asks it is told the same, whether
// there is such an artifact or not.
func (s *Server) offered(who api.Who, x fleet.Digest) error {
	_, _, id, _ := who.Principal.Split()
	if s.depot.offers(s.replica.View(), fleet.ApplianceID(id), x) {
		return nil
	}
	return fault.New("controlplane.Artifact", fault.NotFound, "no release that was offered to appliance %q names the artifact %s", fault.Clip(id), x.Short())
}
