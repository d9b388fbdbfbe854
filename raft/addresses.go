// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"slices"
	"sync"

	hraft "github.com/hashicorp/raft"
)

// addresses are those of the members, and which of them were removed. It follows the configuration in the log.
type addresses struct {
	mu     sync.Mutex
	listed map[string]string // by the list of the config
	hints  map[string]string // as the member itself advertised
	logged map[string]string // by the newest configuration
	at     uint64            // index of the newest committed configuration of which this node knows the index
	gone   map[string]bool   // were in an earlier configuration, since this process started, and are not in the newest
}

func newAddresses(first []Member) *addresses {
	a := &addresses{listed: map[string]string{}, hints: map[string]string{}, logged: map[string]string{}, gone: map[string]bool{}}
	for _, f := range first {
		a.listed[f.ID] = f.Addr
	}
	return a
}

// index is that of the newest committed configuration; 0 if it is not known.
func (a *addresses) index() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.at
}

// committed notes the index of a configuration.
func (a *addresses) committed(index uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.at = max(a.at, index)
}

// advertised notes the address that a member sent of itself.
func (a *addresses) advertised(id, addr string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, listed := a.listed[id]
	if _, logged := a.logged[id]; listed || logged {
		a.hints[id] = addr
	}
}

// removed reports whether a node was a member and is none any more.
func (a *addresses) removed(id string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.gone[id]
}

// follow takes the newest configuration, and returns the members that are not in it any more.
func (a *addresses) follow(all []hraft.Server) (left []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	logged := map[string]string{}
	for _, s := range all {
		logged[string(s.ID)] = string(s.Address)
		delete(a.gone, string(s.ID))
	}
	for id := range a.logged {
		if _, is := logged[id]; !is {
			a.gone[id] = true
			delete(a.hints, id)
			left = append(left, id)
		}
	}
	a.logged = logged
	return left
}

// of lists the addresses at which a member may be, the likeliest first.
func (a *addresses) of(id string) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []string
	for _, addr := range []string{a.hints[id], a.logged[id], a.listed[id]} {
		if addr != "" && !slices.Contains(out, addr) {
			out = append(out, addr)
		}
	}
	return out
}
