// SPDX-License-Identifier: Apache-2.0

package roads

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// watch keeps on record where the packets go that come in over a link.
type watch struct {
	link string
	fd   int
	over chan struct{}
	once sync.Once
	stop chan struct{}

	mu   sync.Mutex
	seen map[[2]string]*flow
	fail error
}

// flow is a kind of packets. A port is 0 for what has none.
type flow struct {
	proto    string
	src, dst netip.AddrPort
	packets  int
}

// watchLink begins, in the network namespace of the thread that calls.
func watchLink(link string) (*watch, error) {
	at, err := net.InterfaceByName(link)
	if err != nil {
		return nil, err
	}
	all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) // nothing comes in before it is bound
	if err != nil {
		return nil, err
	}
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: at.Index}))
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	w := &watch{link: link, fd: fd, over: make(chan struct{}), stop: make(chan struct{}), seen: map[[2]string]*flow{}}
	go w.read()
	return w, nil
}

func (w *watch) read() {
	defer close(w.over)
	for b := make([]byte, 128); ; {
		n, from, err := unix.Recvfrom(w.fd, b, 0)
		select {
		case <-w.stop:
			return
		default:
		}
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if err != nil || !ok {
			w.mu.Lock()
			w.fail = errors.Join(err, fmt.Errorf("%T", from))
			w.mu.Unlock()
			return
		}
		if ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		f, counts := parse(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, ll.Protocol)), b[:n])
		if !counts {
			continue
		}
		w.mu.Lock()
		key := [2]string{f.proto + " " + f.dst.String(), f.src.String()}
		if w.seen[key] == nil {
			w.seen[key] = &f
		}
		w.seen[key].packets++
		w.mu.Unlock()
	}
}

// parse reads the addresses of a packet. What stays on the link (ARP, neighbours, groups of the link) does not count.
func parse(ether uint16, b []byte) (f flow, counts bool) {
	var proto byte
	var src, dst netip.Addr
	switch {
	case ether == unix.ETH_P_IP && len(b) >= 20:
		proto = b[9]
		src, _ = netip.AddrFromSlice(b[12:16])
		dst, _ = netip.AddrFromSlice(b[16:20])
		b = b[min(len(b), int(b[0]&15)*4):]
	case ether == unix.ETH_P_IPV6 && len(b) >= 40:
		proto = b[6]
		src, _ = netip.AddrFromSlice(b[8:24])
		dst, _ = netip.AddrFromSlice(b[24:40])
		b = b[40:]
		if proto == unix.IPPROTO_HOPOPTS && dst.IsLinkLocalMulticast() { // the kernel joins groups of the link
			return f, false
		}
		if proto == unix.IPPROTO_ICMPV6 && len(b) > 0 && b[0] >= 130 && b[0] <= 143 { // neighbours, routers, groups
			return f, false
		}
	case ether == unix.ETH_P_ARP:
		return f, false
	default:
		return flow{proto: fmt.Sprintf("ether %#04x", ether)}, true
	}
	f.proto = map[byte]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_ICMPV6: "icmp6"}[proto]
	var from, to uint16
	switch f.proto {
	case "tcp", "udp":
		if len(b) >= 4 {
			from, to = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		}
	case "":
		f.proto = fmt.Sprintf("protocol %d", proto)
	}
	f.src, f.dst = netip.AddrPortFrom(src, from), netip.AddrPortFrom(dst, to)
	return f, true
}

// flows gives what was seen, and how many packets the kernel had no room for.
func (w *watch) flows() (all []flow, lost uint32, err error) {
	st, err := unix.GetsockoptTpacketStats(w.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return nil, 0, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.seen {
		all = append(all, *f)
	}
	slices.SortFunc(all, func(a, b flow) int {
		return strings.Compare(a.proto+a.dst.String()+a.src.String(), b.proto+b.dst.String()+b.src.String())
	})
	return all, st.Drops, w.fail
}

func (w *watch) close() {
	w.once.Do(func() { close(w.stop) })
	<-w.over
	_ = unix.Close(w.fd)
}
