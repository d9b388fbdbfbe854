// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// operator is the operator's file: who I am, and where my control plane is. `demarc control-plane init` writes one.
type operator struct {
	TrustDomain  string   `yaml:"trust_domain"`
	Name         string   `yaml:"name"`
	Nodes        []string `yaml:"nodes"` // host:port, tried in order
	Certificate  string   `yaml:"certificate"`
	Key          string   `yaml:"key"`
	Bundle       string   `yaml:"bundle"`            // the vendor's CAs; kept up to date by the command itself
	LogKey       string   `yaml:"log_key,omitempty"` // public key of the vendor's log, which signs the bundle; log.pub beside the file where absent
	SigningKey   string   `yaml:"signing_key"`       // signs releases
	RequestKey   string   `yaml:"request_key"`       // signs requests for operations
	RecipientKey string   `yaml:"recipient_key"`     // reads released output
}

func (a *app) operatorFile() (operator, error) {
	const op = "demarc.context"
	var o operator
	if a.context == "" {
		return o, usage("name the operator's file with --context FILE or DEMARC_CONTEXT")
	}
	f, err := os.Open(a.context)
	if err != nil {
		return o, fault.Because(err, op, fault.NotFound, "the operator's file can't be read: %s", a.context)
	}
	defer f.Close()
	dec := yaml.NewDecoder(io.LimitReader(f, 64<<10))
	dec.KnownFields(true)
	if err := dec.Decode(&o); err != nil {
		return o, fault.Because(err, op, fault.Invalid, "%s: %v", a.context, err)
	}
	if o.LogKey == "" {
		o.LogKey = "log.pub"
	}
	for _, p := range []*string{&o.Certificate, &o.Key, &o.Bundle, &o.LogKey, &o.SigningKey, &o.RequestKey, &o.RecipientKey} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(a.context), *p)
		}
	}
	if o.TrustDomain == "" || len(o.Nodes) == 0 {
		return o, fault.New(op, fault.Invalid, "%s names no trust_domain or no nodes", a.context)
	}
	return o, nil
}

// signer reads one of the operator's keys that sign; field is what the operator's file calls it.
func signer(field, path string) (ed25519.PrivateKey, error) {
	const op = "demarc.signer"
	if path == "" {
		return nil, fault.New(op, fault.Invalid, "the operator's file names no %s", field)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fault.Because(err, op, fault.NotFound, "%s can't be read: %s", field, path)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fault.New(op, fault.Invalid, "%s is not a PEM file", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "%s holds no PKCS #8 key", path)
	}
	ed, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, fault.New(op, fault.Invalid, "%s holds a key that is not Ed25519", path)
	}
	return ed, nil
}

// vendor speaks to the control plane. Who answers is proven by its certificate, never by its address.
type vendor struct {
	operator
	clients   []node
	operators []controlv1connect.OperatorServiceClient // of the same nodes
	keys      []controlv1connect.KeyServiceClient
	clusters  []controlv1connect.ClusterClient
	ways      []*http.Transport
	at        int    // the node that answered last is asked first
	trust     *trust // nil: the CAs are fixed
	settled   bool   // the newest bundle was asked for after an answer, whatever came of it
	warn      func(format string, args ...any)
	total     time.Duration // of a call, all tries together
	try       time.Duration // of one try, and of silence on a stream
}

const tryTimeout = 10 * time.Second

func (a *app) vendor() (*vendor, error) {
	const op = "demarc.vendor"
	o, err := a.operatorFile()
	if err != nil {
		return nil, err
	}
	leaf, err := loadPair(o.Certificate, o.Key)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the operator's certificate and key can't be read: see certificate and key in %s", a.context)
	}
	t, err := openTrust(o, &leaf)
	if err != nil {
		return nil, err
	}
	v := newVendor(o, t, a.timeout)
	v.trust, v.warn = t, a.note
	return v, nil
}

func newVendor(o operator, who identity.Source, total time.Duration) *vendor {
	v := &vendor{operator: o, total: total, try: min(tryTimeout, total/time.Duration(len(o.Nodes)))} // so that one that hangs leaves time for the others
	conf := identity.Client(who, identity.WantNode(o.TrustDomain), "h2")
	for _, n := range o.Nodes {
		t := &http.Transport{TLSClientConfig: conf.Clone(), TLSHandshakeTimeout: 5 * time.Second, DialContext: (&net.Dialer{Timeout: 3 * time.Second}).DialContext,
			HTTP2: &http.HTTP2Config{SendPingTimeout: 5 * time.Second, PingTimeout: 5 * time.Second}, Protocols: new(http.Protocols)}
		t.Protocols.SetHTTP2(true)
		v.ways = append(v.ways, t)
		c := &http.Client{Transport: tell{v, api.Sent(t)}}
		v.clients = append(v.clients, node{controlv1connect.NewControlClient(c, "https://"+n, connect.WithReadMaxBytes(64<<20), api.Doubt()), controlv1connect.NewIssuerKeysClient(c, "https://"+n, connect.WithReadMaxBytes(1<<20), api.Doubt())})
		v.keys = append(v.keys, controlv1connect.NewKeyServiceClient(c, "https://"+n, connect.WithReadMaxBytes(8<<20), api.Doubt()))
		v.operators = append(v.operators, controlv1connect.NewOperatorServiceClient(c, "https://"+n, connect.WithReadMaxBytes(8<<20), api.Doubt()))
		v.clusters = append(v.clusters, newCluster(c, n))
	}
	return v
}

// close lets the connections go.
func (v *vendor) close() {
	for _, t := range v.ways {
		t.CloseIdleConnections()
	}
}

// node is what one node of the control plane answers to operators.
type node struct {
	controlv1connect.ControlClient
	keys controlv1connect.IssuerKeysClient
}

// ask calls one node after another until one answers. What is asked carries its own request id, so that asking twice
// does it once.
func ask[Res any](ctx context.Context, v *vendor, do func(ctx context.Context, c controlv1connect.ControlClient) (Res, error)) (Res, error) {
	var res Res
	ctx, cancel := context.WithTimeout(ctx, v.total)
	defer cancel()
	err := v.each(ctx, 0, func(c node) (err error) {
		ctx, cancel := context.WithTimeout(ctx, v.try)
		defer cancel()
		res, err = do(ctx, c)
		return err
	})
	return res, err
}

// askIssuerKeys is ask of the service about the keys of clusters.
func askIssuerKeys[Res any](ctx context.Context, v *vendor, do func(ctx context.Context, c controlv1connect.IssuerKeysClient) (Res, error)) (Res, error) {
	return ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (Res, error) {
		return do(ctx, c.(node).keys)
	})
}

// bulk is ask for a stream: its time is not bounded as long as it moves, which it tells with alive.
func (v *vendor) bulk(ctx context.Context, do func(ctx context.Context, c controlv1connect.ControlClient, alive func()) error) error {
	return v.each(ctx, 3, func(c node) error {
		sub, cancel := context.WithCancel(ctx)
		defer cancel()
		stalled := time.AfterFunc(v.try, cancel)
		defer stalled.Stop()
		err := do(sub, c, func() { stalled.Reset(v.try) })
		if err != nil && sub.Err() != nil && ctx.Err() == nil {
			return fault.New("demarc.bulk", fault.Unavailable, "nothing moved for %s", v.try)
		}
		return err
	})
}

// sureRounds is in how many rounds one node refuses while the others can't be reached, before its refusal is the answer.
const sureRounds = 3

// each tries the nodes in turn, the one that answered last first, in so many rounds that come further and further
// apart; until the context ends where rounds is 0.
func (v *vendor) each(ctx context.Context, rounds int, do func(c node) error) error {
	const op = "demarc.ask"
	began := time.Now()
	var last error
	sure := false // last is the answer of a node that was reached
	for round := 1; ; round++ {
		hope := false
		for range v.clients {
			err := do(v.clients[v.at])
			if v.recognise(ctx, err) {
				err = do(v.clients[v.at])
			}
			if err == nil {
				v.settle(ctx)
				return nil
			}
			if errors.Is(ctx.Err(), context.Canceled) {
				return fault.Because(ctx.Err(), op, fault.Unavailable, "interrupted")
			}
			var one nodeError
			retry := passing(err)
			if !retry && !errors.As(err, &one) {
				return err
			}
			// That an answer may have been lost is told rather than that nobody could be reached after, and what a node answered rather than
			// that another one is dead.
			if last == nil || ctx.Err() == nil && !errors.Is(last, fault.Unsure) && (!retry || !sure) {
				sure = !retry
				last = fault.Because(err, op, fault.Of(err), "node %s: %s", v.Nodes[v.at], fault.Text(err))
			}
			v.at = (v.at + 1) % len(v.clients)
			hope = hope || retry
		}
		if !hope || sure && round >= sureRounds {
			return last
		}
		if round == rounds || !pause(ctx, round) {
			return giveUp(last, time.Since(began))
		}
	}
}

// passing tells of a failure that may be over at the next try, here or at another node.
func passing(err error) bool {
	return slices.Contains([]fault.Kind{fault.Unavailable, fault.NotLeader, fault.Unsure, fault.Busy}, fault.Of(err))
}

func giveUp(last error, after time.Duration) error {
	const op = "demarc.ask"
	after = after.Round(time.Second / 10)
	if errors.Is(last, fault.Unsure) {
		return fault.Because(last, op, fault.Unsure, "it may have happened, and no node could say so within %s: look before you do it again (%s)", after, fault.Text(last))
	}
	return fault.Because(last, op, fault.Of(last), "no node of the control plane did it within %s: %s", after, fault.Text(last))
}

// pause waits between rounds: longer each time, and each caller differently long. It is false where the time is over.
func pause(ctx context.Context, round int) bool {
	most := min(100*time.Millisecond<<min(round, 5), 2*time.Second)
	t := time.NewTimer(most/2 + mathrand.N(most/2+1))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// nodeError is what is wrong with one node, and not with what was asked.
type nodeError struct{ error }

// Unwrap gives the cause.
func (n nodeError) Unwrap() error { return n.error }

// appliance speaks to the customer's own appliance.
func (a *app) applianceClient() (localv1connect.LocalClient, error) {
	if a.socket == "" {
		return nil, usage("name the appliance's socket with --socket PATH or DEMARC_SOCKET")
	}
	return localv1connect.NewLocalClient(a.unix(), "http://appliance", connect.WithReadMaxBytes(64<<20), api.Doubt()), nil
}

// unix is an HTTP client for the socket.
func (a *app) unix() *http.Client {
	return &http.Client{Transport: api.Sent(&http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, "unix", a.socket)
		if err != nil {
			return nil, fault.Because(err, "demarc.socket", fault.Unavailable, "nothing answers on %s: is the daemon running, and may you open its socket?", a.socket)
		}
		return c, nil
	}})}
}

// wire gives the typed fault of a call.
func wire[Res any](res *connect.Response[Res], err error) (*Res, error) {
	if err != nil {
		return nil, explain(err)
	}
	return res.Msg, nil
}

// explain makes a fault of what a server, or the way to it, answered.
func explain(err error) error {
	const op = "demarc.call"
	var wire *connect.Error
	if !errors.As(err, &wire) {
		return fault.At(op, "", err)
	}
	var own *fault.Error
	var alert tls.AlertError
	switch cause := wire.Unwrap(); {
	case errors.As(cause, &own): // of our own side: the handshake, or the socket
		return fault.Because(nodeError{err}, op, own.Kind, "%s", fault.Text(own))
	case errors.As(cause, &alert), strings.Contains(err.Error(), "remote error: tls:"):
		return fault.Because(nodeError{err}, op, fault.Denied, "it refused this operator's certificate: that ran out, was replaced or banned, its CA was retired, or it is of another trust domain; log in again, or ask an admin for an invitation")
	}
	return api.FromWire(op, err)
}

// draw makes a request id, a nonce, or an operation's id.
func draw() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails
	return hex.EncodeToString(b[:])
}
