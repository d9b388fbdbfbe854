// SPDX-License-Identifier: Apache-2.0

package roads_test

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// The modes of a road: what its proxy does, and what the resolver answers.
const (
	pass     = "pass"
	late     = "late"      // each byte arrives 2 s later
	halfOpen = "half-open" // the far end is gone, and the near end is not told
	reset    = "reset"     // connections are reset, new ones at once
	deny     = "407"       // whatever user and password are shown
	inspect  = "inspect"   // TLS is opened, with a certificate of the proxy's own CA
	noName   = "no-name"   // the resolver says SERVFAIL
)

const (
	proxyUser    = "eu-1:through-the-wall"
	inspectingCA = "Globex Web Gateway"
	proxyName    = "proxy.road.test."
	lateness     = 2 * time.Second
)

// road is a proxy, or a resolver, whose mode is told on standard input, a line each; "ok" answers.
type road struct {
	mu    sync.Mutex
	mode  string
	conns map[*net.TCPConn]bool
	turn  chan struct{} // closed when the mode changes
	cert  *tls.Certificate
}

// runRoad is the whole life of a helper process: road proxy ADDR, or road dns ADDR ANSWER.
func runRoad(args []string) error {
	r := &road{mode: pass, conns: map[*net.TCPConn]bool{}, turn: make(chan struct{})}
	var err error
	if args[0] == "dns" {
		err = r.resolve(args[1], net.ParseIP(args[2]))
	} else {
		err = r.proxy(args[1])
	}
	if err != nil {
		return err
	}
	fmt.Println("ok")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		r.set(in.Text())
		fmt.Println("ok")
	}
	return nil
}

// set changes the mode; what stood before does not survive a change that would end it.
func (r *road) set(mode string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mode = mode
	close(r.turn)
	r.turn = make(chan struct{})
	if mode == reset || mode == deny || mode == inspect {
		for c := range r.conns {
			_ = c.SetLinger(0) // RST
			_ = c.Close()
		}
	}
}

func (r *road) now() (string, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mode, r.turn
}

func (r *road) resolve(addr string, answer net.IP) error {
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(b[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
			q := m.Questions[0]
			switch mode, _ := r.now(); {
			case mode == noName:
				m.RCode = dnsmessage.RCodeServerFailure
			case q.Name.String() != proxyName:
				m.RCode = dnsmessage.RCodeNameError
			case q.Type == dnsmessage.TypeA:
				m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 1},
					Body: &dnsmessage.AResource{A: [4]byte(answer.To4())}}}
			}
			if out, err := m.Pack(); err == nil {
				_, _ = pc.WriteTo(out, from)
			}
		}
	}()
	return nil
}

func (r *road) proxy(addr string) error {
	var err error
	if r.cert, err = gateway(); err != nil {
		return err
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go r.serve(c.(*net.TCPConn))
		}
	}()
	return nil
}

func (r *road) hold(c *net.TCPConn, held bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if held {
		r.conns[c] = true
	} else {
		delete(r.conns, c)
	}
}

// serve answers one CONNECT and then is the road.
func (r *road) serve(c *net.TCPConn) {
	defer c.Close()
	r.hold(c, true)
	defer r.hold(c, false)
	mode, turn := r.now()
	switch mode {
	case reset:
		_ = c.SetLinger(0)
		return
	case halfOpen:
		<-turn
		return
	}
	in := bufio.NewReader(c)
	req, err := http.ReadRequest(in)
	if err != nil {
		return
	}
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(proxyUser))
	if mode == deny || req.Method != http.MethodConnect || req.Header.Get("Proxy-Authorization") != want {
		_, _ = io.WriteString(c, "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"globex\"\r\nContent-Length: 0\r\n\r\n")
		return
	}
	far, err := net.DialTimeout("tcp", req.Host, 5*time.Second)
	if err != nil {
		_, _ = io.WriteString(c, "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
		return
	}
	defer far.Close()
	if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
		return
	}
	if mode == inspect {
		t := tls.Server(c, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			return &tls.Config{Certificates: []tls.Certificate{*r.cert}, NextProtos: h.SupportedProtos}, nil
		}})
		_, _ = io.Copy(io.Discard, t)
		return
	}
	var both sync.WaitGroup
	both.Go(func() { r.carry(far, in); _ = far.(*net.TCPConn).CloseWrite() })
	both.Go(func() { r.carry(c, far); _ = c.CloseWrite() })
	both.Wait()
}

// carry moves bytes one way as the mode of the moment says.
func (r *road) carry(to io.Writer, from io.Reader) {
	type parcel struct {
		b   []byte
		due time.Time
	}
	queue := make(chan parcel, 1024)
	var out sync.WaitGroup
	out.Go(func() {
		for p := range queue {
			if wait := time.Until(p.due); wait > 0 {
				<-time.After(wait)
			}
			if _, err := to.Write(p.b); err != nil {
				for range queue { // the reader must not hang on a full queue
				}
				return
			}
		}
	})
	defer out.Wait()
	defer close(queue)
	b := make([]byte, 16<<10)
	for {
		n, err := from.Read(b)
		mode, turn := r.now()
		if mode == halfOpen { // swallowed: whoever sent it is not told
			<-turn
			return
		}
		p := parcel{append([]byte(nil), b[:n]...), time.Time{}}
		if mode == late {
			p.due = time.Now().Add(lateness)
		}
		if n > 0 {
			queue <- p
		}
		if err != nil {
			return
		}
	}
}

// gateway is the certificate of a proxy that opens TLS, of a CA that is not the vendor's.
func gateway() (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: inspectingCA}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "10.81.2.1"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(10, 81, 2, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), key)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// askToken is what the appliance's token_command runs: it asks the test for a token for the audience.
func askToken(socket, audience string) error {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, strings.TrimSpace(audience)+"\n"); err != nil {
		return err
	}
	_, err = io.Copy(os.Stdout, c)
	return err
}
