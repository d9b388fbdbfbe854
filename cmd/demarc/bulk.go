// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

const chunk = 256 << 10 // bytes of an artifact in one message

// upload hands an artifact to the control plane, and tells on standard error how far it is.
func (a *app) upload(ctx context.Context, v *vendor, what, file string, d fleet.Digest) error {
	const op = "demarc.upload"
	return v.bulk(ctx, func(ctx context.Context, c controlv1connect.ControlClient, alive func()) error {
		f, err := os.Open(file)
		if err != nil {
			return fault.At(op, fault.Internal, err)
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return fault.At(op, fault.Internal, err)
		}
		told := time.Now()
		err = stream(c.UploadArtifact(ctx), f, d, func(sent int64) {
			alive()
			if now := time.Now(); now.Sub(told) > time.Second {
				told = now
				a.note("%s: %d of %d bytes", what, sent, st.Size())
			}
		})
		if err == nil {
			a.note("%s: %d bytes, %s", what, st.Size(), d.Short())
		}
		return err
	})
}

// place uploads an artifact to one node and has it on the disks of a majority of the voters before it returns. Where the node that
// took the upload is gone before another one has the artifact, it is uploaded again.
func (a *app) place(ctx context.Context, v *vendor, what, file string, d fleet.Digest) error {
	const tries = 3
	for try := 1; ; try++ {
		if err := a.upload(ctx, v, what, file, d); err != nil {
			return err
		}
		err := a.replicate(ctx, v, what, d)
		if fault.Of(err) != fault.NotFound || try == tries {
			return err
		}
		a.note("%s: the node that took it is gone, and no other has it: it is uploaded again", what)
	}
}

// replicate waits until enough nodes have an artifact on disk, and tells on standard error how far they are.
func (a *app) replicate(ctx context.Context, v *vendor, what string, d fleet.Digest) error {
	return v.bulk(ctx, func(ctx context.Context, c controlv1connect.ControlClient, alive func()) error {
		s, err := c.ReplicateArtifact(ctx, connect.NewRequest(&controlv1.ReplicateArtifactRequest{Digest: string(d)}))
		if err != nil {
			return explain(err)
		}
		defer s.Close()
		var last *controlv1.ReplicateArtifactResponse
		told := time.Now()
		for s.Receive() {
			alive()
			if len(s.Msg().GetCopies()) == 0 {
				continue
			}
			last = s.Msg()
			if now := time.Now(); now.Sub(told) > time.Second {
				told = now
				a.note("%s: %s", what, spread(last))
			}
		}
		if err := s.Err(); err != nil {
			return explain(err)
		}
		a.note("%s: %s", what, spread(last))
		return nil
	})
}

// spread says which voters have an artifact, and how far the others are.
func spread(m *controlv1.ReplicateArtifactResponse) string {
	held, voters := 0, 0
	var rest []string
	for _, c := range m.GetCopies() {
		if c.GetVoter() {
			voters++
		}
		switch {
		case c.GetHeld() && c.GetVoter():
			held++
		case c.GetHeld():
		case c.GetTrouble() != "":
			rest = append(rest, fmt.Sprintf("%s has %d of %d bytes: %s", c.GetNode(), c.GetArrived(), m.GetSize(), c.GetTrouble()))
		default:
			rest = append(rest, fmt.Sprintf("%s has %d of %d bytes", c.GetNode(), c.GetArrived(), m.GetSize()))
		}
	}
	return strings.Join(append([]string{fmt.Sprintf("on the disks of %d of %d voters, %d are needed", held, voters, m.GetNeeded())}, rest...), "; ")
}

// stream streams one artifact.
func stream(to *connect.ClientStreamForClient[controlv1.UploadArtifactRequest, controlv1.UploadArtifactResponse], r io.Reader, d fleet.Digest, sent func(int64)) error {
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
		return explain(err)
	}
	return nil
}

// receive writes a stream of evidence.
func receive[M any, P interface {
	*M
	GetData() []byte
}](s *connect.ServerStreamForClient[M], w io.Writer, alive func()) error {
	defer s.Close()
	for total := 0; s.Receive(); {
		alive()
		b := P(s.Msg()).GetData()
		if total += len(b); total > audit.MaxBundle {
			return fault.New("demarc.export", fault.Invalid, "the evidence has more than %d bytes", audit.MaxBundle)
		}
		if _, err := w.Write(b); err != nil {
			return fault.At("demarc.export", fault.Unavailable, err)
		}
	}
	if err := s.Err(); err != nil {
		return explain(err)
	}
	return nil
}

// save writes evidence to a new file, whole or not at all. What fetch has written counts from its last restart on.
func (a *app) save(file string, fetch func(restart func() io.Writer) error) error {
	if file == "" {
		return usage("name the file with --out FILE")
	}
	if _, err := os.Lstat(file); err == nil {
		return fault.New("demarc.save", fault.Conflict, "%s is there already: nothing is overwritten", file)
	}
	var b bytes.Buffer
	if err := fetch(func() io.Writer { b.Reset(); return &b }); err != nil {
		return err
	}
	bundle, err := audit.ParseBundle(b.Bytes())
	if err != nil {
		return err
	}
	if err := create(file, b.Bytes(), 0o600); err != nil {
		return err
	}
	keys, err := claimed(bundle)
	if err != nil {
		return err
	}
	return a.say(map[string]any{"file": file, "bytes": b.Len(), "keys": keys}, "%d bytes of evidence are in %s; check it with: demarc verify %s --pin ORIGIN=FILE", b.Len(), file, file)
}
