// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

const chunk = 256 << 10 // bytes of an artifact in one message

// Upload hands an artifact to every node, for each keeps its own: an appliance fetches from the node that it is
// connected to. It gives the nodes that have it, and what was wrong with each other one.
// told is called with the bytes that are on their way to a node.
func (c *Control) Upload(ctx context.Context, d fleet.Digest, open func() (io.ReadCloser, error), told func(addr string, sent int64)) (have []string, failed map[string]error) {
	failed = map[string]error{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, n := range c.nodes {
		wg.Go(func() {
			err := c.Only([]string{n.addr}).tryBulk(ctx, "client.Upload", func(ctx context.Context, rpc RPC, alive func()) error {
				return upload(ctx, rpc, d, open, func(sent int64) { alive(); told(n.addr, sent) })
			})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed[n.addr] = err
			} else {
				have = append(have, n.addr)
			}
		})
	}
	wg.Wait()
	return have, failed
}

// tryBulk is Try for a stream: its time is not bounded as long as it moves.
func (c *Control) tryBulk(ctx context.Context, op string, do func(ctx context.Context, rpc RPC, alive func()) error) error {
	var err error
	for round := range 3 {
		for _, n := range c.nodes {
			sub, cancel := context.WithCancelCause(ctx)
			stalled := fault.New(op, fault.Unavailable, "nothing moved for %s", c.TryTimeout)
			t := time.AfterFunc(c.TryTimeout, func() { cancel(stalled) })
			err = do(sub, n.rpc, func() { t.Reset(c.TryTimeout) })
			t.Stop()
			if err != nil && errors.Is(context.Cause(sub), stalled) {
				err = stalled
			} else {
				err = c.explain(op, n.addr, err)
			}
			cancel(nil)
			if err == nil || ctx.Err() != nil {
				return err
			}
			if again, next := promising(err); !again && !next {
				return err
			}
		}
		if !pause(ctx, round) {
			break
		}
	}
	return err
}

func upload(ctx context.Context, rpc RPC, d fleet.Digest, open func() (io.ReadCloser, error), sent func(int64)) error {
	f, err := open()
	if err != nil {
		return err
	}
	defer f.Close()
	stream := rpc.UploadArtifact(ctx)
	buf, total := make([]byte, chunk), int64(0)
	for first := true; ; first = false {
		n, rerr := io.ReadFull(f, buf)
		if rerr != nil && !errors.Is(rerr, io.EOF) && !errors.Is(rerr, io.ErrUnexpectedEOF) {
			return fault.Because(rerr, "client.upload", fault.Invalid, "the artifact could not be read")
		}
		m := &controlv1.UploadArtifactRequest{Data: buf[:n]}
		if first {
			m.Digest = string(d)
		}
		if n > 0 || first {
			if err := stream.Send(m); errors.Is(err, io.EOF) {
				break // the node has answered already
			} else if err != nil {
				return err
			}
		}
		total += int64(n)
		sent(total)
		if rerr != nil {
			break
		}
	}
	_, err = stream.CloseAndReceive()
	return err
}

// Export fetches the evidence of the control plane. restart makes the place that it is written to empty.
func (c *Control) Export(ctx context.Context, restart func() (io.Writer, error)) error {
	return c.tryBulk(ctx, "client.Export", func(ctx context.Context, rpc RPC, alive func()) error {
		w, err := restart()
		if err != nil {
			return err
		}
		stream, err := rpc.ExportEvidence(ctx, connect.NewRequest(&controlv1.ExportEvidenceRequest{}))
		if err != nil {
			return err
		}
		defer stream.Close()
		for stream.Receive() {
			alive()
			if _, err := w.Write(stream.Msg().GetData()); err != nil {
				return fault.Because(err, "client.Export", fault.Invalid, "the evidence could not be written")
			}
		}
		return stream.Err()
	})
}
