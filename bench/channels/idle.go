// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// window is what a process spent in one stretch of time.
type window struct {
	cpu   float64 // processor time, seconds a second
	wakes float64 // times a second that one of its threads went to sleep
}

// rest is several windows of a process that is left alone.
type rest []window

func (r rest) of(f func(window) float64) (all []float64) {
	for _, w := range r {
		all = append(all, f(w))
	}
	slices.Sort(all)
	return all
}

func cpuOf(w window) float64   { return w.cpu }
func wakesOf(w window) float64 { return w.wakes }

func median(sorted []float64) float64 {
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

func spread(sorted []float64) float64 { return sorted[len(sorted)-1] - sorted[0] }

// leave leaves a process alone for a number of windows.
func leave(pid, windows int, each time.Duration) (out rest, err error) {
	for range windows {
		before, err := spent(pid)
		if err != nil {
			return nil, err
		}
		began := time.Now()
		time.Sleep(each)
		after, err := spent(pid)
		if err != nil {
			return nil, err
		}
		took := time.Since(began).Seconds()
		out = append(out, window{(after.cpu - before.cpu) / took, (after.wakes - before.wakes) / took})
	}
	return out, nil
}

// calm waits until the node's log has not grown for a while: countersignatures of what was enrolled, and what the enrolment
// left behind, are not idleness.
func calm(metrics string, limit time.Duration) error {
	const still = 25 * time.Second // two rounds of witnessing
	until := time.Now().Add(limit)
	for size, since := -1.0, time.Now(); time.Since(since) < still; time.Sleep(time.Second) {
		now, err := metric(metrics, "demarc_audit_entries")
		if err != nil {
			return err
		}
		if now != size {
			size, since = now, time.Now()
		}
		if time.Now().After(until) {
			return fmt.Errorf("the log of the node still grows after %s", limit)
		}
	}
	return nil
}

// spent is what a process has spent since its start: of all threads, in nanoseconds of the scheduler and not in ticks.
func spent(pid int) (w window, err error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(tasks) == 0 {
		return w, fmt.Errorf("process %d is not there", pid)
	}
	for _, t := range tasks {
		b, err := os.ReadFile(filepath.Join(t, "schedstat"))
		if err != nil {
			continue // a thread that ended; the runtime of Go ends hardly any
		}
		f := strings.Fields(string(b))
		if len(f) < 1 {
			return w, fmt.Errorf("%s/schedstat: %q", t, b)
		}
		ns, err := strconv.ParseFloat(f[0], 64)
		if err != nil {
			return w, err
		}
		sleeps, err := statusOf(t, "voluntary_ctxt_switches:")
		if err != nil {
			continue
		}
		w.cpu += ns / 1e9
		w.wakes += sleeps
	}
	return w, nil
}

// rss is the resident memory of a process, in KiB.
func rss(pid int) (float64, error) { return statusOf(fmt.Sprintf("/proc/%d", pid), "VmRSS:") }

func statusOf(dir, key string) (float64, error) {
	b, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return 0, err
	}
	for l := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(l, key); ok {
			return strconv.ParseFloat(strings.Fields(rest)[0], 64)
		}
	}
	return 0, fmt.Errorf("%s/status has no %s", dir, key)
}

// metric reads one number of the node's metrics.
func metric(addr, name string) (float64, error) {
	res, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	for in := bufio.NewScanner(res.Body); in.Scan(); {
		if rest, ok := strings.CutPrefix(in.Text(), name+" "); ok {
			return strconv.ParseFloat(rest, 64)
		}
	}
	return 0, fmt.Errorf("the node has no metric %s", name)
}
