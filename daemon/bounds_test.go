// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bufio"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// pipes is a listener in memory: clocks are fake where these tests run.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if c, open := <-p; open {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (p pipes) Close() error { return nil }
func (pipes) Addr() net.Addr { return &net.TCPAddr{} }

// served runs a server, with unencrypted HTTP/2 where two is set, and gives one connection to it.
func served(t *testing.T, two bool) net.Conn {
	t.Helper()
	ln := make(pipes, 1)
	mine, theirs := net.Pipe()
	ln <- theirs
	close(ln)
	srv := server("test", nil, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }),
		slog.New(slog.DiscardHandler))
	srv.Protocols.SetHTTP1(!two)
	srv.Protocols.SetUnencryptedHTTP2(two)
	_ = srv.Serve(ln)
	t.Cleanup(func() {
		_ = srv.Close()
		time.Sleep(time.Second) // for the server to wait for what its peer still sends
	})
	return mine
}

// ended tells after how long a connection was ended by the other side.
func ended(t *testing.T, c io.Reader, want time.Duration, what string) {
	t.Helper()
	began := time.Now()
	_, err := io.Copy(io.Discard, c)
	if took := time.Since(began).Round(time.Second); took != want || err != nil && !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("%s: ended after %s with %v, want %s", what, took, err, want)
	}
}

// TestNobodyHoldsAServer: a connection that says nothing, half a head, or nothing more after a call ends by itself, and a head has a
// bound.
func TestNobodyHoldsAServer(t *testing.T) {
	for what, x := range map[string]struct {
		say  string
		want time.Duration
	}{
		"nothing":                {"", headerTimeout},
		"half a head":            {"GET / HTTP/1.1\r\nHost: x\r\nX-A: ", headerTimeout},
		"nothing more":           {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", idleTimeout},
		"a head of 1 MiB":        {"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + strings.Repeat("a", 1<<20) + "\r\n\r\n", 0},
		"twenty thousand fields": {"GET / HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X-A: a\r\n", 20_000) + "\r\n", 0},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := served(t, false)
				go func() { _, _ = io.WriteString(c, x.say) }() // a server that has heard enough reads no further
				r := bufio.NewReader(c)
				if x.want == 0 {
					res, err := http.ReadResponse(r, nil)
					if err != nil || res.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
						t.Fatalf("%v, %v", res, err)
					}
				}
				if x.want == idleTimeout {
					if res, err := http.ReadResponse(r, nil); err != nil || res.StatusCode != http.StatusOK {
						t.Fatalf("%v, %v", res, err)
					}
				}
				if x.want > 0 {
					ended(t, r, x.want, what)
				}
				_ = c.Close()
			})
		})
	}
}

// TestNobodyHoldsAServerOfHTTP2: calls at once on one connection have a bound, which the peer is told; a peer that answers no ping
// loses its connection.
func TestNobodyHoldsAServerOfHTTP2(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := served(t, true)
		defer c.Close()
		out := make(chan func(*http2.Framer) error, 8)
		f := http2.NewFramer(c, c)
		go func() {
			_, _ = io.WriteString(c, http2.ClientPreface)
			for say := range out {
				_ = say(f)
			}
		}()
		defer close(out)
		out <- func(f *http2.Framer) error { return f.WriteSettings() }
		began := time.Now()
		var calls, heads uint32
		var pinged time.Duration
		for {
			m, err := f.ReadFrame()
			if err != nil {
				break
			}
			switch m := m.(type) {
			case *http2.SettingsFrame:
				if !m.IsAck() {
					calls, _ = m.Value(http2.SettingMaxConcurrentStreams)
					heads, _ = m.Value(http2.SettingMaxHeaderListSize)
					out <- func(f *http2.Framer) error { return f.WriteSettingsAck() }
				}
			case *http2.PingFrame:
				pinged = time.Since(began)
			}
		}
		if calls != 64 || heads == 0 || heads > 2*maxHeaderBytes {
			t.Errorf("%d calls at once, heads of %d bytes", calls, heads)
		}
		if took := time.Since(began); pinged != pingAfter || took != pingAfter+pingTimeout {
			t.Errorf("pinged after %s, and ended after %s; want %s and %s more", pinged, took, pingAfter, pingTimeout)
		}
	})
}
