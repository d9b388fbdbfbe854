// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"slices"
	"time"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
)

// maxFailures bounds what is reported: as many as a vendor takes.
const maxFailures = 32

// failureDelay is how long a road must have failed before the vendor is told of what may pass by itself. What needs a human is told at
// once.
const failureDelay = time.Minute

// transportHealth remembers since when roads fail. It belongs to the goroutine that observes.
type transportHealth struct {
	since map[string]time.Time // by name
}

// failures returns the troubles that the vendor is to know, without doubles, in the order of the list. A road that is not tried keeps the
// outcome of the last time.
func (s *transportHealth) failures(roads []configs.Transport, last func(string) error, now time.Time) []book.TransportFailure {
	if s.since == nil {
		s.since = map[string]time.Time{}
	}
	var out []book.TransportFailure
	for _, t := range roads {
		reason := mesh.ReasonOf(last(t.Name))
		if reason == "" {
			delete(s.since, t.Name)
			continue
		}
		if _, ill := s.since[t.Name]; !ill {
			s.since[t.Name] = now
		}
		tr := book.TransportFailure{Kind: t.Kind, Reason: reason}
		if (reason.NeedsHuman() || now.Sub(s.since[t.Name]) >= failureDelay) && !slices.Contains(out, tr) && len(out) < maxFailures {
			out = append(out, tr)
		}
	}
	return out
}

// transportStatus tells the customer of a road.
func transportStatus(name, kind string, inUse bool, err error) *localv1.Road {
	w := &localv1.Road{Name: name, Kind: kind, InUse: inUse}
	if r := mesh.ReasonOf(err); r != "" && (!inUse || r == mesh.HelloTooLarge) { // a road may be in use and still be in trouble
		_, w.Do = r.Sentence()
		w.Reason, w.Said = string(r), clipSentence(fault.Text(err))
	}
	return w
}
