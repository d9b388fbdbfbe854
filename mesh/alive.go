// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"net"
	"time"
)

// Keep-alive of a connection that may be silent for long: the kernels find a path that swallows everything within 20 s,
// and no program wakes for it. It ends at a proxy, so a channel has beats of its own besides.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 2}

// KeepAlive has the kernel watch a TCP connection, RFC 1122 section 4.2.3.6 and TCP_USER_TIMEOUT (RFC 5482): it fails
// within 20 s where the peer's host is gone or the path drops what is sent. Of a tunnel it is the way to the proxy that is
// watched. On what is not TCP it does nothing.
func KeepAlive(c net.Conn) {
	for {
		switch x := c.(type) {
		case *net.TCPConn:
			_ = x.SetKeepAliveConfig(keepAlive)
			if raw, err := x.SyscallConn(); err == nil {
				setPatience(raw)
			}
			return
		case interface{ NetConn() net.Conn }:
			c = x.NetConn()
		default:
			return
		}
	}
}

// Straight tells that c is a TCP connection of this host's kernel and goes through no proxy that this package asked for:
// keep-alive then watches the whole path, as far as this host can know. It is false for a tunnel through a proxy, for
// what travels inside another connection, and for a tailnet, whose TCP is not the kernel's.
func Straight(c net.Conn) bool {
	_, ok := c.(*net.TCPConn)
	return ok
}
