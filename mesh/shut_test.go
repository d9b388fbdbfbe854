// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// TestANodeThatEndsTakesNoConnection: one that comes while a node closes its connections is closed too, or it would outlive them.
func TestANodeThatEndsTakesNoConnection(t *testing.T) {
	h := held{most: 3}
	first, _ := net.Pipe()
	if _, err := h.take(first); err != nil {
		t.Fatal(err)
	}
	h.close()
	late, peer := net.Pipe()
	if c, err := h.take(late); fault.Of(err) != fault.Unavailable || c != nil {
		t.Errorf("taken: %v, %v", c, err)
	}
	for name, c := range map[string]net.Conn{"the one it had": first, "the late one": late} {
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := c.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("%s is still open: %v", name, err)
		}
	}
	_ = peer.Close()
}
