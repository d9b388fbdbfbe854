// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package mesh

import "syscall"

// setPatience does nothing: the system has no such setting, and keep-alive alone finds a dead path.
func setPatience(syscall.RawConn) {}
