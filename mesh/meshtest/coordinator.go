// SPDX-License-Identifier: Apache-2.0

package meshtest

import (
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// coordinator is one life of the web side. What nodes have upgraded to their own protocol is not the web server's any more:
// it is closed with the life.
type coordinator struct {
	net.Listener
	server *http.Server
	done   chan struct{} // closed when nobody accepts any more

	mu     sync.Mutex
	conns  map[net.Conn]bool
	closed bool
}

// Accept implements [net.Listener].
func (c *coordinator) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		_ = conn.Close()
		return nil, net.ErrClosed
	}
	c.conns[conn] = true
	return conn, nil
}

func (c *coordinator) close() error {
	err := c.server.Close()
	c.mu.Lock()
	c.closed = true
	for conn := range c.conns {
		_ = conn.Close()
	}
	c.mu.Unlock()
	<-c.done // until then the address is not free
	return err
}

// open begins a life of the coordinator.
func (t *Tailnet) open(l net.Listener) *coordinator {
	c := &coordinator{Listener: l, conns: map[net.Conn]bool{},
		server: &http.Server{Handler: t.front(t.handler), ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}}
	c.done = make(chan struct{})
	t.work.Go(func() { // it ends with close
		defer close(c.done)
		_ = c.server.Serve(c)
	})
	return c
}

// StopCoordinator takes the coordinator away, every connection to it, and with it the API. The relay and STUN stay.
func (t *Tailnet) StopCoordinator() error {
	t.mu.Lock()
	c := t.control
	t.control = nil
	t.mu.Unlock()
	if c == nil {
		return nil
	}
	return fault.At("meshtest.StopCoordinator", fault.Internal, c.close())
}

// StartCoordinator brings the coordinator back at its URL, with all that it knew.
func (t *Tailnet) StartCoordinator() error {
	l, err := net.Listen("tcp4", t.at)
	if err != nil {
		return fault.At("meshtest.StartCoordinator", fault.Unavailable, err)
	}
	c := t.open(l)
	t.mu.Lock()
	t.control = c
	t.mu.Unlock()
	return nil
}
