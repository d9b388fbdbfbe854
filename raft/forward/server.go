// SPDX-License-Identifier: Apache-2.0

package forward

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/demarc-dev/demarc/fault"
)

// Server answers requests.
type Server struct {
	Term   func() uint64
	Handle func(ctx context.Context, peer string, kind Kind, payload []byte) ([]byte, error) // may be called concurrently
}

// Serve answers the requests of one peer, and closes the connection. If the connection breaks, what is being answered is
// cancelled; when ctx ends, what was read is answered first. It returns when all of its handlers have.
func (s Server) Serve(ctx context.Context, c Conn) {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex // guards writing
		slots = semaphore.NewWeighted(maxInFlight)
		from  = &idleConn{Conn: c}
		in    = bufio.NewReaderSize(from, bufferBytes)
	)
	work, cancel := context.WithCancel(context.WithoutCancel(ctx)) // a request that was read gets its response
	defer context.AfterFunc(ctx, from.stop)()
	defer func() {
		if ctx.Err() == nil {
			cancel()
		}
		wg.Wait()
		cancel()
		if from.isStopped() {
			sendEnd(c)
		}
		c.Abort()
	}()
	respond := func(f frame) {
		mu.Lock()
		defer mu.Unlock()
		from.allowWrite()
		if writeFrame(c, f) != nil {
			c.Abort()
		}
	}
	for {
		f, err := readFrame(in)
		if err != nil {
			return
		}
		if f.kind == Term {
			respond(frame{f.id, responseOK, number(s.Term())})
			continue
		}
		if !slots.TryAcquire(1) {
			respond(responseOf(f.id, fault.New("forward.Serve", fault.Busy, "too many requests at once: try again in a moment")))
			continue
		}
		wg.Go(func() {
			defer slots.Release(1)
			respond(s.handle(work, c.Peer(), f))
		})
	}
}

// sendEnd says that nothing more is taken, and waits until the peer has hung up: to close a connection in whose buffers is a
// request that was not read would throw away, at the peer, the responses that are on their way.
func sendEnd(c Conn) {
	_ = c.SetDeadline(time.Now().Add(lingerTimeout))
	if writeFrame(c, frame{kind: noticeEnd}) == nil {
		_, _ = io.Copy(io.Discard, c)
	}
}

func (s Server) handle(ctx context.Context, peer string, f frame) frame {
	if len(f.payload) < timeoutBytes {
		return responseOf(f.id, fault.New("forward.Serve", fault.Invalid, "a request of kind %q without a timeout", f.kind))
	}
	timeout := min(time.Duration(binary.BigEndian.Uint32(f.payload))*time.Millisecond, maxTimeout)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	answer, err := s.Handle(ctx, peer, f.kind, f.payload[timeoutBytes:])
	if err != nil {
		return responseOf(f.id, err)
	}
	return frame{f.id, responseOK, answer}
}
