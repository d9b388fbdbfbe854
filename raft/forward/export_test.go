// SPDX-License-Identifier: Apache-2.0

package forward

import "io"

// CopyFrame reads a frame and writes it again, for fuzzing.
func CopyFrame(w io.Writer, r io.Reader) error {
	f, err := readFrame(r)
	if err != nil {
		return err
	}
	return writeFrame(w, f)
}
