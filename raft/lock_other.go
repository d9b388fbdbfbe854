// SPDX-License-Identifier: Apache-2.0

//go:build !unix

package raft

import "os"

// lockFile leaves it to the lock of the log's meta store, for which a second process waits.
func lockFile(*os.File) error { return nil }
