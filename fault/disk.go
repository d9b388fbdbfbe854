// SPDX-License-Identifier: Apache-2.0

package fault

import (
	"errors"
	"syscall"
)

// Disk says in a few words, which carry no path, why a file could not be written.
func Disk(err error) string {
	for _, k := range []struct {
		errno syscall.Errno
		text  string
	}{
		{syscall.ENOSPC, "the disk is full"},
		{syscall.EDQUOT, "the disk quota is used up"},
		{syscall.EROFS, "the file system is read-only"},
		{syscall.EFBIG, "the file is as large as this host allows"},
		{syscall.EIO, "the disk failed"},
	} {
		if errors.Is(err, k.errno) {
			return k.text
		}
	}
	if no, ok := errors.AsType[syscall.Errno](err); ok {
		return no.Error()
	}
	return "the disk does not take it"
}
