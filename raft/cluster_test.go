// SPDX-License-Identifier: Apache-2.0

package raft_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/raft"
)

const domain = "acme.example"

// list is a machine that stores what was proposed. "bad" and "full" are refused in the dry run, "poison" stops the node.
type list struct {
	mu    sync.Mutex
	lines []string
	index uint64
	last  map[uint64]int // proposals an entry

	hold   func(line string) // if it is not nil, before a line is applied
	refuse bool              // to restore
	tried  int               // to restore
}

func (l *list) DryRun(data []byte) error {
	if string(data) == "bad" {
		return fault.New("list", fault.Invalid, "this line is bad")
	}
	if string(data) == "full" {
		return fault.New("list", fault.Busy, "there is no room for this line")
	}
	return nil
}

func (l *list) Apply(index uint64, data []byte) ([]byte, error) {
	l.mu.Lock()
	hold := l.hold
	l.mu.Unlock()
	if hold != nil {
		hold(string(data))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if string(data) == "poison" {
		return nil, errors.New("poisoned")
	}
	if l.last == nil {
		l.last = map[uint64]int{}
	}
	l.last[index]++
	l.index = index
	l.lines = append(l.lines, string(data))
	return fmt.Appendf(nil, "%d:%s", len(l.lines), data), nil
}

func (l *list) Snapshot() (io.WriterTo, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.NewBufferString(strings.Join(l.lines, "\n")), nil
}

func (l *list) Restore(r io.Reader) error {
	if l.tried++; l.refuse {
		return errors.New("refused")
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	var lines []string
	if len(b) > 0 {
		lines = strings.Split(string(b), "\n")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = lines
	return nil
}

func (l *list) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.lines)
}

// cluster is three nodes on loopback.
type cluster struct {
	t       testing.TB
	ca      *identity.Authority
	members []raft.Member
	dirs    []string
	lists   []*list
	nodes   []*raft.Node
	edit    func(i int, c *raft.Config)
}

func newCA(t testing.TB) *identity.Authority {
	t.Helper()
	ca, err := identity.NewCA(domain, time.Now(), rand.Reader, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func source(t testing.TB, ca *identity.Authority, role fleet.Role, name string) identity.Source {
	return sourceAt(t, ca, role, name, time.Now())
}

func sourceAt(t testing.TB, ca *identity.Authority, role fleet.Role, name string, now time.Time) identity.Source {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := identity.ParseCSR(der)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.Issue(csr, fleet.PrincipalOf(domain, role, name), now, 20*time.Minute, identity.IssueOptions{Rand: rand.Reader})
	if err != nil {
		t.Fatal(err)
	}
	cert := &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
	return identity.Fixed(cert, identity.Pool([]*x509.Certificate{ca.Cert}))
}

func peer(s tls.ConnectionState) (string, error) {
	p, _, err := identity.PrincipalOf(&s)
	_, _, id, _ := p.Split()
	return id, err
}

func onlyNodes(p fleet.Principal, _ fleet.Serial) error {
	if _, role, _, _ := p.Split(); role != fleet.Node {
		return fault.New("test", fault.Denied, "%s is not a node", p)
	}
	return nil
}

// free returns an address at which no process listens.
func free(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func start(t testing.TB, n int, edit func(i int, c *raft.Config)) *cluster {
	t.Helper()
	c := &cluster{t: t, ca: newCA(t), edit: edit}
	for i := range n {
		c.members = append(c.members, raft.Member{ID: fmt.Sprintf("n%d", i), Addr: free(t)})
		c.dirs = append(c.dirs, filepath.Join(t.TempDir(), fmt.Sprint(i)))
	}
	c.lists, c.nodes = make([]*list, n), make([]*raft.Node, n)
	for i := range n {
		c.open(i)
	}
	t.Cleanup(func() {
		for i := range c.nodes {
			c.stop(i)
		}
	})
	return c
}

func (c *cluster) config(i int) raft.Config {
	c.t.Helper()
	return c.configAt(i, c.members[i].Addr)
}

// configAt is the config of node i with a listener anywhere.
func (c *cluster) configAt(i int, addr string) raft.Config {
	c.t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		c.t.Fatal(err)
	}
	s := source(c.t, c.ca, fleet.Node, c.members[i].ID)
	cfg := raft.Config{Self: c.members[i], First: c.members, Dir: c.dirs[i], Machine: c.lists[i], Listener: ln, Timing: raft.Fast(),
		ServerTLS: identity.Server(s, onlyNodes, true, raft.ProtoRaft, raft.ProtoForward),
		ClientTLS: func(id string) *tls.Config { return identity.Client(s, identity.WantNode(domain, id)) }, Peer: peer}
	raft.SmallLog(&cfg, 4<<20) // less to write in each test
	if c.edit != nil {
		c.edit(i, &cfg)
	}
	return cfg
}

func (c *cluster) open(i int) {
	c.t.Helper()
	c.lists[i] = &list{}
	n, err := raft.Open(c.config(i))
	if err != nil {
		c.t.Fatal(err)
	}
	c.nodes[i] = n
}

func (c *cluster) stop(i int) {
	if c.nodes[i] == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := c.nodes[i].Close(ctx); err != nil {
		c.t.Error(err)
	}
	c.nodes[i] = nil
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// leader waits for one that all nodes which are up agree upon.
func (c *cluster) leader() int {
	c.t.Helper()
	lead := -1
	agree := func() bool {
		votes := map[string]int{}
		up := 0
		for _, n := range c.nodes {
			if n == nil {
				continue
			}
			up++
			if id, ok := n.Leader(); ok {
				votes[id]++
			}
		}
		for i, m := range c.members {
			if votes[m.ID] == up && c.nodes[i] != nil && c.nodes[i].State().Role == "leader" {
				lead = i
			}
		}
		return lead >= 0
	}
	if !poll(20*time.Second, agree) {
		c.t.Fatal("no leader")
	}
	return lead
}

func (c *cluster) propose(i int, line string) string {
	c.t.Helper()
	ans, err := c.nodes[i].Propose(within(c.t), []byte(line))
	if err != nil {
		c.t.Fatalf("%s proposes %q: %v", c.members[i].ID, line, err)
	}
	return string(ans)
}

// same waits until every node that is up has applied the same.
func (c *cluster) same(want []string) {
	c.t.Helper()
	for i, n := range c.nodes {
		if n == nil {
			continue
		}
		if err := n.Read(within(c.t)); err != nil {
			c.t.Fatal(err)
		}
		if got := c.lists[i].all(); want != nil && !slices.Equal(got, want) {
			c.t.Fatalf("%s has %d lines %.20q, want %d %.20q", c.members[i].ID,
				len(got), got[max(0, len(got)-8):], len(want), want[max(0, len(want)-8):])
		}
	}
}
