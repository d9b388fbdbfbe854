// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/netmap"

	"github.com/demarc-dev/demarc/fault"
)

// MaxHeld is how many connections one tailnet node holds at most by default, those that it dialled and those that it took in
// together. What is taken in beyond it is closed at once; what is dialled beyond it fails.
const MaxHeld = 16384

// held are a node's connections. Its zero value holds none, and takes none.
type held struct {
	most int

	mu    sync.Mutex
	conns map[*heldConn]struct{}
	shut  bool
}

// heldConn is a connection that its node knows of until it is closed.
type heldConn struct {
	net.Conn
	of   *held
	once sync.Once
}

// CloseWrite ends one direction, where the connection can.
func (c *heldConn) CloseWrite() error {
	if h, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return c.Close()
}

// Close forgets the connection and closes it.
func (c *heldConn) Close() error {
	c.once.Do(func() {
		c.of.mu.Lock()
		defer c.of.mu.Unlock()
		delete(c.of.conns, c)
	})
	return c.Conn.Close()
}

// take keeps a connection, or closes it where there is no room or the node ends.
func (h *held) take(raw net.Conn) (net.Conn, error) {
	c := &heldConn{Conn: raw, of: h}
	h.mu.Lock()
	full, shut := len(h.conns) >= h.most, h.shut
	if !full && !shut {
		if h.conns == nil {
			h.conns = map[*heldConn]struct{}{}
		}
		h.conns[c] = struct{}{}
	}
	h.mu.Unlock()
	if !full && !shut {
		return c, nil
	}
	_ = raw.Close() // nothing was promised
	if shut {
		return nil, fault.New("mesh.Node", fault.Unavailable, "the tailnet node is being closed")
	}
	return nil, h.busy()
}

// room tells that there is room for one more, so that nothing is dialled for nothing.
func (h *held) room() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.conns) < h.most {
		return nil
	}
	return h.busy()
}

func (h *held) busy() error {
	return fault.New("mesh.Node", fault.Busy, "the tailnet node holds %d connections, and takes no more", h.most)
}

// close closes them all, and takes none any more.
func (h *held) close() {
	h.mu.Lock()
	h.shut = true
	conns := h.conns
	h.conns = nil
	h.mu.Unlock()
	for c := range conns {
		_ = c.Close() // its user is told by the next read
	}
}

// door is a listener whose connections the node holds.
type door struct {
	net.Listener
	held *held
}

// Accept gives the next connection for which there is room.
func (d *door) Accept() (net.Conn, error) {
	for {
		raw, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c, err := d.held.take(raw); err == nil {
			return c, nil
		}
	}
}

// drainWait bounds the wait for what a node has still to send when it ends.
const drainWait = 10 * time.Second

// lastAddr is the one address that a stack has while it ends: of the network for examples (RFC 5737), which is no tailnet's.
var lastAddr = netip.MustParseAddrPort("192.0.2.1:9")

// quiesce leaves the library's stack with nothing to send, before the library closes it. The library stops the one reader of the
// stack's queue of outgoing packets, 512 places, and only then resets every connection of the stack, those that were closed within
// the last minute and those whose peer is dead among them. With more of them than places it waits for ever. So it does where more
// timers of connections than places are about to send something again.
//
// So: the node's own connections are closed while the queue still has its reader, and their ends go out. Then the stack loses its
// addresses: a connection without an address has no way out, so what it would send again, and the reset at its end, are dropped
// where they are made, and wait for nobody. In their place it has one address that is nobody's, and sends itself a packet there:
// it comes back when all that was in front of it in the queue has gone out.
func (n *Node) quiesce() {
	n.shut()
	n.held.close()
	if n.client == nil {
		return // it never started, and nothing empties its queue
	}
	stack, ok := n.server.Sys().Netstack.GetOK()
	if !ok {
		return
	}
	self := &tailcfg.Node{Addresses: []netip.Prefix{netip.PrefixFrom(lastAddr.Addr(), 32)}}
	stack.UpdateNetstackIPs(&netmap.NetworkMap{SelfNode: self.View()})
	if s, ok := stack.(interface {
		ListenPacket(network, address string) (net.PacketConn, error)
	}); ok {
		if err := drained(s.ListenPacket); err != nil {
			n.cfg.Logger.Warn("a tailnet node that ends has not sent all that it had to", "hostname", n.cfg.Hostname, "err", err)
		}
	}
	stack.UpdateNetstackIPs(nil)
}

// drained waits for a packet from [lastAddr] to itself.
func drained(listen func(network, address string) (net.PacketConn, error)) error {
	c, err := listen("udp4", lastAddr.String())
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(drainWait)); err != nil {
		return err
	}
	if _, err := c.WriteTo([]byte{0}, net.UDPAddrFromAddrPort(lastAddr)); err != nil {
		return err
	}
	_, _, err = c.ReadFrom(make([]byte, 1))
	return err
}
