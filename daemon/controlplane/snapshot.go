// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"bufio"
	"context"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
)

// A snapshot file is lines: the name of the format, a header, a snapshot of the book (see the ledger room), which ends
// with a SHA-256 of its own, and the SHA-256 of everything before the last line.
//
//	demarc-snapshot/1
//	{"index":7,"term":2,"at":"...","node":"cp-1","build":"...","trust_domain":"acme.example"}
//	demarc-ledger/1
//	...
//	sha256:<hex>
//	sha256:<hex>
//
// It holds the whole book with its audit log: names of customers and appliances, who did what, releases, requests. The
// keys of the CAs in it are sealed with the key that the operator keeps; released output is encrypted to who asked.

// SaveSnapshot streams a snapshot of the book as it is now.
func (c cluster) SaveSnapshot(ctx context.Context, _ *connect.Request[controlv1.SaveSnapshotRequest], stream *connect.ServerStream[controlv1.SaveSnapshotResponse]) error {
	const op = "controlplane.SaveSnapshot"
	m, err := c.membership()
	if err != nil {
		return err
	}
	if err := c.replica.Read(ctx); err != nil {
		return err
	}
	all, err := m.Members(ctx)
	if err != nil {
		return err
	}
	stored, err := c.replica.Book.Snapshot()
	if err != nil {
		return fault.At(op, "", err)
	}
	out := bufio.NewWriterSize(sender(func(b []byte) error { return stream.Send(&controlv1.SaveSnapshotResponse{Data: b}) }), chunk)
	h := book.SnapshotHead{Index: c.replica.Book.Index(), Term: all.Term, At: c.replica.Now().UTC(), Node: c.replica.Node, Build: c.Build, TrustDomain: c.replica.View().TrustDomain}
	if err := book.WriteSnapshot(out, h, stored); err != nil {
		return err
	}
	return out.Flush()
}

// sender makes a writer of messages of at most a chunk.
type sender func([]byte) error

// Write implements io.Writer.
func (s sender) Write(b []byte) (int, error) {
	n := 0
	for n < len(b) {
		k := min(chunk, len(b)-n)
		if err := s(b[n : n+k]); err != nil {
			return n, err
		}
		n += k
	}
	return n, nil
}
