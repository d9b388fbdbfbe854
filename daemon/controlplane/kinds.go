// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"encoding/json"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
)

// About is what the leader is told of this node.
func (s *Server) About() []byte {
	is := book.Facts{Build: s.Build, Knows: s.replica.Book.Kinds()}
	if n := s.depot.missing.Load(); n >= 0 && s.depot.store != nil {
		is.Lacks = &n
	}
	b, err := json.Marshal(is)
	if err != nil { // strings and a number
		return nil
	}
	return b
}
