// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/fault"
)

// Sent wraps the way of a client to a server, so that what is told of a call that broke says whether it may have happened:
// [fault.Unavailable] where not all of the question had left, and [fault.Unsure] where it had, until the whole answer is here. A
// server that refuses a stream, or that goes away before it began with it, has not taken the question: HTTP/2 says so, and
// the transport asks again by itself where it can. A call that changes nothing is never in doubt. The deadline of a call counts
// like a connection that broke.
//
// What has left is known by what the transport took: it may lie in a buffer still. Doubt that was not needed is resolved
// by the same request id.
func Sent(way http.RoundTripper) http.RoundTripper { return sent{way} }

type doubtKey struct{}

// Doubt is an option of each client whose way is [Sent]: it carries the doubt to the caller also where the deadline of the call
// has passed, of which the library makes an error of its own.
func Doubt() connect.ClientOption {
	return connect.WithInterceptors(connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			in := &atomic.Bool{}
			res, err := next(context.WithValue(ctx, doubtKey{}, in), req)
			if err != nil && in.Load() && !connect.IsWireError(err) {
				return nil, connect.NewError(connect.CodeAborted, doubt(ctx, err))
			}
			return res, err
		}
	}))
}

type sent struct{ way http.RoundTripper }

// reads are the first words of procedures that change nothing.
var reads = []string{"Status", "List", "Get", "Export", "Challenge", "Bundle", "Artifact", "Access", "Review", "LoginOptions",
	"SaveSnapshot"}

// changes tells of a procedure that may do something.
func changes(path string) bool {
	name := path[strings.LastIndexByte(path, '/')+1:]
	for _, r := range reads {
		if strings.HasPrefix(name, r) {
			return false
		}
	}
	return true
}

// RoundTrip implements http.RoundTripper.
func (s sent) RoundTrip(req *http.Request) (*http.Response, error) {
	if !changes(req.URL.Path) {
		return s.way.RoundTrip(req)
	}
	left := &atomic.Bool{}
	out := req.Clone(req.Context())
	if req.Body == nil || req.Body == http.NoBody {
		left.Store(true) // from the first moment on: there is no telling
	} else {
		out.Body = &question{req.Body, left, req.ContentLength}
		if again := req.GetBody; again != nil {
			out.GetBody = func() (io.ReadCloser, error) { // the transport knows that nothing of the first try was taken
				b, err := again()
				if err != nil {
					return nil, err
				}
				left.Store(false)
				return &question{b, left, req.ContentLength}, nil
			}
		}
	}
	res, err := s.way.RoundTrip(out)
	if err != nil {
		if left.Load() && !notTaken(err) {
			return nil, doubt(req.Context(), err)
		}
		return nil, err
	}
	res.Body = reply{res.Body, req.Context()}
	return res, nil
}

// question is a body that notes when all of it was taken.
type question struct {
	io.ReadCloser
	left *atomic.Bool
	rest int64 // of the announced length; less than 0: none was announced
}

// Read implements io.Reader. It notes the end before the transport has the last bytes.
func (q *question) Read(p []byte) (int, error) {
	n, err := q.ReadCloser.Read(p)
	all := q.rest > 0 && int64(n) >= q.rest
	q.rest -= int64(n)
	if all || err == io.EOF {
		q.left.Store(true)
	}
	return n, err
}

// reply is an answer that can break.
type reply struct {
	io.ReadCloser
	ctx context.Context // of the call
}

// Read implements io.Reader.
func (r reply) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = doubt(r.ctx, err)
	}
	return n, err
}

func doubt(ctx context.Context, err error) error {
	if t, ok := ctx.Value(doubtKey{}).(*atomic.Bool); ok {
		t.Store(true)
	}
	return fault.Because(err, "api.Sent", fault.Unsure, "the connection broke, or the time was up, before the answer was here: it may have "+
		"happened, ask again with the same request id")
}

// notTaken tells of what HTTP/2 says of a stream with which the server has not begun, and of a handshake that the server broke
// off, which with TLS 1.3 is heard after the question was sent. The errors of the standard library's own
// HTTP/2 have no exported type: they are known by what they say.
func notTaken(err error) bool {
	for e := err; e != nil; e = errors.Unwrap(e) {
		s := e.Error()
		if strings.Contains(s, "remote error: tls:") || strings.Contains(s, "REFUSED_STREAM") ||
			strings.Contains(s, "received Server's graceful shutdown GOAWAY") {
			return true
		}
	}
	return false
}
