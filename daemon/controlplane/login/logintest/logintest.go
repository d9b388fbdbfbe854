// SPDX-License-Identifier: Apache-2.0

// Package logintest is an OpenID Connect issuer to test against. It is no part of a product's trust.
package logintest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// Provider is an OpenID Connect issuer over HTTPS on loopback: discovery, keys, authorization code with PKCE. Whoever asks is
// logged in as the person of Claims. Its fields may be changed before it is asked.
type Provider struct {
	*identitytest.Issuer
	ClientID string
	Claims   map[string]any // of each token, beside iss, aud, iat, exp and nonce
	Key      string         // that signs: identitytest.RSA or EC
	CA       []byte         // PEM, of its certificate
	Pool     *x509.CertPool
	Serve    func(w http.ResponseWriter, r *http.Request) bool // goes before all else, where it is set and says true

	srv   *httptest.Server
	mu    sync.Mutex
	codes map[string]url.Values
	asked map[string]int
}

// NewProvider starts one. The caller closes it.
func NewProvider(clientID string) (*Provider, error) {
	const op = "logintest.NewProvider"
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "issuer"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	p := &Provider{ClientID: clientID, Key: identitytest.RSA, Pool: x509.NewCertPool(), codes: map[string]url.Values{}, asked: map[string]int{},
		CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
	p.Pool.AppendCertsFromPEM(p.CA)
	p.srv = httptest.NewUnstartedServer(p)
	p.srv.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS12}
	p.srv.StartTLS()
	if p.Issuer, err = identitytest.NewIssuer(p.srv.URL); err != nil {
		p.srv.Close()
		return nil, err
	}
	return p, nil
}

// Close stops it.
func (p *Provider) Close() { p.srv.Close() }

// Asked tells how often a path was asked.
func (p *Provider) Asked(path string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.asked[path]
}

// Person is the claims of a good token for a nonce.
func (p *Provider) Person(nonce string, now time.Time) map[string]any {
	c := map[string]any{"iss": p.URL, "aud": p.ClientID, "iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(), "nonce": nonce}
	for k, v := range p.Claims {
		c[k] = v
	}
	return c
}

// ServeHTTP implements http.Handler.
func (p *Provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked[r.URL.Path]++
	if p.Serve != nil && p.Serve(w, r) {
		return
	}
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		answer(w, map[string]any{"issuer": p.URL, "authorization_endpoint": p.URL + "/authorize", "token_endpoint": p.URL + "/token", "jwks_uri": p.URL + "/keys",
			"response_types_supported": []string{"code"}, "subject_types_supported": []string{"public"}, "id_token_signing_alg_values_supported": []string{"RS256", "ES256"}})
	case "/keys":
		answer(w, p.JWKS())
	case "/authorize":
		p.authorize(w, r)
	case "/token":
		p.token(w, r)
	default:
		http.NotFound(w, r)
	}
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

func (p *Provider) authorize(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	back, err := url.Parse(q.Get("redirect_uri"))
	if err != nil || back.Scheme != "http" || back.Hostname() != "127.0.0.1" || q.Get("client_id") != p.ClientID || q.Get("response_type") != "code" ||
		q.Get("code_challenge_method") != "S256" || q.Get("code_challenge") == "" || q.Get("state") == "" || q.Get("nonce") == "" {
		http.Error(w, "not a request of a public client with PKCE and a loopback redirect", http.StatusBadRequest)
		return
	}
	code := rand.Text()
	p.codes[code] = q
	back.RawQuery = url.Values{"code": {code}, "state": {q.Get("state")}, "iss": {p.URL}}.Encode()
	http.Redirect(w, r, back.String(), http.StatusFound)
}

func (p *Provider) token(w http.ResponseWriter, r *http.Request) {
	_ = r.ParseForm()
	q, ok := p.codes[r.PostForm.Get("code")]
	delete(p.codes, r.PostForm.Get("code"))
	sum := sha256.Sum256([]byte(r.PostForm.Get("code_verifier")))
	if !ok || r.PostForm.Get("redirect_uri") != q.Get("redirect_uri") || base64.RawURLEncoding.EncodeToString(sum[:]) != q.Get("code_challenge") {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, `{"error":"invalid_grant"}`)
		return
	}
	id, err := p.Mint(p.Key, p.Person(q.Get("nonce"), time.Now()))
	if err != nil {
		http.Error(w, "mint", http.StatusInternalServerError)
		return
	}
	answer(w, map[string]any{"access_token": "none", "token_type": "Bearer", "expires_in": 60, "id_token": id})
}
