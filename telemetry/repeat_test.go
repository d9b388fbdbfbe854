// SPDX-License-Identifier: Apache-2.0

package telemetry_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/demarc-dev/demarc/telemetry"
)

// FAULTS.md J9, J1: requests of strangers, and a state that lasts, filled the log.
func TestLinesThatRepeatAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log := telemetry.NewLogger(&out, slog.LevelInfo, "text")
		lines := func() int { return strings.Count(out.String(), "\n") }

		for i := range 100_000 { // who calls chooses the rest of the line
			log.Warn("the application did not answer", "path", fmt.Sprint("/", i))
		}
		if lines() != 10 {
			t.Fatalf("%d lines of one kind", lines())
		}
		log.Error("the application did not answer")
		log.With("part", "doors").Warn("the application did not answer")
		log.Warn("a service ended", "service", "web")
		log.Warn("a service ended", "service", "db")
		if lines() != 14 {
			t.Fatalf("a line of another kind was held back: %d", lines())
		}
		time.Sleep(time.Minute)
		log.Warn("the application did not answer")
		if last := out.String()[strings.LastIndex(strings.TrimSpace(out.String()), "\n")+1:]; !strings.Contains(last, "repeated=99990") {
			t.Fatalf("the next line does not tell how many there were: %s", last)
		}
		log.Debug("not at this level")
		if lines() != 15 {
			t.Fatal("a line below the level was written")
		}

		// A state that lasts for a day, noticed each second.
		before := lines()
		for range 24 * 60 * 60 {
			log.Error("the disk is full")
			time.Sleep(time.Second)
		}
		if n := lines() - before; n > 350 || n < 240 {
			t.Fatalf("%d lines a day", n)
		}

		// Messages are written in the code; one that is not can't take the memory.
		before = lines()
		for i := range 50_000 {
			log.Warn(fmt.Sprint("stray ", i))
		}
		if n := lines() - before; n > 1100 {
			t.Fatalf("%d lines of 50,000 kinds", n)
		}
	})
}
