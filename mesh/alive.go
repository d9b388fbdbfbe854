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
// within 20 s where the peer's host is gone or the path drops what is sent. On what is not TCP it does nothing.
func KeepAlive(c net.Conn) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	_ = t.SetKeepAliveConfig(keepAlive)
	if raw, err := t.SyscallConn(); err == nil {
		setPatience(raw)
	}
}
