// SPDX-License-Identifier: Apache-2.0

package api

import "time"

// Unix returns seconds since 1970, and 0 for the zero time: a field that is not set.
func Unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
