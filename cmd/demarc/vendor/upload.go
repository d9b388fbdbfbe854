// SPDX-License-Identifier: Apache-2.0

package vendor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

const chunk = 256 << 10 // bytes of an artifact in one message

// upload uploads an artifact to one node, and reports progress on standard error.
func upload(ctx context.Context, a *cli.App, v *client.Client, what, file string, d fleet.Digest) error {
	const op = "demarc.upload"
	return v.Stream(ctx, func(ctx context.Context, c client.Node, alive func()) error {
		f, err := os.Open(file)
		if err != nil {
			return fault.At(op, fault.Internal, err)
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return fault.At(op, fault.Internal, err)
		}
		reported := time.Now()
		err = stream(c.UploadArtifact(ctx), f, d, func(sent int64) {
			alive()
			if now := time.Now(); now.Sub(reported) > time.Second {
				reported = now
				a.Note("%s: %d of %d bytes", what, sent, st.Size())
			}
		})
		if err == nil {
			a.Note("%s: %d bytes, %s", what, st.Size(), d.Short())
		}
		return err
	})
}

// publishArtifact uploads an artifact to one node and returns when it is on the disks of a majority of the voters. If the node that took
// the
// upload is gone before another one has the artifact, it is uploaded again.
func publishArtifact(ctx context.Context, a *cli.App, v *client.Client, what, file string, d fleet.Digest) error {
	const tries = 3
	for try := 1; ; try++ {
		if err := upload(ctx, a, v, what, file, d); err != nil {
			return err
		}
		err := replicate(ctx, a, v, what, d)
		if fault.Of(err) != fault.NotFound || try == tries {
			return err
		}
		a.Note("%s: the node that took it is gone, and no other has it: it is uploaded again", what)
	}
}

// replicate waits until enough nodes have an artifact on disk, and reports progress on standard error.
func replicate(ctx context.Context, a *cli.App, v *client.Client, what string, d fleet.Digest) error {
	return v.Stream(ctx, func(ctx context.Context, c client.Node, alive func()) error {
		s, err := c.ReplicateArtifact(ctx, connect.NewRequest(&controlv1.ReplicateArtifactRequest{Digest: string(d)}))
		if err != nil {
			return client.Fault(err)
		}
		defer s.Close()
		var last *controlv1.ReplicateArtifactResponse
		reported := time.Now()
		for s.Receive() {
			alive()
			if len(s.Msg().GetCopies()) == 0 {
				continue
			}
			last = s.Msg()
			if now := time.Now(); now.Sub(reported) > time.Second {
				reported = now
				a.Note("%s: %s", what, copiesOf(last))
			}
		}
		if err := s.Err(); err != nil {
			return client.Fault(err)
		}
		a.Note("%s: %s", what, copiesOf(last))
		return nil
	})
}

// copiesOf says which voters have an artifact, and how far the others are.
func copiesOf(m *controlv1.ReplicateArtifactResponse) string {
	stored, voters := 0, 0
	var rest []string
	for _, c := range m.GetCopies() {
		if c.GetVoter() {
			voters++
		}
		switch {
		case c.GetHeld() && c.GetVoter():
			stored++
		case c.GetHeld():
		case c.GetTrouble() != "":
			rest = append(rest, fmt.Sprintf("%s has %d of %d bytes: %s", c.GetNode(), c.GetArrived(), m.GetSize(), c.GetTrouble()))
		default:
			rest = append(rest, fmt.Sprintf("%s has %d of %d bytes", c.GetNode(), c.GetArrived(), m.GetSize()))
		}
	}
	enough := fmt.Sprintf("on the disks of %d of %d voters, %d are needed", stored, voters, m.GetNeeded())
	return strings.Join(append([]string{enough}, rest...), "; ")
}

// stream sends one artifact, and calls sent with the number of bytes so far.
func stream(to *connect.ClientStreamForClient[controlv1.UploadArtifactRequest, controlv1.UploadArtifactResponse],
	r io.Reader, d fleet.Digest, sent func(int64)) error {
	buf, total := make([]byte, chunk), int64(0)
	for first := true; ; first = false {
		n, end := io.ReadFull(r, buf)
		if end != nil && !errors.Is(end, io.EOF) && !errors.Is(end, io.ErrUnexpectedEOF) {
			return fault.Because(end, "demarc.upload", fault.Internal, "the archive can't be read")
		}
		if n > 0 || first {
			m := &controlv1.UploadArtifactRequest{Data: buf[:n]}
			if first {
				m.Digest = string(d)
			}
			if to.Send(m) != nil {
				break // the answer says why, and it may be that all is there already
			}
		}
		total += int64(n)
		sent(total)
		if end != nil {
			break
		}
	}
	if _, err := to.CloseAndReceive(); err != nil {
		return client.Fault(err)
	}
	return nil
}
