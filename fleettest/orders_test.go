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
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
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
	ann    *operator
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
	c.bundles, c.lists = map[string][]byte{}, map[string][]book.Member{}
	for _, m := range c.members {
		o.machine(m.Name)
	}
	c.shape = o.shaped
	ca, err := identity.OpenAuthority(slots[0].CertDER, slots[0].SealedKey, c.kek)
	c.must(err)
	o.ann, err = newOperator(t, c.bundle, c.connect)
	c.must(err)
	csr, err := identity.ParseCSR(o.csr(o.ann.key))
	c.must(err)
	leaf, err := ca.Issue(csr, fleet.PrincipalOf(Domain, fleet.Operator, ordersOperator), time.Now(), LeafLife,
		identity.IssueOptions{Rand: rand.Reader})
	c.must(err)
	o.ann.take(leaf)
	c.startAll()
	_, err = ledger.Submit(t.Context(), order{c.Fleet}, c.meta(), book.GenesisWith{Genesis: book.Genesis{TrustDomain: Domain, Slots: slots},
		Operator: book.FirstOperator{Name: ordersOperator, Serial: identity.SerialOf(leaf), Till: leaf.NotAfter, Issuer: slots[0].ID()}})
	c.must(err)
	_, err = ledger.Submit(t.Context(), order{c.Fleet}, c.meta(), book.RegisterCustomer{Name: "globex"})
	c.must(err)
	for _, m := range c.members { // as each node says of itself when it comes
		_, err = ledger.Submit(t.Context(), order{c.Fleet}, c.meta(), book.AddNode{Name: m.Name, Raft: m.Raft, API: m.API, Voter: true})
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

func (o *orders) keks(name string) authority.KEKFiles {
	return authority.KEKFiles{Current: filepath.Join(o.dirs[name], "kek")}
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

// until has the operator call nodes in turn until one of them does it.
func (o *orders) until(what string, do asked) {
	o.t.Helper()
	var last error
	began := time.Now()
	for i := 0; ; i++ {
		all := o.running()
		if last = o.ann.call(all[i%len(all)], do); last == nil {
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
		res, err := controlv1connect.NewControlClient(h,
			url).RenewOperator(ctx, connect.NewRequest(&controlv1.RenewOperatorRequest{Csr: o.csr(o.ann.key)}))
		if err != nil {
			return err
		}
		leaf, err := x509.ParseCertificate(res.Msg.GetCertificate())
		if err == nil {
			o.ann.take(leaf)
		}
		return err
	})
}

// authority has the operator change the CAs, which waits for others. As a refusal says, the operator then makes another call, which takes
// the newest bundle. A request keeps its id until it is answered.
func (o *orders) authority(what string, do func(ctx context.Context, c controlv1connect.ControlClient, request string) error) {
	o.t.Helper()
	request := rand.Text()
	for began := time.Now(); ; time.Sleep(5 * time.Second) {
		all := o.running()
		err := o.ann.call(all[o.r.IntN(len(all))], func(ctx context.Context, h *http.Client, url string) error {
			return do(ctx, controlv1connect.NewControlClient(h, url), request)
		})
		if err == nil {
			return
		}
		switch fault.Of(api.FromWire("fleettest.authority", err)) {
		case fault.Conflict:
			request = rand.Text()
			o.keyStatus()
		case fault.Unavailable, fault.Unsure, fault.NotLeader, fault.Busy:
		default:
			o.must(err)
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
		_, err := controlv1connect.NewKeyServiceClient(h,
			url).RotateKey(ctx, connect.NewRequest(&controlv1.RotateKeyRequest{RequestId: rand.Text()}))
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
		res, err := controlv1connect.NewClusterClient(h,
			url).AddMember(ctx,
			connect.NewRequest(
				&controlv1.AddMemberRequest{RequestId: rand.Text(), Name: name, RaftAddress: name + ":1", ApiAddress: name + ":2", Csr: o.csr(key)}))
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
	o.members = append(slices.Clone(o.members), book.Member{Name: name, Raft: name + ":1", API: name + ":2"})
	o.dirs[name] = o.t.TempDir()
	o.machine(name)
	o.startNode(name)
	return name
}

func (o *orders) without(name string) {
	o.stopNode(name)
	o.members = slices.DeleteFunc(slices.Clone(o.members), func(m book.Member) bool { return m.Name == name })
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
		o.authority("another CA is announced", func(ctx context.Context, c controlv1connect.ControlClient, request string) error {
			res, err := c.PrepareAuthority(ctx, connect.NewRequest(&controlv1.PrepareAuthorityRequest{RequestId: request}))
			if err == nil {
				o.ann.newest = max(o.ann.newest, res.Msg.GetBundleNumber())
			}
			return err
		})
	case "activate":
		id := o.stage(identity.Prepared)
		o.authority("the CA is activated", func(ctx context.Context, c controlv1connect.ControlClient, request string) error {
			_, err := c.ActivateAuthority(ctx, connect.NewRequest(&controlv1.ActivateAuthorityRequest{RequestId: request, Id: id}))
			return err
		})
	case "retire", "compromised":
		o.renew()
		o.keyStatus() // the new certificate counts once it is used
		id := o.stage(identity.Tainted)
		o.authority("the old CA is retired", func(ctx context.Context, c controlv1connect.ControlClient, request string) error {
			req := &controlv1.RetireAuthorityRequest{RequestId: request, Id: id, Compromised: do == "compromised"}
			_, err := c.RetireAuthority(ctx, connect.NewRequest(req))
			return err
		})
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
		err := o.ann.call(node, func(ctx context.Context, h *http.Client, url string) error {
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
	if !Long() {
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
