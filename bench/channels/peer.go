// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
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

// measurePeer measures the bare server as the node is measured.
func (b *bench) measurePeer(o options) (*measured, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	addr := free()
	var srv *exec.Cmd
	start := func() (*exec.Cmd, error) {
		if srv, err = startProc(self, "-peer", b.vendor, "-addr", addr); err != nil {
			return nil, err
		}
		return srv, answers(addr)
	}
	defer func() { kill(srv) }()
	if _, err := start(); err != nil {
		return nil, err
	}
	return b.measure(o, srv, addr, speakStream(b.roots, spreadLike(o.n)), start)
}

// spreadLike is the spread that a node names to a fleet of n: the peer has no word for it.
func spreadLike(n int) time.Duration { return time.Duration(n) * time.Second / 1500 }

// speakStream speaks as much HTTP/2 as one open request takes, and waits for its end.
func speakStream(roots *x509.CertPool, spread time.Duration) speak {
	return func(_ context.Context, leaf *tls.Certificate, raw net.Conn, up func(time.Duration)) error {
		if err := raw.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			return err
		}
		t := tls.Client(raw, identity.Client(identity.Fixed(leaf, roots), identity.WantNode(domain), "h2"))
		fr := http2.NewFramer(t, t)
		if err := openStream(t, fr); err != nil {
			return err
		}
		if err := raw.SetDeadline(time.Time{}); err != nil {
			return err
		}
		up(spread)
		for {
			if _, err := fr.ReadFrame(); err != nil {
				return err
			}
		}
	}
}

func openStream(t *tls.Conn, fr *http2.Framer) error {
	if _, err := io.WriteString(t, http2.ClientPreface); err != nil {
		return err
	}
	var head bytes.Buffer
	enc := hpack.NewEncoder(&head)
	for _, h := range [][2]string{{":method", "POST"}, {":scheme", "https"}, {":authority", "peer"}, {":path", "/"}} {
		if err := enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}); err != nil {
			return err
		}
	}
	if err := fr.WriteSettings(); err != nil {
		return err
	}
	if err := fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: head.Bytes(), EndHeaders: true}); err != nil {
		return err
	}
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return fmt.Errorf("the peer opened no stream: %w", err)
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if f.IsAck() {
				continue
			}
			if err := fr.WriteSettingsAck(); err != nil {
				return err
			}
		case *http2.HeadersFrame:
			return nil
		}
	}
}
