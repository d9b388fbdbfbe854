// SPDX-License-Identifier: Apache-2.0

package ingress_test

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/demarc-dev/demarc/ingress"
)

func headerBlock(pseudo map[string]string, contentType string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for _, name := range []string{":method", ":scheme", ":authority", ":path"} {
		_ = e.WriteField(hpack.HeaderField{Name: name, Value: pseudo[name]})
	}
	if contentType != "" {
		_ = e.WriteField(hpack.HeaderField{Name: "content-type", Value: contentType})
	}
	return b.Bytes()
}

func statusOf(f *http2.Framer) string {
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return ""
		}
		switch x := frame.(type) {
		case *http2.MetaHeadersFrame:
			return x.PseudoValue("status")
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			return ""
		}
	}
}

// counts counts refusals.
type counts struct {
	mu sync.Mutex
	of map[ingress.Refusal]int
}

func (c *counts) add(why ingress.Refusal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of == nil {
		c.of = map[ingress.Refusal]int{}
	}
	c.of[why]++
}

func (c *counts) get(why ingress.Refusal) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.of[why]
}

// TestOneSourceCantFillTheDoors: who holds many connections with bodies that never end has no more than its share; another source is
// served, the log has one line, and the refusals are counted (FAULTS.md E5).
func TestOneSourceCantFillTheDoors(t *testing.T) {
	var log lines
	var refused counts
	entered, release := make(chan struct{}, 64), make(chan struct{})
	up := app(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			entered <- struct{}{}
			<-release
		}
		_, _ = io.WriteString(w, "ok")
	})
	defer close(release)
	g := newGate(t, ingress.Config{MaxConns: 16, ConnsPerSource: 4, Logger: slog.New(slog.NewTextHandler(&log, nil)), Refused: refused.add})
	set(t, g, public(), ingress.Site{}, webPort(up))
	to := g.Doors()[0].Addr
	for range 4 {
		c := dialFrom(t, "127.0.0.2", to)
		if _, err := io.WriteString(c, "POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nx"); err != nil {
			t.Fatal(err)
		}
		<-entered
	}
	for range 20 {
		c := dialFrom(t, "127.0.0.2", to)
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
			t.Fatalf("a connection above the share of its source: %v, want closed", err)
		}
	}
	r, err := http.NewRequest(http.MethodGet, "http://a/", nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, body := request(t, dialFrom(t, "127.0.0.3", to), r); resp.StatusCode != http.StatusOK || body != "ok" {
		t.Errorf("another source is answered %s %q", resp.Status, body)
	}
	if n := refused.get(ingress.SourceConnections); n != 20 {
		t.Errorf("%d refusals are counted, want 20", n)
	}
	if n := strings.Count(log.String(), "a source holds as many connections as one may"); n != 1 {
		t.Errorf("%d lines for 20 refusals: %s", n, log.String())
	}
}

// TestAShareComesBack: a connection that ended is not counted any more, whoever ended it.
func TestAShareComesBack(t *testing.T) {
	up, _ := echo(t)
	g := newGate(t, ingress.Config{MaxConns: 8, ConnsPerSource: 1})
	set(t, g, public(), ingress.Site{}, tcpPort(up))
	for range 5 {
		c := dialFrom(t, "127.0.0.2", g.Doors()[0].Addr)
		if err := says(c, "hello"); err != nil {
			t.Fatal(err)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(c); err != nil { // the door has closed it
			t.Fatal(err)
		}
		for end := time.Now().Add(20 * time.Second); ; <-time.After(time.Millisecond) {
			probe := dialFrom(t, "127.0.0.2", g.Doors()[0].Addr)
			ok := says(probe, "x") == nil
			_ = probe.Close()
			if ok {
				break
			}
			if time.Now().After(end) {
				t.Fatal("the source has no share any more")
			}
		}
		for end := time.Now().Add(20 * time.Second); ; <-time.After(time.Millisecond) { // the probe's, too
			probe := dialFrom(t, "127.0.0.2", g.Doors()[0].Addr)
			if says(probe, "x") == nil {
				set(t, g, allow("127.0.0.9/32"), ingress.Site{}, tcpPort(up)) // and those that are cut
				set(t, g, public(), ingress.Site{}, tcpPort(up))
				break
			}
			if time.Now().After(end) {
				t.Fatal("the source has no share any more")
			}
		}
	}
}

// TestOneSourcesRequestsAreBounded: many streams of one HTTP/2 connection are not more than a source may have under way (FAULTS.md E5).
func TestOneSourcesRequestsAreBounded(t *testing.T) {
	var refused counts
	entered, release := make(chan struct{}, 64), make(chan struct{})
	up := app(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			entered <- struct{}{}
			<-release
		}
		_, _ = io.WriteString(w, "ok")
	})
	g := newGate(t, ingress.Config{RequestsPerSource: 3, MaxRequests: 5, Refused: refused.add})
	set(t, g, public(), ingress.Site{}, webPort(up))
	to := g.Doors()[0].Addr
	many := func(from string, n int) *http2.Framer {
		c := dialFrom(t, from, to)
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		_, _ = io.WriteString(c, http2.ClientPreface)
		f := http2.NewFramer(c, c)
		_ = f.WriteSettings()
		for i := range n {
			_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), EndStream: true, EndHeaders: true,
				BlockFragment: headerBlock(map[string]string{":method": "GET", ":scheme": "http", ":authority": "a", ":path": "/slow"}, "")})
		}
		return f
	}
	f := many("127.0.0.2", 3)
	for range 3 {
		<-entered
	}
	_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: 7, EndStream: true, EndHeaders: true,
		BlockFragment: headerBlock(map[string]string{":method": "GET", ":scheme": "http", ":authority": "a", ":path": "/"}, "")})
	if got := statusOf(f); got != "429" {
		t.Errorf("the fourth request of a source is answered %q, want 429", got)
	}
	many("127.0.0.3", 2)
	for range 2 {
		<-entered
	}
	if got := statusOf(many("127.0.0.4", 1)); got != "503" {
		t.Errorf("a request above what all may have is answered %q, want 503", got)
	}
	if refused.get(ingress.SourceRequests) != 1 || refused.get(ingress.AllRequests) != 1 {
		t.Errorf("counted: %v", refused.of)
	}
	close(release)
	for end := time.Now().Add(20 * time.Second); statusOf(many("127.0.0.2", 1)) != "200"; <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a source whose requests have ended has no share any more")
		}
	}
}

// TestBehindABalancerTheNamedSourceCounts: the share is that of whom a trusted balancer names, not the balancer's own.
func TestBehindABalancerTheNamedSourceCounts(t *testing.T) {
	up, _ := echo(t)
	var refused counts
	g := newGate(t, ingress.Config{MaxConns: 16, ConnsPerSource: 1, Refused: refused.add})
	set(t, g, public(), ingress.Site{Balancers: prefixes("127.0.0.9/32")}, tcpPort(up))
	open := func(source string) error {
		c := dialFrom(t, "127.0.0.9", g.Doors()[0].Addr)
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		_, _ = io.WriteString(c, "PROXY TCP6 "+source+" ::1 1000 443\r\n")
		return says(c, "hello")
	}
	// An IPv6 source is a network of 64 bits, and those of one site of 48 bits may hold twice as much.
	for _, x := range []struct {
		source string
		want   bool
	}{{"2001:db8:1:1::1", true}, {"2001:db8:1:1::2", false}, {"2001:db8:1:2::1", true}, {"2001:db8:1:3::1", false}, {"2001:db8:2::1", true}} {
		if err := open(x.source); (err == nil) != x.want {
			t.Errorf("%s: %v", x.source, err)
		}
	}
	if n := refused.get(ingress.SourceConnections); n != 2 {
		t.Errorf("%d refusals are counted, want 2", n)
	}
}
