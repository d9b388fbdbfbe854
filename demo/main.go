// SPDX-License-Identifier: Apache-2.0

// Command demo plays the whole story of demarc on loopback: a management plane, a control plane of three nodes, a
// tailnet, one customer's appliance and an application of two services. Each step prints the command that a person would
// type and its real output, and is an assertion: the first thing that is not as promised ends the demo with exit code 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	check := flag.Bool("check", false, "play the story, then clean up and exit")
	bin := flag.String("bin", "bin", "folder with demarc, demarcd, demo and the sample")
	sample := flag.String("sample", "demo/sample", "folder of the sample application")
	keep := flag.Bool("keep", false, "leave the folder of the demo behind")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "demo plays the story of demarc on loopback. Try: make demo, or make demo-check.")
		flag.PrintDefaults()
	}
	if len(os.Args) == 4 && os.Args[1] == "token" { // demo token SOCKET AUDIENCE: what the appliance asks its platform with
		if err := printToken(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
			os.Exit(1)
		}
		return
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := tell(ctx, *bin, *sample, *check, *keep)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: FAILED: %v\n", err)
		os.Exit(1)
	}
}

// errStop unwinds the story; what went wrong is in the story.
var errStop = errors.New("stop")

// tell plays the story and cleans up after it.
func tell(ctx context.Context, bin, sample string, check, keep bool) (err error) {
	dir, err := os.MkdirTemp("", "demarc-demo-")
	if err != nil {
		return err
	}
	abs, err := filepath.Abs(bin)
	if err != nil {
		return err
	}
	s := &story{ctx: ctx, dir: dir, bin: abs, sample: sample, began: time.Now(), procs: map[string]*proc{}, known: map[string]bool{}}
	defer func() {
		left := s.clean()
		if !keep {
			left = errors.Join(left, os.RemoveAll(dir))
		}
		if err == nil {
			err = left
		}
	}()
	for _, step := range []func(){s.environment, s.trustDomain, s.register, s.enrol, s.refusals, s.transports, s.publish, s.consent, s.deploy,
		s.ingress, s.operate, s.evidence, s.scrape, s.outage, s.again} {
		if err := s.play(step); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
	}
	fmt.Printf("\nthe whole story in %s\n", time.Since(s.began).Round(100*time.Millisecond))
	if check {
		return s.play(s.invited)
	}
	s.invite()
	<-ctx.Done()
	fmt.Println("\ncleaning up")
	return nil
}

// play runs one step; a step stops the story by s.fail.
func (s *story) play(step func()) (err error) {
	defer func() {
		if v := recover(); v != nil {
			if v != any(errStop) {
				panic(v)
			}
			err = s.err
		}
	}()
	step()
	return nil
}
