// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"os"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fleettest/caller"
)

// What a client did.
const (
	opFound  = "found"  // registers a customer
	opCreate = "create" // registers an appliance of the key's customer: once
	opBan    = "ban"    // writes the reason of an appliance: a register
	opList   = "list"   // reads all appliances of the customer at once
	opEnlist = "enlist" // registers the appliance of a counter
	opAsk    = "ask"    // adds to the count of a probe; a new id begins at 0
	opGet    = "get"    // reads the count of a probe
)

// How it ended: see [caller.Done] and the others.
const (
	done    = caller.Done
	refused = caller.Refused
	undone  = caller.Undone
	unknown = caller.Unknown
)

// op is one call of a client: all tries with one request id together.
type op struct {
	Worker  int               `json:"worker"`
	Key     string            `json:"key"` // what it is about; nothing else has to do with it
	Kind    string            `json:"kind"`
	Name    int               `json:"name,omitempty"`  // which appliance of a group
	Value   string            `json:"value,omitempty"` // reason, or id of a probe
	Add     uint64            `json:"add,omitempty"`
	Request string            `json:"request,omitempty"` // of a write
	Node    string            `json:"node,omitempty"`    // that answered
	Tries   int               `json:"tries"`
	Call    int64             `json:"call"` // nanoseconds since the run began, on one clock for all clients
	Return  int64             `json:"return"`
	Outcome string            `json:"outcome"`
	Fault   string            `json:"fault,omitempty"`
	Detail  string            `json:"detail,omitempty"`
	Group   [groupSize]string `json:"group,omitzero"` // of a list: reasons; see absent
	Sent    uint64            `json:"sent,omitempty"` // of a get
}

// absent stands for an appliance that a list does not hold.
const absent = "-"

func (o *op) writes() bool { return o.Request != "" }

// look is what one node said of the audit log.
type look struct {
	Node         string `json:"node"`
	Call, Return int64
	Size         int64  `json:"size"`
	Root         string `json:"root"`
}

// act is what the nemesis did, and when.
type act struct {
	What     string `json:"what"`
	From, To int64
}

// change is a change of the members that was answered.
type change struct {
	Do   string `json:"do"` // add, promote, demote, replace, remove, transfer
	Name string `json:"name"`
	At   int64  `json:"at"`
}

// history is all that was seen of a run. Its methods may be called concurrently.
type history struct {
	mu    sync.Mutex
	began time.Time
	ops   []op
	looks []look
	acts  []act
	turns []change // of the members
	odd   []string // breaches that were seen while the run went on
}

func newHistory() *history { return &history{began: time.Now()} }

// begin forgets what was seen before: time begins now.
func (h *history) begin() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.began, h.looks = time.Now(), nil
}

func (h *history) now() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return time.Since(h.began).Nanoseconds()
}

func (h *history) add(o op) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, o)
}

func (h *history) saw(l look) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.looks = append(h.looks, l)
}

func (h *history) acted(a act) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.acts = append(h.acts, a)
}

func (h *history) changed(c change) {
	c.At = h.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.turns = append(h.turns, c)
}

func (h *history) breach(s string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.odd = append(h.odd, s)
}

// acked counts what was answered between two moments: writes that were made, and reads.
func (h *history) acked(from, to int64) (writes, reads int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, o := range h.ops {
		switch {
		case o.Return < from || o.Return > to || o.Outcome != done:
		case o.writes():
			writes++
		default:
			reads++
		}
	}
	return writes, reads
}

// save writes the history for people who look into a failure.
func (h *history) save(path string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	b, err := json.MarshalIndent(map[string]any{"ops": h.ops, "looks": h.looks, "acts": h.acts, "members": h.turns}, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o600)
}
