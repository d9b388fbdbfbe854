// SPDX-License-Identifier: Apache-2.0

package roads

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc-dev/demarc/mesh/roadtest"
)

// wire is a cable of our own between two links: every frame is read from one and written to the other, and may wait on the way. It is
// to WireGuard what a relay is to TCP. Questions to the resolver and the road beside the tailnet never wait.
type wire struct {
	ends  [2]int
	over  sync.WaitGroup
	stop  chan struct{}
	fails atomic.Pointer[error]

	mu      sync.Mutex
	slow    bool
	noUDP   bool // but for the resolver
	changed chan struct{}
	waited  map[string]int // frames that waited for all of the delay, by protocol
}

// Of a cable: frames that wait at once, each way, and the longest of them, in bytes. A kernel hands over what it would have cut up later.
const (
	wireHolds = 16 << 10
	wireFrame = 80 << 10
	vnetHead  = 10 // the kernel's note on a frame whose checksum or cut is still to be made
	etherHead = 14
)

// newWire begins, in the network namespace of the thread that calls.
func newWire(one, other string) (*wire, error) {
	w := &wire{stop: make(chan struct{}), changed: make(chan struct{}), waited: map[string]int{}}
	all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
	for i, link := range []string{one, other} {
		at, err := net.InterfaceByName(link)
		if err != nil {
			return nil, errors.Join(err, w.shut(i))
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) // nothing comes in before it is bound
		if err != nil {
			return nil, errors.Join(err, w.shut(i))
		}
		w.ends[i] = fd
		if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20),
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: at.Index})); err != nil {
			return nil, errors.Join(err, w.shut(i+1))
		}
	}
	for _, way := range [][2]int{{w.ends[0], w.ends[1]}, {w.ends[1], w.ends[0]}} {
		w.over.Go(func() { w.carry(way[0], way[1]) })
	}
	return w, nil
}

func (w *wire) shut(n int) (err error) {
	for _, fd := range w.ends[:n] {
		err = errors.Join(err, unix.Close(fd))
	}
	return err
}

// frame is one that waits, and until when.
type frame struct {
	b     []byte
	until time.Time
	proto string
}

// carry passes one direction on. What does not wait overtakes what does.
func (w *wire) carry(from, to int) {
	line := make(chan frame, wireHolds)
	var waits sync.WaitGroup
	waits.Go(func() {
		for f := range line {
			if w.wait(f.until) {
				w.late(f)
				w.put(to, f.b)
			}
		}
	})
	defer waits.Wait()
	defer close(line)
	for b := make([]byte, wireFrame); ; {
		n, _, err := unix.Recvfrom(from, b, 0)
		select {
		case <-w.stop:
			return
		default:
		}
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			w.fail(err)
			return
		}
		slow, drop, proto := w.judge(b[:n])
		switch {
		case drop:
		case !slow:
			w.put(to, b[:n])
		default:
			select {
			case line <- frame{append([]byte(nil), b[:n]...), time.Now().Add(roadtest.Delay), proto}:
			default:
				w.fail(fmt.Errorf("%d frames wait", wireHolds))
			}
		}
	}
}

// late counts a frame that waited for all of the delay.
func (w *wire) late(f frame) {
	if time.Now().Before(f.until) {
		return // let go before its time
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waited[f.proto]++
}

// judge says what is done with a frame.
func (w *wire) judge(b []byte) (slow, drop bool, proto string) {
	f := flow{proto: "short"}
	if len(b) >= vnetHead+etherHead {
		f, _ = parse(binary.BigEndian.Uint16(b[vnetHead+12:]), b[vnetHead+etherHead:])
	}
	beside := false
	for _, at := range []uint16{f.src.Port(), f.dst.Port()} {
		beside = beside || f.proto == "udp" && at == 53 || f.proto == "tcp" && fmt.Sprint(at) == port
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if beside || !f.src.IsValid() { // the last: ARP and the like
		return false, false, f.proto
	}
	if w.noUDP && f.proto == "udp" {
		return false, true, f.proto
	}
	return w.slow, false, f.proto
}

// wait is until a time, or until nothing waits any more; false when the wire ends.
func (w *wire) wait(until time.Time) bool {
	for {
		w.mu.Lock()
		slow, changed := w.slow, w.changed
		w.mu.Unlock()
		left := time.Until(until)
		if !slow || left <= 0 {
			return true
		}
		select {
		case <-time.After(left):
		case <-changed:
		case <-w.stop:
			return false
		}
	}
}

// put writes a frame. A link that has no room loses it, as links do.
func (w *wire) put(to int, b []byte) {
	if err := unix.Send(to, b, 0); err != nil && !errors.Is(err, unix.ENOBUFS) {
		w.fail(fmt.Errorf("a frame of %d bytes: %w", len(b), err))
	}
}

func (w *wire) fail(err error) { w.fails.CompareAndSwap(nil, &err) }

// set has frames wait, or lets all go that do.
func (w *wire) set(slow bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.slow = slow
	close(w.changed)
	w.changed = make(chan struct{})
}

// relayed drops what goes straight from one node to another, from the start on: the tailnet's relay is what is left.
func (w *wire) relayed() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noUDP = true
}

// told is how many frames of each protocol waited.
func (w *wire) told() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.TrimPrefix(fmt.Sprint(w.waited), "map")
}

func (w *wire) count(proto string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.waited[proto]
}

// close ends it, and tells the first frame that it could not pass on.
func (w *wire) close() error {
	close(w.stop)
	w.over.Wait()
	err := w.shut(2)
	if f := w.fails.Load(); f != nil {
		err = errors.Join(err, fmt.Errorf("the wire: %w", *f))
	}
	return err
}
