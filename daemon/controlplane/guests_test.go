// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/fault"
)

// caller is one client, with connections of its own.
type caller struct {
	h     *house
	http  *http.Client
	dials atomic.Int64
}

func (h *house) caller(leaf *tls.Certificate) *caller {
	c := &caller{h: h}
	way := &http.Transport{TLSClientConfig: h.conf(leaf, "h2"), Protocols: new(http.Protocols), DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		c.dials.Add(1)
		return new(net.Dialer).DialContext(ctx, network, addr)
	}}
	way.Protocols.SetHTTP2(true)
	c.http = &http.Client{Transport: way}
	h.t.Cleanup(way.CloseIdleConnections)
	return c
}

// call makes one call.
func (c *caller) call() error {
	_, err := controlv1connect.NewOperatorServiceClient(c.http, "https://"+c.h.addr).ListOperators(c.h.t.Context(), connect.NewRequest(&controlv1.ListOperatorsRequest{}))
	if err != nil {
		return api.FromWire("test", err)
	}
	return nil
}

// begin makes a call whose question does not end before end is called; its outcome comes then.
func (c *caller) begin() (end func() error) {
	r, w := io.Pipe()
	req, err := http.NewRequestWithContext(c.h.t.Context(), http.MethodPost, "https://"+c.h.addr+controlv1connect.OperatorServiceListOperatorsProcedure, r)
	ok(c.h.t, err)
	req.Header.Set("Content-Type", "application/json")
	out := make(chan error, 1)
	go func() {
		res, err := c.http.Do(req)
		if err == nil {
			defer res.Body.Close()
			if b, _ := io.ReadAll(res.Body); res.StatusCode != http.StatusOK {
				err = fmt.Errorf("%s: %s", res.Status, b)
			}
		}
		out <- err
	}()
	_, err = w.Write([]byte("{")) // it returns once the connection takes it
	ok(c.h.t, err)
	return func() error {
		_, _ = w.Write([]byte("}"))
		_ = w.Close()
		return <-out
	}
}

func crowded(t *testing.T, err error) {
	t.Helper()
	if fault.Of(err) != fault.Busy || !strings.Contains(fault.Text(err), fmt.Sprintf("%d connections of spiffe://acme.example/operator/ann", controlplane.OperatorEach)) {
		t.Fatalf("over the bound: %v", err)
	}
}

// TestThreeHundredClientsOfOneCertificate call in turn, and keep their connections. As many as the bound allows lose no call; the
// others are told that there is no room, and get in once there is.
func TestThreeHundredClientsOfOneCertificate(t *testing.T) {
	var full count
	h := openWith(t, func(o *controlplane.Options) { // none counts as idle, however long the 300 take to come
		o.Meter.Crowded, o.CallsIdle = &full, time.Hour
	})
	leaf := h.operator()
	var in, out []*caller
	for i := range 300 {
		c := h.caller(leaf)
		if err := c.call(); i < controlplane.OperatorEach {
			ok(t, err)
			in = append(in, c)
		} else {
			crowded(t, err)
			out = append(out, c)
		}
	}
	for _, c := range in {
		ok(t, c.call())
		if n := c.dials.Load(); n != 1 {
			t.Fatalf("a client below the bound had to come %d times", n)
		}
	}
	if full.n.Load() < int64(len(out)) {
		t.Fatalf("%d are counted as refused, %d were", full.n.Load(), len(out))
	}
	for _, c := range in[:len(out)] {
		c.http.CloseIdleConnections()
	}
	for _, c := range out {
		within(t, time.Minute, "there is room, and who was refused does not get in", func() bool { return c.call() == nil })
	}
}

// TestIdleConnectionsGiveWay: more clients of one certificate than may stay call all the time, each connection soon gives way to
// another, and no call is lost: not one that the client had sent, and not one that was under way all the time.
func TestIdleConnectionsGiveWay(t *testing.T) {
	var gave count
	h := openWith(t, func(o *controlplane.Options) { o.Meter.Displaced, o.CallsIdle = &gave, time.Nanosecond })
	leaf := h.operator()
	long := h.caller(leaf)
	end := long.begin()
	within(t, 20*time.Second, "a call that was sent has not begun", func() bool { return h.server.AtWork() > 0 })
	var wg sync.WaitGroup
	few := make(chan struct{}, 48) // at once: a source with more handshakes than that has a second for each, which a busy machine doesn't keep
	for range 300 {
		c := h.caller(leaf)
		wg.Go(func() {
			for i := range 4 {
				few <- struct{}{}
				err := c.call()
				<-few
				if err != nil && fault.Of(err) != fault.Busy { // that none was idle is said
					t.Errorf("call %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
	if err := end(); err != nil {
		t.Errorf("a call was cut off for other connections: %v", err)
	}
	if gave.n.Load() == 0 {
		t.Fatal("no connection gave way: this test shows nothing")
	}
	if n := long.dials.Load(); n != 1 {
		t.Errorf("the long call needed %d connections", n)
	}
}

// TestConnectionsAtWorkStay: where all connections of an operator are in use, another one is told so, those of others are served,
// and what is beyond all bounds is closed.
func TestConnectionsAtWorkStay(t *testing.T) {
	h := openWith(t, func(o *controlplane.Options) { o.CallsIdle = time.Nanosecond })
	leaf := h.operator()
	ok(t, h.caller(leaf).call()) // who calls first is adopted
	var ends []func() error
	for i := range controlplane.OperatorEach {
		ends = append(ends, h.caller(leaf).begin())
		within(t, 20*time.Second, "a call that was sent has not begun", func() bool { return h.server.AtWork() > i })
	}
	crowded(t, h.caller(leaf).call())
	if err := h.caller(nil).call(); fault.Of(err) != fault.Denied { // the table refuses a stranger: it was heard
		t.Fatalf("a stranger beside a crowded operator: %v", err)
	}
	var cut atomic.Int32
	var quiet []*tls.Conn
	for range controlplane.OperatorEach + 8 { // they say nothing, and wait for an answer
		c, err := h.dial(leaf, "h2")
		ok(t, err)
		quiet = append(quiet, c)
		go func() {
			_, _ = io.Copy(io.Discard, c)
			cut.Add(1)
		}()
	}
	within(t, 5*time.Second, "connections over all bounds stand", func() bool { return cut.Load() >= 8 })
	for _, c := range quiet {
		c.Close()
	}
	for i, end := range ends {
		if err := end(); err != nil {
			t.Fatalf("call %d was cut off for other connections: %v", i, err)
		}
	}
}
