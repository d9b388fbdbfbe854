// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/demarc-dev/demarc/fleettest/process"
)

// persist runs a command until it is done. What another fault is in the way of is done once that has ended.
func (r *run) persist(args ...string) error {
	var last error
	err := process.Until(r.ctx, patience, fmt.Sprint(args), func() bool {
		_, last = r.demarc("", append([]string{"--timeout", "60s"}, args...)...)
		return last == nil
	})
	if err != nil {
		return errors.Join(err, last)
	}
	return nil
}

// listed runs a command until it answers, and reads what it says.
func (r *run) listed(into any, args ...string) error {
	var last error
	err := process.Until(r.ctx, patience, fmt.Sprint(args), func() bool {
		var out string
		if out, last = r.demarc("", append([]string{"--timeout", "60s", "--output", "json"}, args...)...); last == nil {
			last = json.Unmarshal([]byte(out), into)
		}
		return last == nil
	})
	if err != nil {
		return errors.Join(err, last)
	}
	return nil
}

// staged names the CAs of a stage.
func (r *run) staged(stage string) ([]string, error) {
	var doc struct {
		Authorities []struct{ ID, Stage string }
	}
	if err := r.listed(&doc, "ca", "status"); err != nil {
		return nil, err
	}
	var out []string
	for _, a := range doc.Authorities {
		if a.Stage == stage {
			out = append(out, a.ID)
		}
	}
	return out, nil
}

// anotherCA makes another CA the one that issues, as docs/runbook-ca.md says for a key that others may know, and ends the trust in the
// one before at once: each node, each appliance and the operator goes on by the new one.
func anotherCA(r *run, _ *node, _ step) (func() error, error) {
	waiting, err := r.staged("prepared")
	for i := 0; err == nil && len(waiting) == 0; i++ {
		if i == 10 {
			return nil, errors.New("ca prepare was answered, and no CA is prepared")
		}
		_, _ = r.demarc("", "--timeout", "60s", "ca", "prepare") // whether it happened is asked for
		waiting, err = r.staged("prepared")
	}
	if err != nil {
		return nil, err
	}
	if err := r.persist("operator", "renew"); err != nil { // for the bundle that has both
		return nil, err
	}
	if err := r.activated(waiting[0]); err != nil {
		return nil, err
	}
	if err := r.persist("operator", "renew"); err != nil {
		return nil, err
	}
	return func() error {
		old, err := r.staged("tainted")
		if err != nil {
			return err
		}
		for _, id := range old {
			if err := r.retired(id); err != nil {
				return err
			}
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.cas++
		return nil
	}, nil
}

// activated has a CA issue. An answer that was lost is looked up.
func (r *run) activated(id string) error { return r.moved(id, "active", "ca", "activate", id) }

func (r *run) retired(id string) error {
	return r.moved(id, "retired", "ca", "retire", id, "--compromised")
}

func (r *run) moved(id, to string, args ...string) error {
	var last error
	err := process.Until(r.ctx, patience, fmt.Sprint(args), func() bool {
		if _, last = r.demarc("", append([]string{"--timeout", "60s"}, args...)...); last == nil {
			return true
		}
		is, err := r.staged(to)
		return err == nil && slices.Contains(is, id)
	})
	if err != nil {
		return errors.Join(err, last)
	}
	return nil
}

// anotherKEK rotates the key-encryption key as docs/runbook-kek.md says. The nodes share one file of it: the first that needs the old key
// no more puts the next one in its place.
func anotherKEK(r *run, _ *node, _ step) (func() error, error) {
	next := r.path("acme", "kek.next")
	if _, err := os.Stat(next); errors.Is(err, os.ErrNotExist) {
		if _, err := r.demarc("", "control-plane", "kek", "new", next); err != nil {
			return nil, err
		}
	}
	was, err := r.keys()
	if err != nil {
		return nil, err
	}
	if err := process.Until(r.ctx, patience, "the key-encryption key is rotated", func() bool {
		_, _ = r.demarc("", "--timeout", "60s", "control-plane", "rotate-kek", "--wait", "1s") // whether it happened is asked for
		is, err := r.keys()
		return err == nil && is.Key != was.Key
	}); err != nil {
		return nil, err
	}
	return func() error {
		return process.Until(r.ctx, patience, "no node needs the old key-encryption key", func() bool {
			is, err := r.keys()
			return err == nil && len(is.Unsettled) == 0
		})
	}, nil
}

type keyStatus struct {
	Key       string
	Unsettled []string
}

func (r *run) keys() (k keyStatus, err error) {
	return k, r.listed(&k, "control-plane", "kek", "status")
}

// snapshot saves the book from one node, whatever else goes on, and verifies it.
func snapshot(r *run, n *node, _ step) (func() error, error) {
	r.mu.Lock()
	r.saved++
	file := r.path(fmt.Sprintf("book-%d.snap", r.saved))
	r.mu.Unlock()
	return func() error {
		if err := r.persist("control-plane", "snapshot", "save", file); err != nil {
			return err
		}
		if _, err := r.demarc("", "control-plane", "snapshot", "inspect", file); err != nil {
			return err
		}
		return os.Remove(file)
	}, nil
}
