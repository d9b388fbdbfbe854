// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
)

func TestPercent(t *testing.T) {
	for _, c := range []struct {
		base uint64
		want int
	}{{0, 100}, {4 << 20, 100}, {64 << 20, 100}, {80 << 20, 80}, {128 << 20, 50}, {160 << 20, 40}, {4 << 30, 40}} {
		if got := percentFor(c.base); got != c.want {
			t.Errorf("%d MiB in use: %d%%, want %d%%", c.base>>20, got, c.want)
		}
	}
}

// TestMemory: a heap that grows is held closely, one that shrinks has its ease again, and an operator's word goes before.
func TestMemory(t *testing.T) {
	const mark = "DEMARC_TEST_MEMORY"
	if os.Getenv(mark) == "" {
		for _, set := range []struct {
			of,
			gogc string
		}{{"ours", ""}, {"theirs", "GOGC=150"}, {"theirs", "GOGC=off"}, {"ours", "GOMEMLIMIT=2GiB"}} {
			c := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestMemory$", "-test.v")
			c.Env = append(os.Environ(), mark+"="+set.of)
			if set.gogc != "" {
				c.Env = append(c.Env, set.gogc)
			}
			if out, err := c.CombinedOutput(); err != nil {
				t.Errorf("%+v: %v\n%s", set, err, out)
			}
		}
		return
	}
	before := percent()
	Memory()
	Memory() // does nothing
	if os.Getenv(mark) == "theirs" {
		held := make([]byte, 200<<20)
		settle(t, func() bool { return true })
		if now := percent(); now != before {
			t.Fatalf("the operator said %d, and it is %d", before, now)
		}
		runtime.KeepAlive(held)
		return
	}
	limit := debug.SetMemoryLimit(-1)
	held := make([]byte, 200<<20)
	settle(t, func() bool { return percent() == slackPercent })
	runtime.KeepAlive(held)
	held = nil
	settle(t, func() bool { return percent() == 100 })
	if now := debug.SetMemoryLimit(-1); now != limit {
		t.Fatalf("the limit was %d, and is %d", limit, now)
	}
	runtime.KeepAlive(held)
}

// settle collects until something is so.
func settle(t *testing.T, is func() bool) {
	t.Helper()
	for range 100 {
		runtime.GC()
		runtime.Gosched() // what looks runs in a goroutine of the runtime
		if is() {
			return
		}
	}
	t.Fatalf("after 100 collections the growth is %d%%", percent())
}

func percent() int {
	s := []metrics.Sample{{Name: "/gc/gogc:percent"}}
	metrics.Read(s)
	return int(s[0].Value.Uint64())
}
