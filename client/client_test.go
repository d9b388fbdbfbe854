// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client/clienttest"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, timeout time.Duration, src identity.Source, nodes ...string) *Client {
	t.Helper()
	c := New(Operator{TrustDomain: clienttest.TrustDomain, Nodes: nodes}, src, Options{Timeout: timeout})
	c.try = timeout / 2
	t.Cleanup(c.Close)
	return c
}

func register(c *Client, id string) error {
	_, err := Call(context.Background(), c, Node.RegisterCustomer, &controlv1.RegisterCustomerRequest{RequestId: id})
	return err
}

func TestACallFindsANodeThatAnswers(t *testing.T) {
	v := clienttest.NewVendor(t)
	busy := func(k fault.Kind) error { return fault.New("x", k, "not now") }
	for name, faults := range map[string][]error{
		"well": nil, "no leader": {busy(fault.NotLeader)}, "unsure": {busy(fault.Unsure), busy(fault.Unavailable)},
		"busy": {busy(fault.Busy), busy(fault.Busy), busy(fault.Busy)},
	} {
		t.Run(name, func(t *testing.T) {
			f := clienttest.NewNode(faults...)
			addr := v.Serve(f, v.Source(fleet.Node, "cp-1"))
			c := open(t, 20*time.Second, v.Source(fleet.Operator, "ann"), clienttest.Nobody(t), addr)
			if err := register(c, "r-1"); err != nil {
				t.Fatal(err)
			}
			if len(f.Registered()) != len(faults)+1 || slices.ContainsFunc(f.Registered(), func(id string) bool { return id != "r-1" }) {
				t.Errorf("request ids %q, want r-1 %d times", f.Registered(), len(faults)+1)
			}
		})
	}
}

func TestACallReturnsARefusalAtOnce(t *testing.T) {
	v := clienttest.NewVendor(t)
	for _, k := range []fault.Kind{fault.Denied, fault.Invalid, fault.NotFound, fault.Conflict, fault.Expired} {
		f := clienttest.NewNode(fault.New("x", k, "the sentence of the node"))
		addr := v.Serve(f, v.Source(fleet.Node, "cp-1"))
		c := open(t, 20*time.Second, v.Source(fleet.Operator, "ann"), addr, addr)
		if err := register(c, "r-1"); fault.Of(err) != k || fault.Text(err) != "the sentence of the node" || len(f.Registered()) != 1 {
			t.Errorf("%s: %v after %d calls", k, err, len(f.Registered()))
		}
	}
}

func TestACallPassesByAnImpostor(t *testing.T) {
	v, other := clienttest.NewVendor(t), clienttest.NewVendor(t)
	bad, good := clienttest.NewNode(), clienttest.NewNode()
	impostor := other.Serve(bad, other.Source(fleet.Node, "cp-1"))
	operator := v.Source(fleet.Operator, "ann")
	if err := register(open(t, 20*time.Second, operator, impostor, v.Serve(good, v.Source(fleet.Node, "cp-2"))), "r"); err != nil {
		t.Error(err)
	}
	err := register(open(t, 20*time.Second, operator, impostor), "r")
	if !errors.Is(err, fault.Denied) || !strings.Contains(fault.Text(err), "not your vendor") {
		t.Errorf("an impostor alone: %v, want denied", err)
	}
	if len(bad.Registered()) > 0 || len(good.Registered()) != 1 {
		t.Errorf("the impostor was told %d requests, the node %d", len(bad.Registered()), len(good.Registered()))
	}
}

func TestACallSaysThatTheCertificateIsRefused(t *testing.T) {
	v, other := clienttest.NewVendor(t), clienttest.NewVendor(t)
	f := clienttest.NewNode()
	addr := v.Serve(f, v.Source(fleet.Node, "cp-1"))
	src := v.Recognising(other.Source(fleet.Operator, "ann"))
	err := register(open(t, 20*time.Second, src, addr), "r")
	if !errors.Is(err, fault.Denied) || !strings.Contains(fault.Text(err), "certificate") {
		t.Errorf("%v, want denied with a word about the certificate", err)
	}
}

// A refusal by the only node that lives is told, and not that the others are dead; and long before the time is over.
func TestADeadNodeHidesNoRefusal(t *testing.T) {
	v, other := clienttest.NewVendor(t), clienttest.NewVendor(t)
	addr := v.Serve(clienttest.NewNode(), v.Source(fleet.Node, "cp-1"))
	src := v.Recognising(other.Source(fleet.Operator, "ann"))
	for _, nodes := range [][]string{{addr, clienttest.Nobody(t)}, {clienttest.Nobody(t), addr, clienttest.Nobody(t)}} {
		began := time.Now()
		err := register(open(t, 10*time.Minute, src, nodes...), "r")
		if !errors.Is(err, fault.Denied) || !strings.Contains(fault.Text(err), "certificate") || time.Since(began) > 5*time.Minute {
			t.Errorf("after %s: %v, want denied with a word about the certificate", time.Since(began), err)
		}
	}
}

func TestACallGivesUp(t *testing.T) {
	v := clienttest.NewVendor(t)
	operator := v.Source(fleet.Operator, "ann")
	err := register(open(t, 600*time.Millisecond, operator, clienttest.Nobody(t), clienttest.Nobody(t)), "r")
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(fault.Text(err), "no node of the control plane did it") {
		t.Errorf("nobody there: %v", err)
	}
	f := clienttest.NewNode(slices.Repeat([]error{fault.New("x", fault.Unsure, "leadership was lost")}, 1000)...)
	addr := v.Serve(f, v.Source(fleet.Node, "cp-1"))
	err = register(open(t, 600*time.Millisecond, operator, addr, clienttest.Nobody(t)), "r")
	if !errors.Is(err, fault.Unsure) || !strings.Contains(fault.Text(err), "may have happened") {
		t.Errorf("unsure to the end: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	hangs := func(_ Node, ctx context.Context,
		_ *connect.Request[controlv1.StatusRequest]) (*connect.Response[controlv1.StatusResponse], error) {
		return nil, ctx.Err()
	}
	_, err = Call(ctx, open(t, time.Minute, operator, clienttest.Nobody(t)), hangs, &controlv1.StatusRequest{})
	if !errors.Is(err, fault.Unavailable) || fault.Text(err) != "interrupted" {
		t.Errorf("interrupted: %v", err)
	}
}

func TestACallLeavesANodeThatHangs(t *testing.T) {
	v := clienttest.NewVendor(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0") // takes the connection, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	f := clienttest.NewNode()
	c := open(t, 20*time.Second, v.Source(fleet.Operator, "ann"), ln.Addr().String(), v.Serve(f, v.Source(fleet.Node, "cp-1")))
	c.try = 300 * time.Millisecond
	for range 2 {
		if err := register(c, "r"); err != nil {
			t.Fatal(err)
		}
	}
	if c.at != 1 {
		t.Errorf("the node that hangs is asked first again")
	}
}

func TestAStreamEndsWhatDoesNotMove(t *testing.T) {
	v := clienttest.NewVendor(t)
	c := open(t, 400*time.Millisecond, v.Source(fleet.Operator, "ann"), clienttest.Nobody(t))
	tries := 0
	err := c.Stream(context.Background(), func(ctx context.Context, _ Node, _ func()) error {
		tries++
		<-ctx.Done()
		return ctx.Err()
	})
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(fault.Text(err), "nothing moved") || tries != 3 {
		t.Errorf("%v after %d tries", err, tries)
	}
}
