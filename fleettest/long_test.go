// SPDX-License-Identifier: Apache-2.0

package fleettest

import "os"

// Long reports whether the tests that live for months live as long as they can: make test-long.
func Long() bool { return os.Getenv("DEMARC_LONG") != "" }
