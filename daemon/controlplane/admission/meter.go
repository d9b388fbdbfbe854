// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"github.com/demarc-dev/demarc/telemetry"
)

// Meter takes the measurements of the listeners. A field that is nil takes none.
type Meter struct {
	Admission telemetry.Observer // seconds that a connection waited for its handshake to begin
	Handshake telemetry.Observer // seconds of a handshake that succeeded
	Arrival   telemetry.Observer // seconds from the start of the listener to the start of a channel
	Rejected  telemetry.Counter  // connections that were closed before their handshake began
	Displaced telemetry.Counter  // connections for calls, and channels without hello, that were closed for newer ones
	Crowded   telemetry.Counter  // connections for calls that were refused: their owner has too many in use
}

// orNone replaces nil fields by meters that discard.
func (m Meter) orNone() Meter {
	for _, o := range []*telemetry.Observer{&m.Admission, &m.Handshake, &m.Arrival} {
		if *o == nil {
			*o = noMeter{}
		}
	}
	for _, c := range []*telemetry.Counter{&m.Rejected, &m.Displaced, &m.Crowded} {
		if *c == nil {
			*c = noMeter{}
		}
	}
	return m
}

// noMeter discards measurements.
type noMeter struct{}

// Observe implements [telemetry.Observer].
func (noMeter) Observe(float64) {}

// Inc implements [telemetry.Counter].
func (noMeter) Inc() {}

// Add implements [telemetry.Counter].
func (noMeter) Add(float64) {}
