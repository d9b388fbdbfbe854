// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"github.com/demarc-dev/demarc/telemetry"
)

// Meter takes the measurements of the doors. A field that is nil takes none.
type Meter struct {
	Admission telemetry.Observer // seconds that a connection waited for its handshake to begin
	Handshake telemetry.Observer // seconds of a handshake that succeeded
	Arrival   telemetry.Observer // seconds after the door's opening at which a channel came up
	Rejected  telemetry.Counter  // connections that were closed before their handshake began
	Displaced telemetry.Counter  // connections for calls, and channels without hello, that gave way to newer ones
	Crowded   telemetry.Counter  // connections for calls that were refused: their holder has too many in use
}

// orNone fills what is nil with what takes nothing.
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

// noMeter takes measurements and keeps none.
type noMeter struct{}

// Observe implements [telemetry.Observer].
func (noMeter) Observe(float64) {}

// Inc implements [telemetry.Counter].
func (noMeter) Inc() {}

// Add implements [telemetry.Counter].
func (noMeter) Add(float64) {}
