// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"net"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/api/channel"
)

// TestRoadsThatBearNoSilenceAreLearned: a road through what no host sees gets frequent beats again after its second channel broke off
// in silence, and one that bore a silence is trusted anew.
func TestRoadsThatBearNoSilenceAreLearned(t *testing.T) {
	var h idleTolerance
	mine, theirs := net.Pipe()
	defer mine.Close()
	defer theirs.Close()
	straight, long := &net.TCPConn{}, channel.KnownQuiet+time.Second
	for _, step := range []struct {
		what string
		do   func()
		want time.Duration
	}{
		{"at first", func() {}, channel.MaxQuiet},
		{"broken off at once", func() { h.dropped("https", time.Second) }, channel.MaxQuiet},
		{"broken off in silence", func() { h.dropped("https", long) }, channel.MaxQuiet},
		{"heard at once", func() { h.lasted("https", time.Second) }, channel.MaxQuiet},
		{"broken off in silence again", func() { h.dropped("https", long) }, channel.KnownQuiet},
		{"another road", func() { h.lasted("privatelink", long) }, channel.KnownQuiet},
		{"bore a silence", func() { h.lasted("https", long) }, channel.MaxQuiet},
		{"broken off after that", func() { h.dropped("https", long) }, channel.MaxQuiet},
	} {
		step.do()
		if got := h.tolerated("https", straight); got != step.want {
			t.Fatalf("%s: want %s, got %s", step.what, step.want, got)
		}
		if got := h.tolerated("https", theirs); got != channel.KnownQuiet {
			t.Fatalf("%s: what is not TCP of the kernel is held to bear %s", step.what, got)
		}
	}
}
