// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// servePeer is the bare server: net/http, HTTP/2, the same mutual TLS, a handler that sends its header and waits.
func servePeer(dir, addr string) error {
	roots, err := readPool(filepath.Join(dir, "bundle.pem"))
	if err != nil {
		return err
	}
	leaf, err := tls.LoadX509KeyPair(filepath.Join(dir, "cp-1", "cert.pem"), filepath.Join(dir, "cp-1", "cert.key"))
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	conf := identity.Server(identity.Fixed(&leaf, roots), func(fleet.Principal, fleet.Serial) error { return nil }, true, "h2")
	srv := &http.Server{TLSConfig: conf, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		_, _ = io.Copy(io.Discard, r.Body)
	})}
	return srv.ServeTLS(ln, "", "")
}

// measurePeer opens one stream a client and gives the memory of each in KiB.
func measurePeer(dir string, roots *x509.CertPool, leaves []*tls.Certificate, settle time.Duration) (float64, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	addr := free()
	srv, err := startProc(self, "-peer", dir, "-addr", addr)
	if err != nil {
		return 0, err
	}
	defer kill(srv)
	for limit := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(limit) {
			return 0, err
		}
	}
	before := rss(srv.Process.Pid)
	conns := make([]net.Conn, len(leaves))
	errs := make([]error, len(leaves))
	var wg sync.WaitGroup
	slots := make(chan struct{}, 64)
	for i, leaf := range leaves {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			conns[i], errs[i] = openStream(addr, identity.Client(identity.Fixed(leaf, roots), identity.WantNode(domain), "h2"))
		})
	}
	wg.Wait()
	for i, c := range conns {
		if errs[i] != nil {
			return 0, errs[i]
		}
		defer c.Close()
	}
	time.Sleep(settle)
	return (rss(srv.Process.Pid) - before) / float64(len(leaves)), nil
}

// openStream speaks as much HTTP/2 as one open request takes.
func openStream(addr string, conf *tls.Config) (net.Conn, error) {
	raw, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return nil, err
	}
	_ = raw.SetDeadline(time.Now().Add(20 * time.Second))
	t := tls.Client(raw, conf)
	if _, err := io.WriteString(t, http2.ClientPreface); err != nil {
		return nil, err
	}
	fr := http2.NewFramer(t, t)
	var head bytes.Buffer
	enc := hpack.NewEncoder(&head)
	for _, h := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":authority", "peer"}, {":path", "/"}} {
		_ = enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
	}
	if err := fr.WriteSettings(); err != nil {
		return nil, err
	}
	if err := fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: head.Bytes(), EndHeaders: true}); err != nil {
		return nil, err
	}
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return nil, fmt.Errorf("the peer opened no stream: %w", err)
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				if err := fr.WriteSettingsAck(); err != nil {
					return nil, err
				}
			}
		case *http2.HeadersFrame:
			return t, raw.SetDeadline(time.Time{})
		}
	}
}
