// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/net/http2"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
)

// teller is a server that counts what it did.
type teller struct {
	controlv1connect.UnimplementedControlHandler
	done  atomic.Int64
	until chan struct{} // an answer waits for it
}

func (s *teller) RegisterCustomer(context.Context,
	*connect.Request[controlv1.RegisterCustomerRequest]) (*connect.Response[controlv1.RegisterCustomerResponse], error) {
	s.done.Add(1)
	<-s.until
	return connect.NewResponse(&controlv1.RegisterCustomerResponse{}), nil
}

func (s *teller) Status(context.Context, *connect.Request[controlv1.StatusRequest]) (*connect.Response[controlv1.StatusResponse], error) {
	s.done.Add(1)
	<-s.until
	return connect.NewResponse(&controlv1.StatusResponse{}), nil
}

// cutter is a listener before a server that hangs up on both once so many bytes went a way.
type cutter struct {
	ln       net.Listener
	to       string
	up, down int64 // bytes; less than 0: all
	wg       sync.WaitGroup
}

func newCutter(t *testing.T, to string, up, down int64) *cutter {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{ln: ln, to: to, up: up, down: down}
	c.wg.Go(func() {
		for {
			here, err := ln.Accept()
			if err != nil {
				return
			}
			there, err := net.Dial("tcp", to)
			if err != nil {
				_ = here.Close()
				continue
			}
			end := func() { _ = here.Close(); _ = there.Close() }
			pass := func(to io.Writer, from io.Reader, most int64) {
				defer end()
				if most < 0 {
					_, _ = io.Copy(to, from)
					return
				}
				_, _ = io.CopyN(to, from, most)
			}
			c.wg.Go(func() { pass(there, here, c.up) })
			c.wg.Go(func() { pass(here, there, c.down) })
		}
	})
	t.Cleanup(func() { _ = ln.Close(); c.wg.Wait() })
	return c
}

// What is known of a call depends on how much of it left, and is told apart: the way breaks at chosen bytes.
func TestACallThatBreaks(t *testing.T) {
	for _, tc := range []struct {
		name     string
		up, down int64
		size     int           // of the question, about
		wait     time.Duration // of the call
		read     bool
		want     fault.Kind
		done     int64
	}{
		{"in the first byte of the handshake", 0, -1, 10, time.Minute, false, fault.Unavailable, 0},
		{"in the handshake", 200, -1, 10, time.Minute, false, fault.Unavailable, 0},
		{"in the server's handshake", -1, 500, 10, time.Minute, false, fault.Unavailable, 0},
		{"in a large question", 200 << 10, -1, 16 << 20, time.Minute, false, fault.Unavailable, 0},
		{"the time is up before the answer", -1, -1, 10, time.Second, false, fault.Unsure, 1},
		{"a read is never in doubt", -1, -1, 10, time.Second, true, fault.Unavailable, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &teller{until: make(chan struct{})}
			mux := http.NewServeMux()
			mux.Handle(controlv1connect.NewControlHandler(s))
			srv := httptest.NewUnstartedServer(mux)
			srv.EnableHTTP2 = true
			srv.StartTLS()
			defer srv.Close()
			defer close(s.until)
			cut := newCutter(t, srv.Listener.Addr().String(), tc.up, tc.down)
			way := srv.Client().Transport.(*http.Transport).Clone()
			defer way.CloseIdleConnections()
			client := controlv1connect.NewControlClient(&http.Client{Transport: api.Sent(way)}, "https://"+cut.ln.Addr().String(), api.Doubt())
			ctx, cancel := context.WithTimeout(t.Context(), tc.wait)
			defer cancel()
			var err error
			if tc.read {
				_, err = client.Status(ctx, connect.NewRequest(&controlv1.StatusRequest{}))
			} else {
				_, err = client.RegisterCustomer(ctx,
					connect.NewRequest(&controlv1.RegisterCustomerRequest{Name: string(bytes.Repeat([]byte("x"), tc.size))}))
			}
			if got := fault.Of(api.FromWire("test", err)); got != tc.want || s.done.Load() != tc.done {
				t.Errorf("%q, done %d times, want %q and %d: %v", got, s.done.Load(), tc.want, tc.done, err)
			}
		})
	}
}

// The server hangs up with the question in hand, or in the midst of its answer.
func TestAServerThatGoesAway(t *testing.T) {
	for name, tc := range map[string]struct {
		say  func(f *http2.Framer, stream uint32)
		want fault.Kind
	}{
		"it hangs up":                      {func(*http2.Framer, uint32) {}, fault.Unsure},
		"it refuses the stream":            {func(f *http2.Framer, s uint32) { _ = f.WriteRSTStream(s, http2.ErrCodeRefusedStream) }, ""},
		"it breaks the stream off":         {func(f *http2.Framer, s uint32) { _ = f.WriteRSTStream(s, http2.ErrCodeInternal) }, fault.Unsure},
		"it goes away, and did not begin":  {func(f *http2.Framer, _ uint32) { _ = f.WriteGoAway(0, http2.ErrCodeNo, nil) }, ""},
		"it goes away, and may have begun": {func(f *http2.Framer, s uint32) { _ = f.WriteGoAway(s, http2.ErrCodeNo, nil) }, fault.Unsure},
		"it hangs up in its answer's head": {func(f *http2.Framer, s uint32) {
			_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: s, BlockFragment: []byte{0x88}})
		}, fault.Unsure},
		"it hangs up after the answer came": {answerWell, ""},
	} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewUnstartedServer(nil) // for its certificate
			srv.EnableHTTP2 = true
			srv.StartTLS()
			defer srv.Close()
			ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: srv.TLS.Certificates, NextProtos: []string{"h2"}})
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			var asked atomic.Int64
			say := func(f *http2.Framer, s uint32) { // the transport asks again by itself where nothing was taken, and is answered
				if asked.Add(1) > 1 {
					answerWell(f, s)
					return
				}
				tc.say(f, s)
			}
			wg.Go(func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					serveOnce(c, name == "it refuses the stream", say)
				}
			})
			defer wg.Wait()
			defer ln.Close()
			way := srv.Client().Transport.(*http.Transport).Clone()
			defer way.CloseIdleConnections()
			client := controlv1connect.NewControlClient(&http.Client{Transport: api.Sent(way)}, "https://"+ln.Addr().String(), api.Doubt())
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, err = client.RegisterCustomer(ctx, connect.NewRequest(&controlv1.RegisterCustomerRequest{Name: "initech"}))
			again := map[bool]int64{true: 2, false: 1}[tc.want == "" && name != "it hangs up after the answer came"]
			if got := fault.Of(api.FromWire("test", err)); got != tc.want || asked.Load() != again {
				t.Errorf("%q, asked %d times, want %q and %d: %v", got, asked.Load(), tc.want, again, err)
			}
		})
	}
}

func answerWell(f *http2.Framer, s uint32) {
	// :status 200, and content-type: application/proto, spelled out
	head := append([]byte{0x88, 0x0f, 0x10, 17}, "application/proto"...)
	_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: s, BlockFragment: head, EndHeaders: true, EndStream: true})
}

// serveOnce reads a question whole, says something, and hangs up.
func serveOnce(c net.Conn, refuses bool, say func(*http2.Framer, uint32)) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.CopyN(io.Discard, c, int64(len(http2.ClientPreface))); err != nil {
		return
	}
	f := http2.NewFramer(c, c)
	if f.WriteSettings() != nil {
		return
	}
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			return
		}
		if h := fr.Header(); (h.Type == http2.FrameData || h.Type == http2.FrameHeaders) && h.Flags.Has(http2.FlagDataEndStream) {
			say(f, h.StreamID)
			if refuses {
				refuses = false
				continue // the next try comes on this connection
			}
			_ = c.(*tls.Conn).CloseWrite()
			_, _ = io.Copy(io.Discard, c)
			return
		}
	}
}

type wayThat func(*http.Request) (*http.Response, error)

func (w wayThat) RoundTrip(r *http.Request) (*http.Response, error) { return w(r) }

// What a transport says once it has the whole question.
func TestWhatATransportSays(t *testing.T) {
	for says, want := range map[string]fault.Kind{
		"unexpected EOF": fault.Unsure,
		// what it was
		"http2: Transport: cannot retry err [stream error: stream ID 1; REFUSED_STREAM] after Request.Body was written": fault.Internal,
		"http2: Transport received Server's graceful shutdown GOAWAY":                                                   fault.Internal,
		"remote error: tls: bad certificate":                                                                            fault.Internal,
		"http2: server sent GOAWAY and closed the connection; LastStreamID=1, ErrCode=NO_ERROR":                         fault.Unsure,
	} {
		way := api.Sent(wayThat(func(r *http.Request) (*http.Response, error) {
			_, _ = io.Copy(io.Discard, r.Body)
			return nil, errors.New(says)
		}))
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://x"+controlv1connect.ControlRegisterCustomerProcedure,
			bytes.NewReader([]byte("question")))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := way.RoundTrip(req); fault.Of(err) != want {
			t.Errorf("%s: %v, want %s", says, err, want)
		}
	}
}
