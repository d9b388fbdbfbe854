// SPDX-License-Identifier: Apache-2.0

package fleettest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/raft"
	"github.com/demarc-dev/demarc/raft/wal"
	"github.com/demarc-dev/demarc/raft/wal/waltest"
)

// orders is a control plane on machines that lose power: logs and votes are on disks that forget what was not synced. An operator
// calls through the real doors, and an appliance stays connected.
type orders struct {
	*trio
	r      *mrand.Rand
	disks  map[string]*waltest.Script
	kek    []byte // in use
	leaf   *tls.Certificate
	key    *ecdsa.PrivateKey
	app    *Appliance
	number int    // of the newest node
	losses int    // of power
	down   string // a node that is down until the power comes back
	worst  time.Duration
	steps  []string
}

const ordersOperator = "ann"

func newOrders(t *testing.T, seed uint64) *orders {
	c, slots := foundTrio(t, unhurried)
	o := &orders{trio: c, r: mrand.New(mrand.NewPCG(seed, 1)), disks: map[string]*waltest.Script{}, kek: c.kek, number: 3}
	c.bundles, c.lists = map[string][]byte{}, map[string][]controlplane.Member{}
	for _, m := range c.members {
		o.machine(m.Name)
	}
	c.shape = o.shaped
	ca, err := identity.OpenAuthority(slots[0].CertDER, slots[0].SealedKey, c.kek)
	c.must(err)
	o.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	c.must(err)
	csr, err := identity.ParseCSR(o.csr(o.key))
	c.must(err)
	leaf, err := ca.Issue(csr, fleet.PrincipalOf(Domain, fleet.Operator, ordersOperator), time.Now(), LeafLife, identity.IssueOptions{Rand: rand.Reader})
	c.must(err)
	o.leaf = &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: o.key, Leaf: leaf}
	c.startAll()
	_, err = ledger.Submit(t.Context(), order{c.Fleet}, c.meta(), controlplane.GenesisWith{Genesis: controlplane.Genesis{TrustDomain: Domain, Slots: slots},
		Operator: controlplane.FirstOperator{Name: ordersOperator, Serial: identity.SerialOf(leaf), Till: leaf.NotAfter, Issuer: slots[0].ID()}})
	c.must(err)
	_, err = ledger.Submit(t.Context(), order{c.Fleet}, c.meta(), controlplane.RegisterCustomer{Name: "globex"})
	c.must(err)
	for _, m := range c.members { // as each node says of itself when it comes
		_, err = ledger.Submit(t.Context(), order{c.Fleet}, c.meta(), controlplane.AddNode{Name: m.Name, Raft: m.Raft, API: m.API, Voter: true})
		c.must(err)
	}
	c.spread()
	o.app = c.AddAppliance("eu-1")
	o.app.Start()
	o.app.WaitUp(5 * time.Minute)
	return o
}

// machine makes the machine of a node: its disk, its kek_file, the list of members in its file.
func (o *orders) machine(name string) {
	o.disks[name] = waltest.New()
	o.lists[name] = slices.Clone(o.members)
	o.must(os.WriteFile(o.keks(name).Current, o.kek, 0o600))
}

func (o *orders) keks(name string) controlplane.KEKFiles {
	return controlplane.KEKFiles{Current: filepath.Join(o.dirs[name], "kek")}
}

// shaped is what is special about a node of orders.
func (o *orders) shaped(name string, p *peer, opts *controlplane.Options, conf *raft.Config) {
	p.keks = o.keks(name)
	opts.Cluster = membersOf{p}
	conf.Files, conf.Log = o.disks[name], wal.Options{SegmentBytes: 2 << 20}
	conf.Join = !slices.Contains([]string{"cp-1", "cp-2", "cp-3"}, name)
	conf.Peer = func(s tls.ConnectionState) (string, error) {
		id, _, err := identity.PrincipalOf(&s)
		_, _, node, _ := id.Split()
		return node, err
	}
}

// membersOf is raft as a server takes it for its cluster.
type membersOf struct{ p *peer }

func (m membersOf) IDs() []string {
	if n := m.p.live.Load(); n != nil {
		return n.IDs()
	}
	return nil
}
func (m membersOf) Members(ctx context.Context) (raft.Cluster, error) {
	return m.p.live.Load().Members(ctx)
}
func (m membersOf) Change(ctx context.Context, c raft.Change) error {
	return m.p.live.Load().Change(ctx, c)
}
func (m membersOf) Replace(ctx context.Context, old, by string) error {
	return m.p.live.Load().Replace(ctx, old, by)
}

func (o *orders) csr(key *ecdsa.PrivateKey) []byte {
	der, err := identity.NewCSR(key, rand.Reader)
	o.must(err)
	return der
}

// call has the operator call a node through its door, as demarc does, with the CAs of the newest bundle.
func (o *orders) call(node string, do func(ctx context.Context, h *http.Client, url string) error) error {
	var cas [][]byte
	for _, s := range o.node(node).book.View().Slots {
		if s.Stage != identity.Retired {
			cas = append(cas, s.CertDER)
		}
	}
	certs, err := identity.ParseDER(cas, Domain)
	if err != nil {
		return err
	}
	tr := &http.Transport{ForceAttemptHTTP2: true, DisableKeepAlives: true, TLSClientConfig: identity.Client(identity.Fixed(o.leaf, identity.Pool(certs)), identity.WantNode(Domain, node), "h2"),
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return o.connect(ctx, node+":2") }}
	defer tr.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(o.t.Context(), 40*time.Second)
	defer cancel()
	return do(ctx, &http.Client{Transport: tr}, "https://"+node+":2")
}

// until has the operator call nodes in turn until one of them does it.
func (o *orders) until(what string, do func(ctx context.Context, h *http.Client, url string) error) {
	o.t.Helper()
	var last error
	began := time.Now()
	for i := 0; ; i++ {
		all := o.running()
		if last = o.call(all[i%len(all)], do); last == nil {
			return
		}
		if time.Since(began) > 30*time.Minute {
			o.t.Fatalf("after %s: %s: %v", strings.Join(o.steps, " "), what, last)
		}
		time.Sleep(2 * time.Second)
	}
}

func (o *orders) keyStatus() *controlv1.GetKeysResponse {
	var out *controlv1.GetKeysResponse
	o.until("the keys are listed", func(ctx context.Context, h *http.Client, url string) error {
		res, err := controlv1connect.NewKeyServiceClient(h, url).GetKeys(ctx, connect.NewRequest(&controlv1.GetKeysRequest{}))
		if err == nil {
			out = res.Msg
		}
		return err
	})
	return out
}

func (o *orders) renew() {
	o.until("the operator renews", func(ctx context.Context, h *http.Client, url string) error {
		res, err := controlv1connect.NewControlClient(h, url).RenewOperator(ctx, connect.NewRequest(&controlv1.RenewOperatorRequest{Csr: o.csr(o.key)}))
		if err != nil {
			return err
		}
		leaf, err := x509.ParseCertificate(res.Msg.GetCertificate())
		if err == nil {
			o.leaf = &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: o.key, Leaf: leaf}
		}
		return err
	})
}

// settle waits until the CAs' change went through where it waits for others.
func (o *orders) settle(what string, do func() error) {
	o.t.Helper()
	for began := time.Now(); ; time.Sleep(5 * time.Second) {
		err := do()
		if k := fault.Of(err); k != fault.Conflict && k != fault.Unavailable {
			o.must(err)
			return
		}
		if time.Since(began) > time.Hour {
			o.t.Fatalf("after %s: not yet: %s: %v", strings.Join(o.steps, " "), what, err)
		}
	}
}

func (o *orders) stage(stage identity.Stage) string {
	for _, s := range o.View().Slots {
		if s.Stage == stage {
			return string(s.ID())
		}
	}
	o.t.Fatalf("after %s: no CA is %s", strings.Join(o.steps, " "), stage)
	return ""
}

// rotate plays docs/runbook-kek.md: the old kek is destroyed once no node needs it. With a node down it is not destroyed there.
func (o *orders) rotate(down bool) {
	next := make([]byte, 32)
	_, _ = rand.Read(next)
	for _, m := range o.members {
		o.must(os.WriteFile(o.keks(m.Name).Next(), next, 0o600))
	}
	o.Wait("all hold the next key", 5*time.Minute, func() bool {
		for _, n := range o.keyStatus().GetNodes() {
			if len(n.GetKeys()) != 2 {
				return false
			}
		}
		return true
	})
	if down {
		o.stopOne()
	}
	o.until("the key is rotated", func(ctx context.Context, h *http.Client, url string) error {
		_, err := controlv1connect.NewKeyServiceClient(h, url).RotateKey(ctx, connect.NewRequest(&controlv1.RotateKeyRequest{RequestId: rand.Text()}))
		return err
	})
	o.kek = next
	if !down && o.r.IntN(2) == 0 { // else the power fails while the nodes are at it
		o.dropped()
	}
}

// dropped waits until the book says that the old key may be destroyed.
func (o *orders) dropped() {
	o.t.Helper()
	o.Wait("no node needs another key", 10*time.Minute, func() bool { return len(o.keyStatus().GetUnsettled()) == 0 })
	for _, m := range o.members {
		if b, err := os.ReadFile(o.keks(m.Name).Current); err != nil || !bytes.Equal(b, o.kek) {
			o.t.Errorf("after %s: %s does not have the new key in kek_file: %v", strings.Join(o.steps, " "), m.Name, err)
		}
	}
}

// stopOne stops a node until the power comes back.
func (o *orders) stopOne() {
	o.down = o.follower()
	o.crash(o.down)
}

func (o *orders) add() string {
	o.number++
	name := fmt.Sprintf("cp-%d", o.number)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	o.must(err)
	o.until("a node is added", func(ctx context.Context, h *http.Client, url string) error {
		res, err := controlv1connect.NewClusterClient(h, url).AddMember(ctx, connect.NewRequest(&controlv1.AddMemberRequest{RequestId: rand.Text(), Name: name, RaftAddress: name + ":1", ApiAddress: name + ":2", Csr: o.csr(key)}))
		if err != nil {
			return err
		}
		leaf, err := x509.ParseCertificate(res.Msg.GetCertificate())
		if err != nil {
			return err
		}
		o.first[name] = &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
		var file bytes.Buffer
		for _, der := range res.Msg.GetBundle() {
			file.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
		}
		o.bundles[name] = file.Bytes()
		return nil
	})
	o.members = append(slices.Clone(o.members), controlplane.Member{Name: name, Raft: name + ":1", API: name + ":2"})
	o.dirs[name] = o.t.TempDir()
	o.machine(name)
	o.startNode(name)
	return name
}

func (o *orders) without(name string) {
	o.stopNode(name)
	o.members = slices.DeleteFunc(slices.Clone(o.members), func(m controlplane.Member) bool { return m.Name == name })
	for _, n := range o.running() {
		o.front(n)
		break
	}
}

// members plays one change of the members.
func (o *orders) change(how string) {
	cluster := func(what string, do func(ctx context.Context, c controlv1connect.ClusterClient) error) {
		o.until(what, func(ctx context.Context, h *http.Client, url string) error {
			return do(ctx, controlv1connect.NewClusterClient(h, url))
		})
	}
	switch how {
	case "add":
		name := o.add()
		cluster("it is promoted", func(ctx context.Context, c controlv1connect.ClusterClient) error {
			_, err := c.PromoteMember(ctx, connect.NewRequest(&controlv1.PromoteMemberRequest{Name: name}))
			return err
		})
	case "remove":
		name := o.follower()
		cluster("it is removed", func(ctx context.Context, c controlv1connect.ClusterClient) error {
			_, err := c.RemoveMember(ctx, connect.NewRequest(&controlv1.RemoveMemberRequest{RequestId: rand.Text(), Name: name, Reason: "order"}))
			return err
		})
		o.without(name)
	case "replace":
		old := o.follower()
		name := o.add()
		id := rand.Text()
		cluster("it is replaced", func(ctx context.Context, c controlv1connect.ClusterClient) error {
			_, err := c.ReplaceMember(ctx, connect.NewRequest(&controlv1.ReplaceMemberRequest{RequestId: id, Old: old, By: name, Reason: "order"}))
			return err
		})
		o.without(old)
	}
}

// step plays one step of an order. With a star a node goes down before it, where that does not hold it up.
func (o *orders) step(word string) {
	o.t.Helper()
	o.steps = append(o.steps, word)
	do, down := strings.CutSuffix(word, "*")
	if down && do != "rotate" {
		o.stopOne()
	}
	switch do {
	case "prepare":
		o.prepare(rand.Text())
	case "activate":
		id := o.stage(identity.Prepared)
		o.settle("the CA is activated", func() error { return o.activate(rand.Text(), id) })
	case "retire", "compromised":
		o.renew()
		o.keyStatus() // the new certificate counts once it is used
		id := o.stage(identity.Tainted)
		o.settle("the old CA is retired", func() error { return o.retire(rand.Text(), id, do == "compromised") })
	case "snapshot":
		for _, name := range o.running() {
			p := o.node(name)
			o.must(p.raft.SnapshotAt(p.book.Index()))
		}
	case "rotate":
		o.rotate(down)
	default:
		o.change(do)
	}
}

// lose takes the power of all machines away, some moment after the last step, and gives it back: to all but one first, another one
// each time. A majority is enough: it elects a leader and answers.
func (o *orders) lose() {
	o.t.Helper()
	o.losses++
	time.Sleep(time.Duration(o.r.IntN(4)) * time.Duration(o.r.IntN(1500)) * time.Millisecond)
	up := o.running()
	for _, n := range up {
		o.world.cut(n, true)
	}
	for _, n := range up {
		o.disks[n] = o.disks[n].Crash(o.r)
	}
	for _, n := range up {
		o.stopNode(n)
	}
	for _, n := range up {
		o.world.cut(n, false)
	}
	first := slices.Clone(o.members)
	late := ""
	if len(first) > 2 {
		i := o.losses % len(first)
		if first[i].Name == o.down {
			i = (i + 1) % len(first)
		}
		late = first[i].Name
		first = slices.Delete(first, i, i+1)
	}
	o.down = ""
	for _, m := range first {
		o.startNode(m.Name)
	}
	o.front(first[0].Name)
	began := time.Now()
	for _, m := range first {
		o.answers(m.Name, began)
	}
	o.worst = max(o.worst, time.Since(began))
	if late != "" {
		o.startNode(late)
		o.answers(late, began)
	}
	o.agree()
	o.Wait(fmt.Sprintf("after %s and a loss of power the appliance is up", strings.Join(o.steps, " ")), 20*time.Minute, o.app.Up)
}

// answers waits until a node answers the operator.
func (o *orders) answers(node string, since time.Time) {
	o.t.Helper()
	for {
		err := o.call(node, func(ctx context.Context, h *http.Client, url string) error {
			_, err := controlv1connect.NewClusterClient(h, url).ListMembers(ctx, connect.NewRequest(&controlv1.ListMembersRequest{}))
			return err
		})
		if err == nil {
			return
		}
		if time.Since(since) > 10*time.Minute {
			o.t.Fatalf("after %s, and a loss of power: node %s does not answer for 10 minutes: %v", strings.Join(o.steps, " "), node, err)
		}
		time.Sleep(time.Second)
	}
}

// The control plane outlives each order of changes of the CA, snapshot, rotation of the kek, member change, and a loss of power of all
// nodes after each of them (FAULTS.md I14).
func TestNoOrderEndsTheControlPlane(t *testing.T) {
	all := interleavings()
	if os.Getenv("DEMARC_ORDERS") != "all" {
		all = sample(all)
	}
	for i, order := range all {
		t.Run(strings.Join(order, ","), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newOrders(t, uint64(i))
				for _, word := range order {
					o.step(word)
					o.lose()
				}
				if slices.Contains(order, "rotate") || slices.Contains(order, "rotate*") {
					o.dropped()
				}
				t.Logf("%d losses of power; at the latest it answered after %s", o.losses, o.worst)
			})
		})
	}
}

// interleavings lists the orders: three steps of a CA, ordinary or compromised, among a snapshot, a rotation and a change of the members.
// In each second of them a node is down in the step that does not wait for it.
func interleavings() [][]string {
	var out [][]string
	n := 0
	for a := range 6 {
		for b := range 6 {
			for c := range 6 {
				if a == b || b == c || a == c {
					continue
				}
				order := make([]string, 6)
				member := []string{"add", "remove", "replace"}[n%3]
				order[a], order[b], order[c] = "snapshot", "rotate", member
				ca := []string{"prepare", "activate", "retire"}
				if n/3%2 == 0 {
					ca[2] = "compromised"
				}
				for i := range order {
					if order[i] == "" {
						order[i], ca = ca[0], ca[1:]
					}
				}
				if n%2 == 0 && member != "remove" { // two voters bear no loss
					for i, word := range order {
						if word == "compromised" || word == "rotate" && n%4 == 0 {
							order[i] += "*"
						}
					}
				}
				out = append(out, order)
				n++
			}
		}
	}
	return out
}

// sample is some of them: that of FAULTS.md I14 first.
func sample(all [][]string) [][]string {
	out := [][]string{{"prepare", "activate", "retire", "snapshot", "rotate"}, {"prepare", "activate", "compromised*", "snapshot", "rotate*"}}
	for i := 0; i < len(all); i += 20 {
		out = append(out, all[i])
	}
	return out
}
