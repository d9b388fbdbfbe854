// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/raft"
)

// later is a change of a later build.
type later struct {
	What string `json:"what"`
}

func (later) Kind() string { return "later/1" }

func (c later) Apply(s *book.State, m ledger.Meta) (struct{}, error) {
	_, err := book.RemoveNode{Name: "cp-9", Reason: c.What}.Apply(s, m)
	return struct{}{}, err
}

func laterBook() *ledger.Book[book.State] { return book.NewBook(ledger.Learn[later]()) }

type voting map[string][]byte

func (v voting) Voters() []string {
	var out []string
	for id := range v {
		out = append(out, id)
	}
	slices.Sort(out)
	return out
}
func (v voting) About(id string) []byte { return v[id] }
func (voting) Judge(time.Time) error    { return nil }

func proposal[R any](t *testing.T, id string, c ledger.Change[book.State, R]) []byte {
	t.Helper()
	b, err := ledger.Encode(ledger.Meta{At: start, By: "test", Request: fleet.RequestID(id)}, c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestTheFirstKindsAreKnown(t *testing.T) {
	stored := book.NewBook()
	for _, k := range book.FirstKinds() {
		if !stored.Knows(k) {
			t.Errorf("the first release knew %q, and this build does not", k)
		}
	}
}

func TestAKindIsProposedOnlyWhenEachVoterKnowsIt(t *testing.T) {
	knows := func(build string, kinds ...string) []byte {
		b, err := json.Marshal(map[string]any{"build": build, "knows": append([]string{}, kinds...)})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	o := newBook(t)
	stored := laterBook()
	self := fleet.PrincipalOf("acme.example", fleet.Node, "cp-3")
	o.book = stored
	must(t, o, book.Genesis{TrustDomain: "acme.example", Slots: []identity.Slot{{Stage: identity.Active, CertDER: []byte("c"), SealedKey: []byte("k")}}})
	if _, err := ledger.Submit(t.Context(), o, ledger.Meta{At: start, By: self, Request: "is"}, book.NodeIs{Name: "cp-3", Build: "v2", Knows: []string{"later/1"}}); err != nil {
		t.Fatal(err)
	}
	change := proposal(t, "x", later{"x"})
	for name, c := range map[string]struct {
		data []byte
		says voting
		want string // "" where it passes
	}{
		"all say so":                   {change, voting{"cp-1": knows("v2", "later/1"), "cp-2": knows("v2", "later/1")}, ""},
		"one is older":                 {change, voting{"cp-1": knows("v2", "later/1"), "cp-2": knows("v1", "node.is/1")}, `node "cp-2" does not know the change "later/1": upgrade it first, it runs the build "v1"`},
		"one knows nothing":            {change, voting{"cp-2": knows("v0")}, `node "cp-2" does not know`},
		"one said nothing":             {change, voting{"cp-1": knows("v2", "later/1"), "cp-2": nil}, `not known whether node "cp-2" knows the change "later/1"`},
		"one is away, and said so":     {change, voting{"cp-3": nil}, ""},
		"one came back with less":      {change, voting{"cp-3": knows("v1")}, `node "cp-3" does not know`},
		"one says what nobody reads":   {change, voting{"cp-2": []byte("{")}, "not known"},
		"a kind of the beginning":      {proposal(t, "y", book.RegisterCustomer{Name: "initech"}), voting{"cp-2": nil}, ""},
		"a kind that is not known":     {[]byte(`{"kind":"x/1","meta":{"at":"2026-01-02T15:04:05Z","by":"t","request":"r"},"body":{}}`), voting{}, "does not know the change"},
		"a kind with its own spelling": {[]byte(`{"kind":"lat\u0065r/1","meta":{"at":"2026-01-02T15:04:05Z","by":"t","request":"r"},"body":{"what":""}}`), voting{"cp-2": knows("v1")}, `"cp-2" does not know`},
	} {
		err := book.Gate{Book: stored, Cluster: func() book.Voting { return c.says }}.DryRun(c.data)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if c.want != "" && name != "a kind that is not known" && fault.Of(err) != fault.Unavailable {
			t.Errorf("%s: %v is not unavailable", name, err)
		}
	}
}

// TestAKindIsForeseen: a node that forwards goes by the book alone, and refuses by name what the leader may not even know.
func TestAKindIsForeseen(t *testing.T) {
	o := newBook(t)
	o.book = laterBook()
	must(t, o, book.Genesis{TrustDomain: "acme.example", Slots: []identity.Slot{{Stage: identity.Active, CertDER: []byte("c"), SealedKey: []byte("k")}}})
	is := func(name string, kinds ...string) {
		self := fleet.PrincipalOf("acme.example", fleet.Node, name)
		if _, err := ledger.Submit(t.Context(), o, ledger.Meta{At: start, By: self, Request: fleet.RequestID("is-" + name)}, book.NodeIs{Name: name, Build: "b-" + name, Knows: kinds}); err != nil {
			t.Fatal(err)
		}
	}
	is("cp-1", "node.is/1", "later/1")
	is("cp-2", "node.is/1", "later/1")
	is("cp-3", "node.is/1")
	change := proposal(t, "x", later{"x"})
	for name, c := range map[string]struct {
		data   []byte
		voters []string
		want   string
	}{
		"all voters know it":      {change, []string{"cp-1", "cp-2"}, ""},
		"one does not":            {change, []string{"cp-1", "cp-2", "cp-3"}, `node "cp-3" does not know the change "later/1": upgrade it first, it runs the build "b-cp-3"`},
		"one is not on record":    {change, []string{"cp-1", "cp-4"}, `not known whether node "cp-4" knows the change "later/1"`},
		"a kind of the beginning": {proposal(t, "y", book.RegisterCustomer{Name: "initech"}), []string{"cp-3", "cp-4"}, ""},
		"it is malformed":         {[]byte("{"), []string{"cp-3"}, ""}, // that is for the leader to say
	} {
		says := voting{}
		for _, v := range c.voters {
			says[v] = nil // it does not lead: nobody says anything to it
		}
		err := book.Gate{Book: o.book, Cluster: func() book.Voting { return says }}.Foresee(c.data)
		if c.want == "" && err != nil || c.want != "" && (fault.Of(err) != fault.Unavailable || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// TestMixedBuilds runs three nodes of which one has an older build: what it does not know is refused by name, and it goes
// on; everything else is decided. Once it is upgraded the change is made.
func TestMixedBuilds(t *testing.T) {
	ca, err := identity.NewCA("acme.example", time.Now(), rand.Reader, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	m := mixed{t: t, ca: ca}
	for i := range 3 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		m.listeners[i] = ln
		m.members = append(m.members, raft.Member{ID: []string{"cp-1", "cp-2", "cp-3"}[i], Addr: ln.Addr().String()})
		m.dirs[i] = filepath.Join(t.TempDir(), "raft")
	}
	m.open(0, laterBook(), "v2")
	m.open(1, laterBook(), "v2")
	m.open(2, book.NewBook(), "v1")
	defer func() {
		for i := range m.nodes {
			m.stop(i)
		}
	}()
	m.must(m.propose(0, "a", book.RegisterCustomer{Name: "globex"}))
	for _, by := range []int{0, 1} { // one of them may lead; the older one forwards and leads as it likes
		m.must(m.nodes[by].Change(t.Context(), raft.Change{Do: raft.Transfer, ID: m.members[by].ID}))
		began := time.Now()
		err := m.propose(2, "b", later{"x"})
		for fault.Of(err) == fault.Unavailable && strings.Contains(err.Error(), "not known whether") && time.Since(began) < 20*time.Second {
			err = m.propose(2, "b", later{"x"}) // the new leader has not heard from all yet
		}
		if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), `node "cp-3" does not know the change "later/1"`) {
			t.Fatalf("%v", err)
		}
	}
	m.must(m.propose(2, "c", book.RegisterCustomer{Name: "initech"}))
	m.stop(2)
	m.open(2, laterBook(), "v2")
	for deadline := time.Now().Add(20 * time.Second); ; {
		err := m.propose(0, "d", later{"x"})
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	m.must(errors.Join(m.nodes[0].Read(t.Context()), m.nodes[2].Read(t.Context())))
	if p, _ := m.books[2].View().Peer("cp-9"); !p.Removed {
		t.Fatal("the change is not on the node that was upgraded")
	}
	if one, two := m.books[0].Log().Root(), m.books[2].Log().Root(); one != two {
		t.Fatal("the audit logs differ")
	}
}

type mixed struct {
	t         *testing.T
	ca        *identity.Authority
	members   []raft.Member
	listeners [3]net.Listener
	dirs      [3]string
	nodes     [3]*raft.Node
	up        [3]atomic.Pointer[raft.Node]
	books     [3]*ledger.Book[book.State]
}

func (m *mixed) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *mixed) source(name string) identity.Source {
	m.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	m.must(err)
	der, err := identity.NewCSR(key, rand.Reader)
	m.must(err)
	csr, err := identity.ParseCSR(der)
	m.must(err)
	leaf, err := m.ca.Issue(csr, fleet.PrincipalOf("acme.example", fleet.Node, name), time.Now(), time.Hour, identity.IssueOptions{Rand: rand.Reader})
	m.must(err)
	return identity.Fixed(&tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}, identity.Pool([]*x509.Certificate{m.ca.Cert}))
}

func (m *mixed) open(i int, stored *ledger.Book[book.State], build string) {
	m.t.Helper()
	ln := m.listeners[i]
	if m.listeners[i] = nil; ln == nil {
		var err error
		ln, err = net.Listen("tcp", m.members[i].Addr)
		m.must(err)
	}
	s := m.source(m.members[i].ID)
	says, err := json.Marshal(map[string]any{"build": build, "knows": stored.Kinds()})
	m.must(err)
	m.books[i] = stored
	n, err := raft.Open(raft.Config{Self: m.members[i], First: m.members, Dir: m.dirs[i], Listener: ln,
		Machine: book.Gate{Book: stored, Cluster: func() book.Voting {
			if n := m.up[i].Load(); n != nil {
				return n
			}
			return nil
		}},
		About:     func() []byte { return says },
		Timing:    raft.Timing{Heartbeat: 300 * time.Millisecond, Election: 300 * time.Millisecond, Lease: 200 * time.Millisecond},
		ServerTLS: identity.Server(s, func(fleet.Principal, fleet.Serial) error { return nil }, true, raft.ProtoRaft, raft.ProtoForward),
		ClientTLS: func(id string) *tls.Config { return identity.Client(s, identity.WantNode("acme.example", id)) }})
	m.must(err)
	m.nodes[i] = n
	m.up[i].Store(n)
}

func (m *mixed) stop(i int) {
	if n := m.nodes[i]; n != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := n.Close(ctx); err != nil {
			m.t.Error(err)
		}
		m.nodes[i] = nil
	}
}

func (m *mixed) propose(i int, id string, c interface{ Kind() string }) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	meta := ledger.Meta{At: time.Now().UTC(), By: "test", Request: fleet.RequestID(id)}
	var err error
	switch c := c.(type) {
	case book.RegisterCustomer:
		_, err = ledger.Submit(ctx, m.nodes[i], meta, c)
	case later:
		_, err = ledger.Submit(ctx, m.nodes[i], meta, c)
	}
	return err
}
