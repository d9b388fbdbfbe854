// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
)

// MaxUnproven bounds the inner connections whose inner handshake is not done, of all callers together. Beyond it they are refused with
// status 503. A handshake has 10 s (daemon.HTTP), so that a silent peer holds a place no longer.
const MaxUnproven = 256

// InnerListener makes the listener for appliances behind TLS inspection: a web server that accepts one upgrade, at one path, and passes
// its connections to a listener like the main one, which serve makes. places bounds those that are not authenticated yet. Without
// inner_tls in the file it returns no parts.
func InnerListener(c *configs.InnerDoor, conf *tls.Config, places int, serve func(string, net.Listener, *tls.Config) daemon.Part,
	log *slog.Logger) ([]daemon.Part, error) {
	const op = "controlplane.innerDoor"
	if c == nil {
		return nil, nil
	}
	web, err := loadWeb(c, log)
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "inner_tls.listen: %v", err)
	}
	in := newUpgradeListener(ln.Addr(), places)
	outer := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: web.get, NextProtos: []string{"http/1.1"}}
	only := outer.Clone() // net/http adds h2 to its own copy: a proxy would choose it, and HTTP/2 has no such upgrade
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return only, nil }
	return []daemon.Part{
		serve("inner", in, in.proving(conf)),
		daemon.HTTP("inner-web", ln, outer, in, log), // stops first: no new connections
	}, nil
}

// upgradeListener is a listener whose connections are upgrades to a WebSocket.
type upgradeListener struct {
	addr   net.Addr
	conns  chan net.Conn
	places chan struct{} // taken by connections that are not authenticated yet
	done   chan struct{}
	once   sync.Once
}

func newUpgradeListener(addr net.Addr, places int) *upgradeListener {
	return &upgradeListener{addr: addr, conns: make(chan net.Conn), places: make(chan struct{}, places), done: make(chan struct{})}
}

// ServeHTTP accepts an upgrade at the one path.
func (u *upgradeListener) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != mesh.InnerPath {
		http.NotFound(w, r)
		return
	}
	select {
	case u.places <- struct{}{}:
	default:
		w.Header().Set("Retry-After", "5")
		http.Error(w, "too many at once: come back", http.StatusServiceUnavailable)
		return
	}
	c, err := mesh.AcceptInner(w, r)
	if err != nil {
		<-u.places
		return
	}
	p := &pending{Conn: c, leave: sync.OnceFunc(func() { <-u.places })}
	select {
	case u.conns <- p:
	case <-u.done:
		_ = p.Close()
	}
}

// Accept implements [net.Listener].
func (u *upgradeListener) Accept() (net.Conn, error) {
	select {
	case c := <-u.conns:
		return c, nil
	case <-u.done:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener]. It ends no connection.
func (u *upgradeListener) Close() error {
	u.once.Do(func() { close(u.done) })
	return nil
}

// Addr implements [net.Listener].
func (u *upgradeListener) Addr() net.Addr { return u.addr }

// proving returns conf with one addition: a connection releases its place once its handshake is verified.
func (u *upgradeListener) proving(conf *tls.Config) *tls.Config {
	out := conf.Clone()
	out.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		now := conf
		if conf.GetConfigForClient != nil {
			c, err := conf.GetConfigForClient(h)
			if err != nil {
				return nil, err
			}
			if c != nil {
				now = c
			}
		}
		now = now.Clone()
		verify := now.VerifyConnection
		now.VerifyConnection = func(s tls.ConnectionState) error {
			if verify != nil {
				if err := verify(s); err != nil {
					return err
				}
			}
			if p := placeOf(h.Conn); p != nil {
				p.leave()
			}
			return nil
		}
		return now, nil
	}
	return out
}

// placeOf finds the connection that holds a place, below what a listener wraps around it.
func placeOf(c net.Conn) *pending {
	for {
		switch x := c.(type) {
		case *pending:
			return x
		case interface{ NetConn() net.Conn }:
			c = x.NetConn()
		default:
			return nil
		}
	}
}

// pending is a connection that holds a place.
type pending struct {
	net.Conn
	leave func()
}

// Close also releases the place.
func (p *pending) Close() error {
	p.leave()
	return p.Conn.Close()
}

// webCertificate is a certificate from files, read again when one of them changes. A broken new one leaves the old one in use.
type webCertificate struct {
	certFile, keyFile string
	log               *slog.Logger
	mu                sync.Mutex
	read              [2]stampOf
	now               atomic.Pointer[tls.Certificate]
}

type stampOf struct {
	at   time.Time
	size int64
}

func loadWeb(c *configs.InnerDoor, log *slog.Logger) (*webCertificate, error) {
	w := &webCertificate{certFile: c.CertFile, keyFile: c.KeyFile, log: log}
	if err := w.load(w.stamps()); err != nil {
		return nil, err
	}
	return w, nil
}

func (w *webCertificate) stamps() (s [2]stampOf) {
	for i, name := range []string{w.certFile, w.keyFile} {
		if fi, err := os.Stat(name); err == nil {
			s[i] = stampOf{fi.ModTime(), fi.Size()}
		}
	}
	return s
}

func (w *webCertificate) load(s [2]stampOf) error {
	w.read = s
	pair, err := tls.LoadX509KeyPair(w.certFile, w.keyFile)
	if err != nil {
		return fault.Because(err, "controlplane.innerDoor", fault.Invalid, "the certificate of inner_tls can't be read: %v", err)
	}
	w.now.Store(&pair)
	return nil
}

func (w *webCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s := w.stamps(); s != w.read {
		if err := w.load(s); err != nil {
			w.log.LogAttrs(context.Background(), slog.LevelWarn, "the new certificate of inner_tls is not used", slog.Any("err", err))
		}
	}
	return w.now.Load(), nil
}
