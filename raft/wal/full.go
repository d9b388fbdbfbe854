// SPDX-License-Identifier: Apache-2.0

package wal

import (
	"errors"
	"syscall"
)

// Full reports whether an error is for want of space.
func Full(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }
