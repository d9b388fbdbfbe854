// SPDX-License-Identifier: Apache-2.0

// Package meshtest is a tailnet on loopback: control server, relay and STUN in memory, for tests and for the demo.
//
// The promise: nothing is sent beyond loopback, and Close leaves no listener behind. It is no tailnet for production: its
// relay's certificate is made at the start and checked by nobody.
package meshtest

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stun"
	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"

	"github.com/demarc-dev/demarc/fault"
)

// Tailnet is one tailnet with its own control server.
type Tailnet struct {
	URL     string // the control server's
	AuthKey string // what a node must show

	handler *testcontrol.Server
	at      string // where the coordinator listens
	control *coordinator
	relay   *http.Server
	derp    *derpserver.Server
	stun    *net.UDPConn
	work    sync.WaitGroup

	mu       sync.Mutex
	keyed    sync.Mutex    // over the handler's auth key
	api      *API          // nil: none
	policy   *Policy       // nil: everybody reaches everybody
	expired  bool          // every node's key is old
	changed  chan struct{} // closed when the maps of nodes are old
	question *question     // of the coordinator; nil: none
	see      func(*http.Request)
	plan     netip.Addr // where nodes are told to ask for the coordinator; the zero value: nowhere
	streams  atomic.Int64
	hidden   map[netip.Addr]bool
	old      map[key.NodePublic]bool // that Expire ended
}

// Place is where a tailnet is, for tests in network namespaces: what listens is made on the thread that calls.
type Place struct {
	IP          string // of everything; "" is 127.0.0.1
	Coordinator string // its name, for which the nodes' resolver gives IP; "" is IP
	Relay       string // likewise
}

// Start opens a tailnet that takes in nodes with this auth key. Everybody reaches everybody.
func Start(authKey string) (*Tailnet, error) { return StartAt(authKey, nil, Place{}) }

// StartWith opens a tailnet whose nodes filter by this policy. Each node still sees all others: only filters keep them apart.
func StartWith(authKey string, p *Policy) (*Tailnet, error) { return StartAt(authKey, p, Place{}) }

// StartAt is StartWith at a place. A nil policy lets everybody reach everybody.
func StartAt(authKey string, p *Policy, at Place) (*Tailnet, error) {
	const op = "meshtest.Start"
	at.IP = cmp.Or(at.IP, "127.0.0.1")
	at.Coordinator, at.Relay = cmp.Or(at.Coordinator, at.IP), cmp.Or(at.Relay, at.IP)
	t := &Tailnet{AuthKey: authKey, policy: p, changed: make(chan struct{})}
	var err error
	if t.stun, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(at.IP)}); err != nil {
		return nil, fault.At(op, fault.Unavailable, err)
	}
	t.work.Go(t.answer)
	cert, err := selfSigned()
	if err != nil {
		return nil, errors.Join(fault.At(op, fault.Internal, err), t.Close())
	}
	relay, err := net.Listen("tcp4", net.JoinHostPort(at.IP, "0"))
	if err != nil {
		return nil, errors.Join(fault.At(op, fault.Unavailable, err), t.Close())
	}
	silent := log.New(io.Discard, "", 0)
	t.derp = derpserver.New(key.NewNode(), func(string, ...any) {})
	t.relay = &http.Server{Handler: derpserver.Handler(t.derp), ReadHeaderTimeout: 10 * time.Second, ErrorLog: silent,
		Protocols: new(http.Protocols)}
	t.relay.Protocols.SetHTTP1(true)
	t.work.Go(func() {
		_ = t.relay.Serve(tls.NewListener(relay,
			&tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"}}))
	}) // it ends with Close

	control, err := net.Listen("tcp4", net.JoinHostPort(at.IP, "0"))
	if err != nil {
		return nil, errors.Join(fault.At(op, fault.Unavailable, err), t.Close())
	}
	t.at = control.Addr().String()
	_, port, err := net.SplitHostPort(t.at)
	if err != nil {
		return nil, errors.Join(fault.At(op, fault.Internal, err), control.Close(), t.Close())
	}
	t.URL = "http://" + net.JoinHostPort(at.Coordinator, port)
	node := &tailcfg.DERPNode{Name: "1a", RegionID: 1, HostName: at.Relay, IPv4: at.IP, IPv6: "none", InsecureForTests: true,
		STUNTestIP: at.IP,
		DERPPort:   relay.Addr().(*net.TCPAddr).Port, STUNPort: t.stun.LocalAddr().(*net.UDPAddr).Port}
	handler := &testcontrol.Server{
		Logf:            func(string, ...any) {},
		ExplicitBaseURL: t.URL,
		RequireAuthKey:  authKey,
		AllOnline:       true,
		MagicDNSDomain:  "tailnet.test",
		DERPMap: &tailcfg.DERPMap{OmitDefaultRegions: true,
			Regions: map[int]*tailcfg.DERPRegion{1: {RegionID: 1, RegionCode: "loopback", Nodes: []*tailcfg.DERPNode{node}}}},
	}
	handler.MaybeRateLimitRegister = func() (bool, string, string) {
		t.keyed.Lock() // what SetAuthKey wrote is seen
		defer t.keyed.Unlock()
		return false, "", ""
	}
	handler.AltMapStream = t.stream
	if p != nil {
		handler.TagOwners = p.TagOwners
	}
	t.handler = handler
	t.control = t.open(control)
	return t, nil
}

// Ports are those of the relay (TCP) and of STUN (UDP).
func (t *Tailnet) Ports() (relay, stun int) {
	n := t.handler.DERPMap.Regions[1].Nodes[0]
	return n.DERPPort, n.STUNPort
}

// answer tells each caller the address that it comes from.
func (t *Tailnet) answer() {
	buf := make([]byte, 2048)
	for {
		n, from, err := t.stun.ReadFromUDPAddrPort(buf)
		if err != nil {
			return // closed
		}
		id, err := stun.ParseBindingRequest(buf[:n])
		if err != nil {
			continue // not STUN
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		_, _ = t.stun.WriteToUDPAddrPort(stun.Response(id, from), from) // a lost answer is asked for again
	}
}

// Close ends the tailnet. Nodes that are still up lose their coordinator.
func (t *Tailnet) Close() error {
	var errs []error
	errs = append(errs, t.StopCoordinator())
	if t.relay != nil {
		errs = append(errs, t.relay.Close())
	}
	if t.derp != nil {
		errs = append(errs, t.derp.Close())
	}
	if t.stun != nil {
		errs = append(errs, t.stun.Close())
	}
	t.work.Wait()
	return fault.At("meshtest.Close", fault.Internal, errors.Join(errs...))
}

func selfSigned() (tls.Certificate, error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k}, err
}
