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
	"net"
	"net/http"
	"os"
	"path/filepath"
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
	Bundle       string   `yaml:"bundle"`
	SigningKey   string   `yaml:"signing_key"`   // signs releases and requests
	RecipientKey string   `yaml:"recipient_key"` // reads released output
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
	for _, p := range []*string{&o.Certificate, &o.Key, &o.Bundle, &o.SigningKey, &o.RecipientKey} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(a.context), *p)
		}
	}
	if o.TrustDomain == "" || len(o.Nodes) == 0 {
		return o, fault.New(op, fault.Invalid, "%s names no trust_domain or no nodes", a.context)
	}
	return o, nil
}

// signer reads the operator's signing key.
func (o operator) signer() (ed25519.PrivateKey, error) {
	const op = "demarc.signer"
	b, err := os.ReadFile(o.SigningKey)
	if err != nil {
		return nil, fault.Because(err, op, fault.NotFound, "signing_key can't be read: %s", o.SigningKey)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fault.New(op, fault.Invalid, "%s is not a PEM file", o.SigningKey)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "%s holds no PKCS #8 key", o.SigningKey)
	}
	ed, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, fault.New(op, fault.Invalid, "%s holds a key that is not Ed25519", o.SigningKey)
	}
	return ed, nil
}

// vendor speaks to the control plane.
type vendor struct {
	operator
	clients []controlv1connect.ControlClient
}

func (a *app) vendor() (*vendor, error) {
	const op = "demarc.vendor"
	o, err := a.operatorFile()
	if err != nil {
		return nil, err
	}
	leaf, err := tls.LoadX509KeyPair(o.Certificate, o.Key)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the operator's certificate can't be read: %v", err)
	}
	b, err := os.ReadFile(o.Bundle)
	if err != nil {
		return nil, fault.Because(err, op, fault.NotFound, "the bundle can't be read: %s", o.Bundle)
	}
	cas, err := identity.ParseBundle(b, o.TrustDomain)
	if err != nil {
		return nil, err
	}
	v := &vendor{operator: o}
	conf := identity.Client(identity.Fixed(&leaf, identity.Pool(cas)), identity.WantNode(o.TrustDomain), "h2")
	for _, n := range o.Nodes {
		h := &http.Client{Transport: &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true, TLSHandshakeTimeout: 5 * time.Second,
			DialContext: (&net.Dialer{Timeout: 3 * time.Second}).DialContext}}
		v.clients = append(v.clients, controlv1connect.NewControlClient(h, "https://"+n, connect.WithReadMaxBytes(64<<20)))
	}
	return v, nil
}

// ask calls one node after another until one answers. What is asked carries its own request id, so that asking twice
// does it once.
func ask[Res any](ctx context.Context, v *vendor, do func(ctx context.Context, c controlv1connect.ControlClient) (Res, error)) (Res, error) {
	const op = "demarc.ask"
	var res Res
	var err error
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		for _, c := range v.clients {
			if res, err = do(ctx, c); err == nil {
				return res, nil
			}
			err = api.FromWire(op, err)
			switch fault.Of(err) {
			case fault.Unavailable, fault.NotLeader, fault.Unsure, fault.Busy:
			default:
				return res, err
			}
		}
		select {
		case <-ctx.Done():
			return res, fault.Because(errors.Join(ctx.Err(), err), op, fault.Unavailable, "no node of the control plane did it in time: %s", fault.Text(err))
		case <-time.After(wait):
		}
	}
}

// appliance speaks to the customer's own appliance.
func (a *app) applianceClient() (localv1connect.LocalClient, error) {
	if a.socket == "" {
		return nil, usage("name the appliance's socket with --socket PATH or DEMARC_SOCKET")
	}
	return localv1connect.NewLocalClient(a.unix(), "http://appliance", connect.WithReadMaxBytes(64<<20)), nil
}

// unix is an HTTP client for the socket.
func (a *app) unix() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, "unix", a.socket)
		if err != nil {
			return nil, fault.Because(err, "demarc.socket", fault.Unavailable, "nothing answers on %s: is the daemon running, and may you open its socket?", a.socket)
		}
		return c, nil
	}}}
}

// wire gives the typed fault of a call.
func wire[Res any](res *connect.Response[Res], err error) (*Res, error) {
	if err != nil {
		return nil, api.FromWire("demarc.call", err)
	}
	return res.Msg, nil
}

// draw makes a request id, a nonce, or an operation's id.
func draw() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails
	return hex.EncodeToString(b[:])
}
