// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/mesh"
)

// speak is one connection of a client, from the handshake to its end. It calls up once the server has welcomed it, with the
// time over which the server wants a return spread.
type speak func(ctx context.Context, leaf *tls.Certificate, raw net.Conn, up func(spread time.Duration)) error

// crowd is light clients. Each keeps its connection with the switch of a real appliance: what it does after a loss, and
// when, is the product's.
type crowd struct {
	clients []*client
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	mu    sync.Mutex
	begun time.Time      // of the present measurement
	errs  map[string]int // why sessions ended since then
}

type client struct {
	leaf *tls.Certificate

	mu    sync.Mutex
	ups   int           // connections that came up
	tries int           // dials since the beginning of the measurement
	dial  time.Duration // after that beginning, of the latest dial that got a connection
	came  time.Duration // the same, of the latest welcome
}

func newCrowd(addr string, leaves []*tls.Certificate, speak speak) (*crowd, error) {
	f := &crowd{begun: time.Now(), errs: map[string]int{}}
	for _, leaf := range leaves {
		f.clients = append(f.clients, &client{leaf: leaf})
	}
	var switches []*mesh.Switch
	for _, c := range f.clients {
		road, err := mesh.NewHTTPS(mesh.HTTPS{Addresses: []string{addr}})
		if err != nil {
			return nil, err
		}
		s, err := mesh.NewSwitch(mesh.SwitchConfig{Routes: []mesh.Route{counted{road, f, c}}, Rand: rand.Float64})
		if err != nil {
			return nil, err
		}
		switches = append(switches, s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel = cancel
	f.wg.Go(func() { // the first coming is no storm: that is measured after the kill
		for i, c := range f.clients {
			for i-f.first() > 256 && ctx.Err() == nil {
				time.Sleep(10 * time.Millisecond)
			}
			f.wg.Go(func() { f.note(switches[i].Run(ctx, f.session(c, speak))) })
		}
	})
	return f, nil
}

// counted counts the dials of a client.
type counted struct {
	mesh.Route
	f *crowd
	c *client
}

func (r counted) Dial(ctx context.Context, addr string) (net.Conn, error) {
	r.c.mu.Lock()
	r.c.tries++
	r.c.mu.Unlock()
	began := r.f.since()
	conn, err := r.Route.Dial(ctx, addr)
	if err != nil {
		r.f.note(err)
		return nil, err
	}
	r.c.mu.Lock()
	r.c.dial = began
	r.c.mu.Unlock()
	return conn, nil
}

// later is the end of a connection after which a client waits, as an appliance does: somewhere within the spread.
type later struct {
	error
	wait time.Duration
}

func (l later) Unwrap() error             { return l.error }
func (l later) RetryAfter() time.Duration { return l.wait }

func (f *crowd) session(c *client, speak speak) mesh.Session {
	return func(ctx context.Context, _ string, raw net.Conn, up func()) error {
		defer context.AfterFunc(ctx, func() { f.note(raw.Close()) })()
		wait := time.Duration(0)
		err := speak(ctx, c.leaf, raw, func(spread time.Duration) {
			wait = time.Duration(rand.Float64() * float64(spread))
			c.mu.Lock()
			c.ups++
			c.came = f.since()
			c.mu.Unlock()
			up()
		})
		if ctx.Err() != nil {
			return nil
		}
		f.note(err)
		return later{err, wait}
	}
}

// note counts why something failed, by a name of few.
func (f *crowd) note(err error) {
	if err == nil || errors.Is(err, net.ErrClosed) || errors.Is(err, context.Canceled) {
		return
	}
	name := err.Error()
	for kind, of := range map[string]error{"refused": syscall.ECONNREFUSED, "reset": syscall.ECONNRESET, "timed out": os.ErrDeadlineExceeded,
		"ended by the server": io.EOF, "pipe broken": syscall.EPIPE} {
		if errors.Is(err, of) {
			name = kind
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, known := f.errs[name]; !known && len(f.errs) == 20 {
		name = "others"
	}
	f.errs[name]++
}

func (f *crowd) since() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return time.Since(f.begun)
}

// first is how many clients have had a connection.
func (f *crowd) first() (n int) {
	for _, c := range f.clients {
		c.mu.Lock()
		if c.ups > 0 {
			n++
		}
		c.mu.Unlock()
	}
	return n
}

// lose begins a new measurement, right before the server is killed. up waits for what comes after it.
func (f *crowd) lose() {
	f.mu.Lock()
	f.begun = time.Now()
	f.errs = map[string]int{}
	f.mu.Unlock()
	for _, c := range f.clients {
		c.mu.Lock()
		c.ups, c.tries, c.dial, c.came = 0, 0, 0, 0
		c.mu.Unlock()
	}
}

// up waits until each client has a connection since the last lose.
func (f *crowd) up(limit time.Duration) error {
	for until := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		missing := len(f.clients) - f.first()
		if missing == 0 {
			return nil
		}
		if time.Now().After(until) {
			return fmt.Errorf("%d of %d connections are not up after %s; why others ended: %v", missing, len(f.clients), limit, f.reasons())
		}
	}
}

func (f *crowd) reasons() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.TrimPrefix(fmt.Sprint(f.errs), "map")
}

func (f *crowd) stop() {
	f.cancel()
	f.wg.Wait()
}

// speakChannel is the channel's protocol as an idle appliance speaks it: hello, beats, acknowledgements of orders.
func speakChannel(roots *x509.CertPool) speak {
	return func(ctx context.Context, leaf *tls.Certificate, raw net.Conn, up func(time.Duration)) error {
		mesh.KeepAlive(raw)
		if err := raw.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			return err
		}
		t := tls.Client(raw, identity.Client(identity.Fixed(leaf, roots), identity.WantNode(domain), channel.Proto))
		hello := &boundaryv1.Hello{Build: "bench", Route: "https", QuietMs: uint32(channel.MaxQuiet.Milliseconds())}
		if err := channel.Write(t, &boundaryv1.Up{Body: &boundaryv1.Up_Hello{Hello: hello}}, channel.MaxHello); err != nil {
			return err
		}
		var down boundaryv1.Down
		if err := channel.Read(t, &down, channel.MaxDown); err != nil {
			return err
		}
		w := down.GetWelcome()
		if w == nil {
			return fmt.Errorf("no welcome: %v", &down)
		}
		if err := raw.SetDeadline(time.Time{}); err != nil {
			return err
		}
		up(time.Duration(w.GetReconnectSpreadMs()) * time.Millisecond)
		l := &idler{t: t, beat: time.Duration(w.GetBeatMs()) * time.Millisecond}
		defer l.end()
		l.mu.Lock()
		l.timer = time.AfterFunc(time.Duration(rand.Float64()*float64(l.beat)), l.beats)
		l.mu.Unlock()
		return l.listen()
	}
}

// idler is a channel that is up.
type idler struct {
	t     *tls.Conn
	beat  time.Duration
	timer *time.Timer

	mu    sync.Mutex // held to write
	ended bool
	why   error // a write failed
}

func (l *idler) say(up *boundaryv1.Up) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended || l.why != nil {
		return l.why
	}
	l.why = l.t.SetWriteDeadline(time.Now().Add(10 * time.Second))
	if l.why == nil {
		l.why = channel.Write(l.t, up, channel.MaxUp)
	}
	if l.why != nil {
		return errors.Join(l.why, l.t.NetConn().Close()) // and listen ends, too
	}
	return nil
}

// beats says one beat and sets the time of the next one.
func (l *idler) beats() {
	if l.say(&boundaryv1.Up{Body: &boundaryv1.Up_Beat{Beat: &boundaryv1.Beat{}}}) != nil {
		return // listen gives the reason
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended {
		l.timer.Reset(l.beat - time.Duration(rand.Float64()*float64(l.beat)/5))
	}
}

func (l *idler) listen() error {
	for {
		if err := l.t.SetReadDeadline(time.Now().Add(channel.Patience(l.beat))); err != nil {
			return err
		}
		var down boundaryv1.Down
		if err := channel.Read(l.t, &down, channel.MaxDown); err != nil {
			l.mu.Lock()
			defer l.mu.Unlock()
			return errors.Join(l.why, err)
		}
		o := down.GetOrder()
		if o == nil {
			continue
		}
		if err := l.say(&boundaryv1.Up{Body: &boundaryv1.Up_Ack{Ack: &boundaryv1.Ack{Upto: o.GetNumber()}}}); err != nil {
			return err
		}
	}
}

func (l *idler) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.timer.Stop()
}
