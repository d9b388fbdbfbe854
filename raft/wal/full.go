// SPDX-License-Identifier: Apache-2.0

package wal

import (
	"errors"
	"syscall"
)

// reason says what the operating system said, without a path.
func reason(err error) string {
	var no syscall.Errno
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "the disk is full"
	case errors.As(err, &no):
		return no.Error()
	}
	return "the disk does not take it"
}

// Full tells whether an error is for want of space.
func Full(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }
