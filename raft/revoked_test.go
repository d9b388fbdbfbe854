// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
)

// TestEvictRevokedEndsOpenConnections: a node whose certificate is no longer valid is cut off although its connections are open, hears
// that it is not removed but refused, and takes part again once its certificate is valid. The others continue meanwhile.
func TestEvictRevokedEndsOpenConnections(t *testing.T) {
	var refuse atomic.Pointer[string]
	passes := func(id string, _ *x509.Certificate) error {
		if bad := refuse.Load(); bad != nil && *bad == id {
			return fault.New("test", fault.Denied, "the certificate of %s was replaced", id)
		}
		return nil
	}
	greets := func(s tls.ConnectionState) (string, error) {
		id, err := peer(s)
		if err == nil {
			err = passes(id, nil)
		}
		return id, err
	}
	c := start(t, 3, func(_ int, cfg *raft.Config) { cfg.Peer = greets })
	lead := c.leader()
	out := (lead + 1) % 3
	c.propose(out, "before") // by a connection that stays open
	refuse.Store(&c.members[out].ID)
	c.propose(out, "still") // an open connection was proven when it came
	for i, n := range c.nodes {
		if i != out {
			n.EvictRevoked(passes)
		}
	}
	if _, err := c.nodes[out].Propose(within(t), []byte("by the refused")); err == nil {
		t.Fatal("a node whose certificate was refused is served by a connection that was open")
	}
	other := (lead + 2) % 3
	c.propose(other, "by another") // the refused one must not have disturbed the others
	select {
	case <-c.nodes[out].Fatal():
		t.Fatalf("the refused node stopped: %v", c.nodes[out].Failure())
	default:
	}
	refuse.Store(nil)
	c.leader()
	if _, err := c.nodes[out].Propose(within(t), []byte("again")); err != nil && !errors.Is(err, fault.Unsure) {
		t.Fatal(err)
	}
	for _, n := range c.nodes {
		if err := n.Read(within(t)); err != nil {
			t.Fatal(err)
		}
	}
}
