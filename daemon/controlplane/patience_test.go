// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/api/channel"
)

// TestOneLookForMany: channels that came one by one are looked at together, never before their silence ends them and hardly
// later. One that is gone is not kept for the look at it.
func TestOneLookForMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &Server{patience: newPatience()}
		p, wait := s.patience, channel.Patience(channel.MaxQuiet)
		var all []*live
		for range 1000 {
			time.Sleep(wait / 1000)
			l := &live{s: s, beat: channel.MaxQuiet}
			l.heard.Store(int64(p.now()))
			p.keep(l)
			all = append(all, l)
		}
		at := map[time.Duration]bool{}
		for _, l := range all {
			at[l.look] = true
			if late := l.look - l.due(); late < 0 || late > wait/coarse {
				t.Fatalf("a channel is looked at %s after its silence could end it", late)
			}
		}
		if len(at) > 2*coarse+1 {
			t.Errorf("1000 channels need %d looks", len(at))
		}
		one := all[500]
		one.expect()
		if late := one.look - p.now() - channel.Answer; late < 0 || late > channel.Answer/coarse {
			t.Errorf("one that waits for an answer is looked at %s after it could have come", late)
		}
		for _, l := range all {
			p.forget(l)
		}
		if len(p.looks) != 0 {
			t.Errorf("%d channels are kept", len(p.looks))
		}
		time.Sleep(2 * wait) // the timer finds nobody, and ends nobody
		synctest.Wait()
		if p.next != 0 {
			t.Error("the timer is set for nobody")
		}
	})
}
