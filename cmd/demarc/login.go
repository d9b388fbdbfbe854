// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"golang.org/x/oauth2"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/login"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// loginWait is how long a person has to log in.
const loginWait = 5 * time.Minute

// doorFile is what one needs to recognize a control plane. None of it is a secret; that it is the right one matters.
type doorFile struct {
	TrustDomain string   `yaml:"trust_domain"`
	Nodes       []string `yaml:"nodes"`
	LogKey      string   `yaml:"log_key"` // PEM
}

func (a *app) showDoor() *cobra.Command {
	return a.online(&cobra.Command{Use: "door", Short: "Print what those need who log in: which control plane it is, and its key", Args: exactly(0, "no arguments"),
		Long: "door prints a file for demarc operator login. It holds no secret, and who has it gets in nowhere by it alone. Hand it out over a channel\n" +
			"that nobody can change: a false one leads to a false control plane.",
		Example: "  demarc operator door > acme-door.yaml"},
		func(ctx context.Context, v *vendor, _ []string) error {
			m, err := askOperators(ctx, v, func(ctx context.Context, c controlv1connect.OperatorServiceClient) (*controlv1.GetDoorResponse, error) {
				return wire(c.GetDoor(ctx, connect.NewRequest(&controlv1.GetDoorRequest{})))
			})
			if err != nil {
				return err
			}
			d := doorFile{m.GetTrustDomain(), v.Nodes, string(m.GetLogKey())}
			b, err := yaml.Marshal(d)
			if err != nil {
				return fault.At("demarc.door", fault.Internal, err)
			}
			return a.emit(map[string]any{"trust_domain": d.TrustDomain, "nodes": d.Nodes, "log_key": d.LogKey}, func(w io.Writer) { _, _ = w.Write(b) })
		})
}

func readDoor(path string) (doorFile, error) {
	const op = "demarc.door"
	b, err := readBounded(path, identity.MaxInvitation)
	if err != nil {
		return doorFile{}, err
	}
	var d doorFile
	dec := yaml.NewDecoder(bytes.NewReader(b))
	dec.KnownFields(true)
	if err := dec.Decode(&d); err != nil || d.TrustDomain == "" || len(d.Nodes) == 0 || d.LogKey == "" {
		return doorFile{}, fault.Because(err, op, fault.Invalid, "%s is no door: take what demarc operator door prints", path)
	}
	return d, nil
}

func (a *app) loginOperator() *cobra.Command {
	var out, ca string
	var port uint16
	c := &cobra.Command{Use: "login DOOR --out FILE.yaml", Short: "Log in as an operator at the vendor's OpenID Connect issuer", Args: exactly(1, "the file of demarc operator door"),
		Long: "login prints an address to open in a browser on this machine, where you log in at the vendor's issuer. What comes back is good for\na key that is drawn here, " +
			"and is traded for a certificate of some hours with the role that your groups give. Run it again with the same\n--out when that ends; the keys beside the certificate stay.",
		Example: "  demarc operator login acme-door.yaml --out ~/demarc/me.yaml"}
	f := c.Flags()
	f.StringVar(&out, "out", "", "the operator's file to write, or to renew")
	f.StringVar(&ca, "issuer-ca", "", "file with the CA of the issuer, where the system does not trust it")
	f.Uint16Var(&port, "port", 0, "of the loopback address that the browser is sent back to; any free one where absent")
	c.RunE = func(c *cobra.Command, args []string) error {
		if out == "" {
			return usage("name the operator's file with --out FILE.yaml")
		}
		door, err := readDoor(args[0])
		if err != nil {
			return err
		}
		client, err := issuerClient(ca)
		if err != nil {
			return err
		}
		defer client.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(c.Context(), a.timeout+loginWait)
		defer cancel()
		got, name, err := a.logIn(ctx, door, client, port, out)
		if err != nil {
			return err
		}
		return a.emit(map[string]any{"operator": name, "role": got.role, "operator_file": out, "until_unix": got.leaf.NotAfter.Unix()}, func(w io.Writer) {
			fmt.Fprintf(w, "you are operator %s with the role %s until %s\n  export DEMARC_CONTEXT=%s\n", name, got.role, got.leaf.NotAfter.UTC().Format(time.RFC3339), out)
		})
	}
	return c
}

// issuerClient asks the issuer. An answer sends it nowhere else.
func issuerClient(ca string) (*http.Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		b, err := readBounded(ca, identity.MaxBundle)
		if err != nil {
			return nil, err
		}
		if conf.RootCAs = x509.NewCertPool(); !conf.RootCAs.AppendCertsFromPEM(b) {
			return nil, usage("--issuer-ca: %s holds no certificate in PEM", ca)
		}
	}
	return &http.Client{Timeout: tryTimeout, Transport: &http.Transport{TLSClientConfig: conf, Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}, nil
}

func (a *app) logIn(ctx context.Context, door doorFile, client *http.Client, port uint16, out string) (granted, string, error) {
	const op = "demarc.login"
	opts, err := asStranger(ctx, door.TrustDomain, door.Nodes, []byte(door.LogKey), func(ctx context.Context, c stranger) (*controlv1.LoginOptionsResponse, error) {
		return wire(c.LoginOptions(ctx, connect.NewRequest(&controlv1.LoginOptionsRequest{})))
	})
	if err != nil {
		return granted{}, "", err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return granted{}, "", fault.At(op, fault.Internal, err)
	}
	csr, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return granted{}, "", err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return granted{}, "", fault.At(op, fault.Internal, err)
	}
	token, err := a.idToken(ctx, opts, client, port, login.Nonce(spki))
	if err != nil {
		return granted{}, "", err
	}
	var held answered
	m, err := asStranger(ctx, door.TrustDomain, door.Nodes, []byte(door.LogKey), func(ctx context.Context, c stranger) (*controlv1.LoginResponse, error) {
		held = c.held
		return wire(c.Login(ctx, connect.NewRequest(&controlv1.LoginRequest{Csr: csr, IdToken: token, BundleHeld: held.Number})))
	})
	if err != nil {
		return granted{}, "", err
	}
	got, err := checkGranted(m.GetCertificate(), held, m.GetRole(), key, door.TrustDomain, m.GetName())
	if err != nil {
		return granted{}, "", err
	}
	pemKey, err := keyPEM(key)
	if err != nil {
		return granted{}, "", err
	}
	d := desk{out}
	if _, err := os.Lstat(out); err != nil {
		if err := replace(map[string][]byte{d.path("key"): pemKey}); err != nil {
			return granted{}, "", err
		}
		return got, m.GetName(), d.write(operator{TrustDomain: door.TrustDomain, Name: m.GetName(), Nodes: door.Nodes}, got, []byte(door.LogKey))
	}
	o, err := (&app{context: out}).operatorFile()
	if err != nil {
		return granted{}, "", err
	}
	if o.Name != m.GetName() || o.TrustDomain != door.TrustDomain {
		return granted{}, "", fault.New(op, fault.Conflict, "%s is the file of operator %s of %s, and you are %s of %s: name another with --out", out, o.Name, o.TrustDomain, m.GetName(), door.TrustDomain)
	}
	if err := storeBundle(o.Bundle, held.sealed, held.CAs); err != nil {
		return granted{}, "", err
	}
	return got, m.GetName(), replace(map[string][]byte{o.LogKey: []byte(door.LogKey), o.Key: pemKey, o.Certificate: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: got.leaf.Raw})})
}

// idToken does the authorization-code flow with PKCE (RFC 7636) and a loopback redirect (RFC 8252).
func (a *app) idToken(ctx context.Context, opts *controlv1.LoginOptionsResponse, client *http.Client, port uint16, nonce string) (string, error) {
	const op = "demarc.login"
	ctx = oidc.ClientContext(ctx, client)
	provider, err := oidc.NewProvider(ctx, opts.GetIssuer())
	if err != nil {
		return "", fault.Because(err, op, fault.Unavailable, "the issuer %s does not tell how to log in", opts.GetIssuer())
	}
	for _, at := range []string{provider.Endpoint().AuthURL, provider.Endpoint().TokenURL} {
		if u, err := url.Parse(at); err != nil || u.Scheme != "https" {
			return "", fault.New(op, fault.Denied, "the issuer sends us to %q: https is needed", at)
		}
	}
	ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		return "", fault.Because(err, op, fault.Unavailable, "no loopback port for the browser to come back to")
	}
	conf := oauth2.Config{ClientID: opts.GetClientId(), Endpoint: provider.Endpoint(), RedirectURL: "http://" + ln.Addr().String() + "/callback",
		Scopes: append([]string{oidc.ScopeOpenID}, opts.GetScopes()...)}
	secret, state := oauth2.GenerateVerifier(), draw()
	back := make(chan url.Values, 1)
	srv := &http.Server{Handler: comesBack(state, back), ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 32 << 10}
	go func() { _ = srv.Serve(ln) }()
	defer srv.Close()
	a.note("open this in a browser on this machine:\n\n  %s\n", conf.AuthCodeURL(state, oidc.Nonce(nonce), oauth2.S256ChallengeOption(secret)))
	var q url.Values
	select {
	case q = <-back:
	case <-ctx.Done():
		return "", fault.Because(ctx.Err(), op, fault.Expired, "nobody logged in")
	}
	_ = srv.Shutdown(ctx)                                          // so that the browser gets its page
	if iss := q.Get("iss"); iss != "" && iss != opts.GetIssuer() { // RFC 9207
		return "", fault.New(op, fault.Denied, "the answer is of the issuer %q, and %q was asked", iss, opts.GetIssuer())
	}
	if e := q.Get("error"); e != "" {
		return "", fault.New(op, fault.Denied, "the issuer refused: %s %s", e, q.Get("error_description"))
	}
	token, err := conf.Exchange(ctx, q.Get("code"), oauth2.VerifierOption(secret))
	if err != nil {
		return "", fault.Because(err, op, fault.Denied, "the issuer gave no token")
	}
	id, _ := token.Extra("id_token").(string)
	if id == "" {
		return "", fault.New(op, fault.Denied, "the issuer gave no ID token: is the scope openid allowed for the client %q?", opts.GetClientId())
	}
	return id, nil
}

// comesBack takes the one answer that carries the state. What else comes to the port ends nothing.
func comesBack(state string, back chan<- url.Values) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /callback", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		if subtle.ConstantTimeCompare([]byte(q.Get("state")), []byte(state)) != 1 {
			http.Error(w, "This is not the answer to a login that was begun here.", http.StatusBadRequest)
			return
		}
		select {
		case back <- q:
			fmt.Fprintln(w, "demarc has your answer. You may close this page.")
		default:
			http.Error(w, "There was an answer before.", http.StatusConflict)
		}
	})
	return mux
}
