// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/mesh"
)

// crowd is light appliances: each holds a channel, beats, acknowledges orders, and comes back as an appliance does.
type crowd struct {
	addr    string
	clients []*client
	stopped atomic.Bool
	came    atomic.Int64 // clients that have had a channel
	begun   atomic.Int64 // Unix nanoseconds of the present measurement
	wg      sync.WaitGroup
}

type client struct {
	leaf *tls.Certificate
	ups  atomic.Int64 // channels that came up
	at   atomic.Int64 // after the beginning, of the latest; ns
	took atomic.Int64 // from dialling to the welcome, of the latest; ns
	conn atomic.Pointer[tls.Conn]
}

func newCrowd(addr string, roots *x509.CertPool, leaves []*tls.Certificate) *crowd {
	f := &crowd{addr: addr}
	f.begun.Store(time.Now().UnixNano())
	for _, leaf := range leaves {
		f.clients = append(f.clients, &client{leaf: leaf})
	}
	f.wg.Go(func() { // the first coming is no storm: that is measured after the kill
		for i, c := range f.clients {
			for i-f.first() > 256 {
				time.Sleep(10 * time.Millisecond)
			}
			f.wg.Go(func() { f.keep(c, roots) })
		}
	})
	return f
}

// first is how many clients have had a channel.
func (f *crowd) first() int { return int(f.came.Load()) }

// keep is what an appliance's switch does: full jitter below a ceiling that doubles to 30 s, after the named spread.
func (f *crowd) keep(c *client, roots *x509.CertPool) {
	conf := identity.Client(identity.Fixed(c.leaf, roots), identity.WantNode(domain), channel.Proto)
	for round := 0; !f.stopped.Load(); {
		spread, _ := f.session(c, conf)
		if spread > 0 {
			round = 0
		}
		wait := time.Duration(rand.Float64()*float64(spread)) + time.Duration(rand.Float64()*float64(min(30*time.Second, 500*time.Millisecond<<round)))
		time.Sleep(wait)
		round = min(round+1, 16)
	}
}

// session gives the spread that the welcome named, 0 where there was none.
func (f *crowd) session(c *client, conf *tls.Config) (time.Duration, error) {
	dialled := time.Now()
	raw, err := net.DialTimeout("tcp", f.addr, 10*time.Second)
	if err != nil {
		return 0, err
	}
	defer raw.Close()
	mesh.KeepAlive(raw)
	_ = raw.SetDeadline(time.Now().Add(20 * time.Second))
	t := tls.Client(raw, conf)
	if err := channel.Write(t, &boundaryv1.Up{Body: &boundaryv1.Up_Hello{Hello: &boundaryv1.Hello{Build: "bench", Route: "https", QuietMs: uint32(channel.MaxQuiet.Milliseconds())}}}, channel.MaxHello); err != nil {
		return 0, err
	}
	var down boundaryv1.Down
	if err := channel.Read(t, &down, channel.MaxDown); err != nil {
		return 0, err
	}
	w := down.GetWelcome()
	if w == nil {
		return 0, fmt.Errorf("no welcome: %v", &down)
	}
	c.took.Store(int64(time.Since(dialled)))
	c.at.Store(time.Now().UnixNano() - f.begun.Load())
	c.conn.Store(t)
	if c.ups.Add(1) == 1 {
		f.came.Add(1)
	}
	spread, beat := time.Duration(w.GetReconnectSpreadMs())*time.Millisecond, time.Duration(w.GetBeatMs())*time.Millisecond
	var mu sync.Mutex
	say := func(up *boundaryv1.Up) {
		mu.Lock()
		defer mu.Unlock()
		_ = t.SetWriteDeadline(time.Now().Add(10 * time.Second))
		_ = channel.Write(t, up, channel.MaxUp)
	}
	tick := time.AfterFunc(time.Hour, func() {})
	defer func() { tick.Stop() }()
	var again func()
	again = func() {
		say(&boundaryv1.Up{Body: &boundaryv1.Up_Beat{Beat: &boundaryv1.Beat{}}})
		tick.Reset(beat - time.Duration(rand.Float64()*float64(beat)/5))
	}
	tick = time.AfterFunc(time.Duration(rand.Float64()*float64(beat)), func() { again() })
	for {
		_ = t.SetReadDeadline(time.Now().Add(channel.Patience(beat)))
		var down boundaryv1.Down
		if err := channel.Read(t, &down, channel.MaxDown); err != nil {
			return spread, err
		}
		if o := down.GetOrder(); o != nil {
			say(&boundaryv1.Up{Body: &boundaryv1.Up_Ack{Ack: &boundaryv1.Ack{Upto: o.GetNumber()}}})
		}
	}
}

// lose begins a new measurement: the server was killed. It gives how many channels each client has had.
func (f *crowd) lose() int64 {
	f.begun.Store(time.Now().UnixNano())
	return 1
}

// up waits until each client has had more than had channels, and gives the time of the last arrival.
func (f *crowd) up(had int64, limit time.Duration) (time.Duration, error) {
	until := time.Now().Add(limit)
	for {
		missing, last := 0, int64(0)
		for _, c := range f.clients {
			if c.ups.Load() <= had {
				missing++
			}
			last = max(last, c.at.Load())
		}
		if missing == 0 {
			return time.Duration(last), nil
		}
		if time.Now().After(until) {
			return 0, fmt.Errorf("%d of %d channels are not up after %s", missing, len(f.clients), limit)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (f *crowd) slowest() time.Duration {
	var worst int64
	for _, c := range f.clients {
		worst = max(worst, c.took.Load())
	}
	return time.Duration(worst)
}

// histogram prints when the channels came up, in ten buckets.
func (f *crowd) histogram() {
	var last int64
	for _, c := range f.clients {
		last = max(last, c.at.Load())
	}
	var buckets [10]int
	for _, c := range f.clients {
		buckets[min(9, c.at.Load()*10/max(1, last))]++
	}
	for i, n := range buckets {
		from, to := time.Duration(last)*time.Duration(i)/10, time.Duration(last)*time.Duration(i+1)/10
		fmt.Printf("  %5.1f to %5.1f s %6d %s\n", from.Seconds(), to.Seconds(), n, strings.Repeat("#", n*50/len(f.clients)))
	}
}

func (f *crowd) stop() {
	f.stopped.Store(true)
	for _, c := range f.clients {
		if t := c.conn.Load(); t != nil {
			_ = t.NetConn().Close()
		}
	}
}

// metric reads one number of the node's metrics, 0 where it is not there.
func metric(addr, name string) float64 {
	res, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		return 0
	}
	defer res.Body.Close()
	for in := bufio.NewScanner(res.Body); in.Scan(); {
		if rest, ok := strings.CutPrefix(in.Text(), name+" "); ok {
			v, _ := strconv.ParseFloat(rest, 64)
			return v
		}
	}
	return 0
}
