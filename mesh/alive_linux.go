// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// patience is how long, in milliseconds, what was sent may stay without an acknowledgement of the peer's kernel.
const patience = 20_000

func setPatience(c syscall.RawConn) {
	_ = c.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, patience)
	})
}
