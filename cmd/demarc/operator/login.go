// SPDX-License-Identifier: Apache-2.0

package operator

import (
	"bytes"
	"context"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"golang.org/x/oauth2"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/daemon/controlplane/login"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// loginWait is how long a person has to log in.
const loginWait = 5 * time.Minute

// issuerTimeout bounds a call of the issuer.
const issuerTimeout = 10 * time.Second

// anchor is the trust anchor by which a login recognises a control plane. None of it is a secret; that it is the right one matters.
type anchor struct {
	TrustDomain string   `yaml:"trust_domain"`
	Nodes       []string `yaml:"nodes"`
	LogKey      string   `yaml:"log_key"` // PEM
}

func (t anchor) controlPlane() client.ControlPlane {
	return client.ControlPlane{TrustDomain: t.TrustDomain, Nodes: t.Nodes, LogKey: []byte(t.LogKey)}
}

func anchorCommand(a *cli.App) *cobra.Command {
	return a.Online(&cobra.Command{
		Use:   "door",
		Short: "Print the trust anchor for a login: which control plane it is, and its key",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "door prints a file for demarc operator login. It holds no secret, and lets nobody in by itself. Hand it out over a\n" +
			"channel that nobody can change: a false one leads to a false control plane.",
		Example: "  demarc operator door > acme-door.yaml",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			m, err := client.Call(ctx, v, client.Node.GetDoor, &controlv1.GetDoorRequest{})
			if err != nil {
				return err
			}
			t := anchor{m.GetTrustDomain(), v.Nodes, string(m.GetLogKey())}
			b, err := yaml.Marshal(t)
			if err != nil {
				return fault.At("demarc.door", fault.Internal, err)
			}
			doc := map[string]any{"trust_domain": t.TrustDomain, "nodes": t.Nodes, "log_key": t.LogKey}
			return a.Emit(doc, func(w io.Writer) { _, _ = w.Write(b) })
		})
}

func readAnchor(path string) (anchor, error) {
	b, err := cli.ReadFile(path, identity.MaxInvitation)
	if err != nil {
		return anchor{}, err
	}
	var t anchor
	dec := yaml.NewDecoder(bytes.NewReader(b))
	dec.KnownFields(true)
	if err := dec.Decode(&t); err != nil || t.TrustDomain == "" || len(t.Nodes) == 0 || t.LogKey == "" {
		return anchor{}, fault.Because(err, "demarc.door", fault.Invalid, "%s is no trust anchor: take what demarc operator door prints", path)
	}
	return t, nil
}

func loginCommand(a *cli.App) *cobra.Command {
	var out, ca string
	var port uint16
	c := &cobra.Command{
		Use:   "login DOOR --out FILE.yaml",
		Short: "Log in as an operator at the vendor's OpenID Connect issuer",
		Args:  cli.Exactly(1, "the file of demarc operator door"),
		Long: "login prints an address to open in a browser on this machine, where you log in at the vendor's issuer. What comes back\n" +
			"is valid for a key that is drawn here, and is traded for a certificate of some hours with the role that your groups\n" +
			"have. Run it again with the same --out when that ends; the keys beside the certificate stay.",
		Example: "  demarc operator login acme-door.yaml --out ~/demarc/me.yaml",
	}
	f := c.Flags()
	f.StringVar(&out, "out", "", "the operator's file to write, or to renew")
	f.StringVar(&ca, "issuer-ca", "", "file with the CA of the issuer, if the system does not trust it")
	f.Uint16Var(&port, "port", 0, "of the loopback address that the browser is sent back to; any free one if absent")
	c.RunE = func(c *cobra.Command, args []string) error {
		if out == "" {
			return cli.Usage("name the operator's file with --out FILE.yaml")
		}
		to, err := readAnchor(args[0])
		if err != nil {
			return err
		}
		issuer, err := issuerClient(ca)
		if err != nil {
			return err
		}
		defer issuer.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(c.Context(), a.Timeout+loginWait)
		defer cancel()
		got, name, err := logIn(ctx, a, to.controlPlane(), issuer, port, out)
		if err != nil {
			return err
		}
		doc := map[string]any{"operator": name, "role": got.role, "operator_file": out, "until_unix": got.leaf.NotAfter.Unix()}
		return a.Emit(doc, func(w io.Writer) {
			fmt.Fprintf(w, "you are operator %s with the role %s until %s\n  export DEMARC_CONTEXT=%s\n",
				name, got.role, got.leaf.NotAfter.UTC().Format(time.RFC3339), out)
		})
	}
	return c
}

// issuerClient calls the issuer, and follows no redirect.
func issuerClient(ca string) (*http.Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		b, err := cli.ReadFile(ca, identity.MaxBundle)
		if err != nil {
			return nil, err
		}
		if conf.RootCAs = x509.NewCertPool(); !conf.RootCAs.AppendCertsFromPEM(b) {
			return nil, cli.Usage("--issuer-ca: %s holds no certificate in PEM", ca)
		}
	}
	return &http.Client{
		Timeout:       issuerTimeout,
		Transport:     &http.Transport{TLSClientConfig: conf, Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// logIn trades an ID token for a certificate, and writes or renews the operator's files. It returns the operator's name.
func logIn(ctx context.Context, a *cli.App, cp client.ControlPlane, issuer *http.Client, port uint16, out string) (issued, string, error) {
	const op = "demarc.login"
	fail := func(err error) (issued, string, error) { return issued{}, "", err }
	opts, err := client.CallAnonymous(ctx, cp, func(ctx context.Context, c client.Anonymous) (*controlv1.LoginOptionsResponse, error) {
		return client.Do(ctx, c.LoginOptions, &controlv1.LoginOptionsRequest{})
	})
	if err != nil {
		return fail(err)
	}
	key, csr, err := client.NewKey()
	if err != nil {
		return fail(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return fail(fault.At(op, fault.Internal, err))
	}
	token, err := idToken(ctx, a, opts, issuer, port, login.Nonce(spki))
	if err != nil {
		return fail(err)
	}
	var roots client.SignedBundle
	m, err := client.CallAnonymous(ctx, cp, func(ctx context.Context, c client.Anonymous) (*controlv1.LoginResponse, error) {
		roots = c.Roots
		return client.Do(ctx, c.Login, &controlv1.LoginRequest{Csr: csr, IdToken: token, BundleHeld: roots.Number})
	})
	if err != nil {
		return fail(err)
	}
	got, err := checkIssued(m.GetCertificate(), roots, m.GetRole(), key, cp, m.GetName())
	if err != nil {
		return fail(err)
	}
	pemKey, err := client.KeyPEM(key)
	if err != nil {
		return fail(err)
	}
	f := files{out}
	if _, err := os.Lstat(out); err != nil {
		if err := client.ReplaceFiles(map[string][]byte{f.path("key"): pemKey}); err != nil {
			return fail(err)
		}
		return got, m.GetName(), f.write(cp, m.GetName(), got)
	}
	o, err := client.ReadOperator(out)
	if err != nil {
		return fail(err)
	}
	if o.Name != m.GetName() || o.TrustDomain != cp.TrustDomain {
		return fail(fault.New(op, fault.Conflict, "%s is the file of operator %s of %s, and you are %s of %s: name another with --out",
			out, o.Name, o.TrustDomain, m.GetName(), cp.TrustDomain))
	}
	if err := got.roots.Store(o.Bundle); err != nil {
		return fail(err)
	}
	return got, m.GetName(), client.ReplaceFiles(map[string][]byte{
		o.LogKey: cp.LogKey, o.Key: pemKey, o.Certificate: client.CertificatesPEM(got.leaf.Raw),
	})
}

// idToken does the authorization-code flow with PKCE (RFC 7636) and a loopback redirect (RFC 8252).
func idToken(ctx context.Context, a *cli.App, opts *controlv1.LoginOptionsResponse, issuer *http.Client, port uint16,
	nonce string) (string, error) {
	const op = "demarc.login"
	ctx = oidc.ClientContext(ctx, issuer)
	provider, err := oidc.NewProvider(ctx, opts.GetIssuer())
	if err != nil {
		return "", fault.Because(err, op, fault.Unavailable, "the issuer %s does not say how to log in", opts.GetIssuer())
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
	conf := oauth2.Config{
		ClientID: opts.GetClientId(), Endpoint: provider.Endpoint(), RedirectURL: "http://" + ln.Addr().String() + "/callback",
		Scopes: append([]string{oidc.ScopeOpenID}, opts.GetScopes()...),
	}
	secret, state := oauth2.GenerateVerifier(), client.NewID()
	back := make(chan url.Values, 1)
	srv := &http.Server{Handler: callback(state, back), ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 32 << 10}
	var serving sync.WaitGroup
	serving.Go(func() { _ = srv.Serve(ln) })
	defer serving.Wait()
	defer srv.Close()
	a.Note("open this in a browser on this machine:\n\n  %s\n", conf.AuthCodeURL(state, oidc.Nonce(nonce), oauth2.S256ChallengeOption(secret)))
	var q url.Values
	select {
	case q = <-back:
	case <-ctx.Done():
		return "", fault.Because(ctx.Err(), op, fault.Expired, "no login came back in time")
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
		return "", fault.Because(err, op, fault.Denied, "the issuer sent no token")
	}
	id, _ := token.Extra("id_token").(string)
	if id == "" {
		return "", fault.New(op, fault.Denied, "the issuer sent no ID token: is the scope openid allowed for the client %q?", opts.GetClientId())
	}
	return id, nil
}

// callback takes the one answer that carries the state. Any other request to the port ends nothing.
func callback(state string, back chan<- url.Values) http.Handler {
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
