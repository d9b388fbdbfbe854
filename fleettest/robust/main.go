// SPDX-License-Identifier: Apache-2.0

// Command robust runs a control plane of real nodes, in network namespaces and on disks of their own, breaks them by a
// schedule that a seed draws, and checks what their clients saw. It needs root, ip, iptables and mkfs.ext4: make robustness.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/demarc-dev/demarc/fleettest/platform"
)

// options are what the command line says.
type options struct {
	seed         uint64
	duration     time.Duration
	bin, out     string
	without      []string
	only         string
	workers      int
	count        int // nodes at the beginning, and at the end
	think        time.Duration
	leave        bool
	scheduleOnly bool
	sockets      string
}

// has tells whether the faults that need this are in.
func (o options) has(needs string) bool { return !slices.Contains(o.without, needs) }

// shiftedName is the demarcd whose clock can be moved.
const shiftedName = "demarcd-clock"

func main() {
	platform.Command()
	if len(os.Args) > 3 && os.Args[1] == linkWord {
		var exit *exec.ExitError
		if err := linkWith(os.Args[2], os.Args[3:]); errors.As(err, &exit) {
			os.Exit(exit.ExitCode())
		} else if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var o options
	var without string
	flag.Uint64Var(&o.seed, "seed", 0, "draws the schedule and the calls; 0: a new one")
	flag.DurationVar(&o.duration, "duration", 5*time.Minute, "how long the clients call")
	flag.StringVar(&o.bin, "bin", "bin", "folder with demarc and demarcd")
	flag.StringVar(&o.out, "out", "", "folder of the run; BIN/robustness/seed-N where it is empty")
	flag.StringVar(&without, "without", "", "faults to leave out, by name or by what they need (disk, clock, members), with commas")
	flag.StringVar(&o.only, "only", "", "these faults alone, by name, with commas")
	flag.IntVar(&o.count, "nodes", 3, "nodes of the control plane: 3 or 5")
	flag.IntVar(&o.workers, "workers", 8, "clients")
	flag.DurationVar(&o.think, "think", 30*time.Millisecond, "mean pause of a client between calls")
	flag.BoolVar(&o.leave, "keep", false, "leave the folder behind though all went well")
	flag.BoolVar(&o.scheduleOnly, "schedule", false, "print the schedule and do nothing")
	flag.Parse()
	if without != "" {
		o.without = strings.Split(without, ",")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := suite(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "robustness: FAILED: %v\n", err)
		os.Exit(1)
	}
}

// needs refuses to begin where it could not inject what was asked for.
func (o options) needs() error {
	if os.Geteuid() != 0 {
		return errors.New("needs root")
	}
	tools := []string{"ip", "iptables"}
	if o.has("disk") {
		tools = append(tools, "mkfs.ext4")
		if _, err := os.Stat("/dev/loop-control"); err != nil {
			return errors.New("there are no loop devices here: run with -without disk")
		}
	}
	for _, t := range tools {
		if _, err := exec.LookPath(t); err != nil {
			return fmt.Errorf("needs %s", t)
		}
	}
	if o.has("clock") {
		return buildShifted(filepath.Join(o.bin, shiftedName), "./cmd/demarcd")
	}
	return nil
}

func suite(ctx context.Context, o options) (err error) {
	if o.seed == 0 {
		o.seed = uint64(time.Now().UnixNano()) % 1_000_000
	}
	if o.count != 3 && o.count != 5 {
		return errors.New("-nodes is 3 or 5")
	}
	names, err := namesOf(o.without)
	if err != nil {
		return err
	}
	if o.only != "" {
		only := strings.Split(o.only, ",")
		for _, k := range only {
			if !slices.Contains(names, k) {
				return fmt.Errorf("-only %s: there are %s", k, strings.Join(names, ", "))
			}
		}
		names = only
	}
	steps := plan(o.seed, o.duration, o.count, names)
	fmt.Printf("seed %d, %d nodes, %s, %d faults of %d kinds (%s)\n", o.seed, o.count, o.duration, len(steps), len(names),
		strings.Join(names, ", "))
	for _, s := range steps {
		fmt.Println(s)
	}
	if o.scheduleOnly {
		return nil
	}
	if err := o.needs(); err != nil {
		return err
	}
	if o.out == "" {
		o.out = filepath.Join(o.bin, "robustness", fmt.Sprintf("seed-%d", o.seed))
	}
	for _, p := range []*string{&o.bin, &o.out} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	if err := errors.Join(os.RemoveAll(o.out), os.MkdirAll(o.out, 0o700)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*o.duration+20*time.Minute)
	defer cancel()
	r := &run{options: o, ctx: ctx, h: newHistory(), quiet: make(chan struct{})}
	why, summary, err := r.whole(steps)
	if err != nil {
		why = append([]string{err.Error()}, why...)
	}
	if len(why) > 0 {
		err = errors.Join(r.failed(steps, why), r.keep())
	}
	err = errors.Join(err, r.close())
	if len(why) > 0 {
		reason, _, _ := strings.Cut(why[0], "\n")
		return errors.Join(fmt.Errorf("seed %d: %s (%d findings; all is in %s)", o.seed, reason, len(why), o.out), err)
	}
	if err != nil {
		return err
	}
	fmt.Printf("robustness: ok: seed %d, %s\n", o.seed, summary)
	if o.leave {
		return nil
	}
	return os.RemoveAll(o.out)
}

// whole plays the run and judges it. What is found wrong is in why; an error means that it could not be judged.
func (r *run) whole(steps []step) (why []string, summary string, err error) {
	began := time.Now()
	if err := r.begin(); err != nil {
		return nil, "", err
	}
	fmt.Printf("%d nodes and two appliances are up after %s\n", r.count, time.Since(began).Round(time.Second))
	r.h.begin()
	if err := r.story(steps); err != nil {
		why = append(why, err.Error())
	}
	began = time.Now()
	if err := r.recovered(); err != nil {
		return append(why, err.Error()), "", nil
	}
	fmt.Printf("recovered after %s\n", time.Since(began).Round(time.Second))
	if err := errors.Join(r.lastReads(), r.lasting(), r.members(), r.ghost()); err != nil {
		why = append(why, err.Error())
	}
	bad, summary, err := r.judge()
	return append(why, bad...), summary, err
}
