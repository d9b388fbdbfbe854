// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync/atomic"
)

// websocket is the one protocol that a request may change its connection to. Behind any other change (h2c, TLS, a tunnel) the caller
// would speak to the application without a door between, and could name itself as it likes.
const websocket = "websocket"

// tidy takes off a request what would open a way past the door. It returns 0, or the status that the request is refused with and why.
func tidy(r *http.Request) (status int, why string) {
	if r.Method == http.MethodConnect {
		return http.StatusNotImplemented, "this door does not serve that request"
	}
	for i := range len(r.RequestURI) {
		if c := r.RequestURI[i]; c <= ' ' || c == 0x7f { // HTTP/2 can carry it, and the application would see another request line
			return http.StatusBadRequest, "the address of the request holds a blank or a control character"
		}
	}
	r.Header.Del("Http2-Settings")
	if asksWebSocket(r) {
		r.Header["Upgrade"] = []string{websocket}
	} else {
		r.Header.Del("Upgrade") // the application answers as if it had not been asked, RFC 9110 section 7.8
	}
	return 0, ""
}

// asksWebSocket reports whether a request asks for a WebSocket and for nothing else.
func asksWebSocket(r *http.Request) bool {
	to := r.Header["Upgrade"]
	return r.Method == http.MethodGet && r.ProtoMajor == 1 && r.ProtoAtLeast(1, 1) && r.ContentLength == 0 &&
		len(to) == 1 && strings.EqualFold(strings.TrimSpace(to[0]), websocket)
}

// errSwitched is of an application that changes the protocol of its connection without having been asked, or to another one.
var errSwitched = errors.New("the application changes the protocol of its connection, and was not asked to")

// switched reports whether the answer is a change of protocol that the request did not ask for.
func switched(r *http.Request, a *http.Response) bool {
	if a.StatusCode != http.StatusSwitchingProtocols {
		return false
	}
	to := a.Header["Upgrade"]
	return r.Header.Get("Upgrade") != websocket || len(to) != 1 || !strings.EqualFold(strings.TrimSpace(to[0]), websocket)
}

// answer is where an answer is written to. A 101 that comes as one of several answers (HTTP/2 forbids it) is not passed on.
type answer struct {
	http.ResponseWriter
	upgrade bool
}

// WriteHeader implements [http.ResponseWriter].
func (a *answer) WriteHeader(status int) {
	if status == http.StatusSwitchingProtocols && !a.upgrade {
		return
	}
	a.ResponseWriter.WriteHeader(status)
}

// Unwrap is for [http.ResponseController].
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// address gives the request to the application the path and the query that came in, byte for byte.
func address(r *httputil.ProxyRequest) {
	r.Out.URL.RawQuery = r.In.URL.RawQuery
	path, _, _ := strings.Cut(r.In.RequestURI, "?")
	// Opaque goes out as it is, but for one that begins with //, which would read as a host.
	if strings.HasPrefix(path, "/") && !strings.HasPrefix(path, "//") && path != r.Out.URL.EscapedPath() {
		r.Out.URL.Opaque = path
	}
}

// body is a caller's body on its way to the application. It remembers that the caller broke it off or wrote it wrongly, and at its end
// gives the trailers that were announced their values.
type body struct {
	io.ReadCloser
	in     *http.Request
	out    http.Header // trailers; those that only a door may set are not among them
	broken atomic.Bool
}

// Read implements [io.Reader]. It is called by one goroutine, which sends the trailers afterwards.
func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		for name := range b.out {
			if v, ok := b.in.Trailer[name]; ok {
				b.out[name] = v
			}
		}
	default:
		b.broken.Store(true)
		err = fmt.Errorf("the caller's body: %w", err)
	}
	return n, err
}

// names are those of headers, spelled as in [plain], that only a door may set: who the caller is, where it comes from, and what it asked
// for before something in front of the application changed it.
var names = map[string]bool{
	"forwarded": true, "x-real-ip": true, "x-client-ip": true, "client-ip": true, "true-client-ip": true, "x-true-client-ip": true,
	"x-cluster-client-ip": true, "cf-connecting-ip": true, "cf-connecting-ipv6": true, "cf-pseudo-ipv4": true, "fastly-client-ip": true,
	"x-proxyuser-ip": true, "x-remote-ip": true, "x-remote-addr": true, "x-azure-clientip": true, "x-azure-socketip": true,
	"x-appengine-user-ip": true, "x-envoy-external-address": true, "x-rewrite-url": true, "proxy": true,
}

// prefixes are those of names that only a door may set.
var prefixes = []string{"tailscale-", "x-demarc-", "x-forwarded", "x-original-"}

// reserved reports whether only a door may set this header.
func reserved(name string) bool {
	name = plain(name)
	for _, p := range prefixes {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return names[name]
}

// plain spells a header as the most careless application would read it: some read each sign but letters and digits as the same one.
func plain(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(name))
}

// speaksGRPC reports whether a request can't do without HTTP/2. gRPC-Web can: it was made for HTTP/1.1.
func speaksGRPC(r *http.Request) bool {
	kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil {
		kind, _, _ = strings.Cut(r.Header.Get("Content-Type"), ";")
		kind = strings.ToLower(strings.TrimSpace(kind))
	}
	return kind == "application/grpc" || strings.HasPrefix(kind, "application/grpc+")
}
