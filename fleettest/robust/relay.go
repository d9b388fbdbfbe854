// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc-dev/demarc/fleettest/process"
)

// A relay holds up what a host sends and hears, packet by packet, and loses none: this kernel has no netem. The host's port is
// taken off the bridge, and each frame is read from it, kept for its time, and written to a port that the relay put on the
// bridge, and the other way. Frames stay in order, as on a long line.
type relay struct {
	hub, port, own, peer string
	ends                 [2]int // packet sockets at the host's port, and at the relay's own
	fail                 error  // of a direction, kept under once
	once                 sync.Once
	readers, writers     sync.WaitGroup
	stop                 chan struct{}
}

// frame is one packet with the header by which the kernel knows what is left to do to it (checksum, cutting into segments).
type frame struct {
	due  time.Time
	data []byte
}

const (
	frameBytes = 10 + 14 + 65536 // virtio_net_hdr, Ethernet, the largest that is cut later
	frameQueue = 4096            // frames on their way; one more is lost, which is counted
	readWait   = 100 * time.Millisecond
)

// newRelay puts one between a host and the bridge. Each frame waits for between delay/2 and delay*3/2.
func newRelay(n *network, h *host, delay time.Duration, seed uint64) (*relay, error) {
	r := &relay{hub: n.hub, port: h.port, own: "r" + h.port, peer: "q" + h.port, stop: make(chan struct{}), ends: [2]int{-1, -1}}
	// What fails half way is undone by close.
	for _, s := range [][]string{{"link", "add", r.own, "type", "veth", "peer", "name", r.peer}, {"link", "set", r.own, "up"},
		{"link", "set", r.peer, "up", "master", "br0"}, {"link", "set", r.port, "nomaster"}} {
		if err := process.Command("ip", append([]string{"-n", r.hub}, s...)...); err != nil {
			return nil, errors.Join(err, r.close())
		}
	}
	for i, dev := range []string{r.port, r.own} {
		if err := process.Inside(r.hub, func() (err error) { r.ends[i], err = packetSocket(dev); return err }); err != nil {
			return nil, errors.Join(err, r.close())
		}
	}
	r.carry(r.ends[0], r.ends[1], delay, rand.New(rand.NewPCG(seed, 1)))
	r.carry(r.ends[1], r.ends[0], delay, rand.New(rand.NewPCG(seed, 2)))
	return r, nil
}

// packetSocket reads what comes in at a device, and not what goes out there.
func packetSocket(dev string) (int, error) {
	link, err := net.InterfaceByName(dev)
	if err != nil {
		return -1, err
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in the order of the network
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	wait := unix.NsecToTimeval(int64(readWait))
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index}))
	if err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("a packet socket at %s: %w", dev, err)
	}
	return fd, nil
}

// carry moves frames one way until the relay ends.
func (r *relay) carry(from, to int, delay time.Duration, rnd *rand.Rand) {
	queue := make(chan frame, frameQueue)
	r.readers.Go(func() {
		defer close(queue)
		buf := make([]byte, frameBytes)
		for {
			select {
			case <-r.stop:
				return
			default:
			}
			n, err := unix.Read(from, buf)
			switch {
			case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
				continue
			case err != nil:
				r.failed(err)
				return
			}
			f := frame{time.Now().Add(delay/2 + time.Duration(rnd.Int64N(int64(delay)))), append([]byte(nil), buf[:n]...)}
			select {
			case queue <- f:
			default:
				r.failed(fmt.Errorf("more than %d frames were under way: one was lost", frameQueue))
			}
		}
	})
	r.writers.Go(func() {
		for f := range queue {
			select {
			case <-r.stop: // at the end what is under way arrives at once
			case <-time.After(time.Until(f.due)):
			}
			if _, err := unix.Write(to, f.data); err != nil && !errors.Is(err, unix.ENETDOWN) {
				r.failed(err)
			}
		}
	})
}

func (r *relay) failed(err error) { r.once.Do(func() { r.fail = err }) }

// close lets what is under way arrive, and puts the host's port on the bridge again.
func (r *relay) close() error {
	close(r.stop)
	r.readers.Wait()
	r.writers.Wait()
	for _, fd := range r.ends {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	err := process.Command("ip", "-n", r.hub, "link", "set", r.port, "master", "br0")
	return errors.Join(r.fail, err, process.Command("ip", "-n", r.hub, "link", "del", r.own))
}
