// SPDX-License-Identifier: Apache-2.0

// Package platform obtains the proof of the platform that the appliance runs on, made out to one audience.
//
//	aws         a GetCallerIdentity request, signed with the role that the AWS SDK finds; it is not sent
//	gcp         an identity token of the metadata server, format=full
//	kubernetes  a service-account token of the API server's TokenRequest, or of a command
//
// It asks nobody but the platform itself.
package platform

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"time"

	"cloud.google.com/go/compute/metadata"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// How long the platform may take.
const (
	proveTimeout = 30 * time.Second
	askTimeout   = 10 * time.Second
)

// tokenLife is asked of TokenRequest: the shortest that an API server gives.
const tokenLife = 10 * time.Minute

// Proof is what the control plane is shown: a token or, on AWS, a signed identity.
type Proof struct {
	Token string
	AWS   *identity.SignedIdentity
}

// Prove asks the platform for a proof that is made out to exactly this audience. at is the control plane's time: a
// signature carries it, so that a clock of this host that is hours off refuses nothing.
//
// The kinds: unavailable (the platform does not answer, or not here), invalid (it answers what can't be a proof), denied
// (it refuses: a permission is missing).
func Prove(ctx context.Context, p configs.Proof, audience string, at time.Time) (Proof, error) {
	ctx, cancel := context.WithTimeout(ctx, proveTimeout)
	defer cancel()
	switch {
	case p.Kind == configs.ProofAWS:
		s, err := signed(ctx, p.AWS, audience, at)
		return Proof{AWS: s}, err
	case p.Kind == configs.ProofGCP:
		return token(google(ctx, audience))
	case len(p.TokenCommand) > 0:
		return token(command(ctx, p.TokenCommand, audience))
	}
	c, err := inCluster(p.Kubernetes)
	if err != nil {
		return Proof{}, err
	}
	return token(c.request(ctx, audience))
}

func token(b []byte, err error) (Proof, error) {
	const op = "platform.Prove"
	if err != nil {
		return Proof{}, err
	}
	t := string(bytes.TrimSpace(b))
	if len(t) == 0 || len(t) > identity.MaxToken {
		return Proof{}, fault.New(op, fault.Invalid, "the platform's token has %d bytes, 1 to %d are taken", len(t), identity.MaxToken)
	}
	return Proof{Token: t}, nil
}

func command(ctx context.Context, argv []string, audience string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, argv[0], append(append([]string{}, argv[1:]...), audience)...)
	cmd.WaitDelay = time.Second
	out := &bounded{left: identity.MaxToken + 1}
	cmd.Stdout = out
	if err := cmd.Run(); err != nil {
		return nil, fault.Because(err, "platform.command", fault.Unavailable, "proof.token_command gave no token: %s", ended(ctx, cmd, err))
	}
	return out.Bytes(), nil
}

// ended says how a command failed. Nothing that it wrote is told: it may be a token.
func ended(ctx context.Context, cmd *exec.Cmd, err error) string {
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return "it did not end in time"
	case errors.As(err, &exit):
		return "it ended with " + exit.Error()
	case cmd.Process == nil:
		return "it can't be started (" + fault.ClipTo(err.Error(), 300) + ")"
	}
	return fault.ClipTo(err.Error(), 300)
}

// bounded keeps the first bytes and takes the rest for nothing.
type bounded struct {
	bytes.Buffer
	left int
}

func (b *bounded) Write(p []byte) (int, error) {
	n := min(len(p), b.left-b.Len())
	b.Buffer.Write(p[:n])
	return len(p), nil
}

// google asks the metadata server, at GCE_METADATA_HOST where that is set, as Google's own libraries do.
func google(ctx context.Context, audience string) ([]byte, error) {
	const op = "platform.google"
	c := metadata.NewClient(&http.Client{Timeout: askTimeout, Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true,
		MaxResponseHeaderBytes: 16 << 10,
		DialContext:            (&net.Dialer{Timeout: 2 * time.Second}).DialContext}})
	q := url.Values{"audience": {audience}, "format": {"full"}}
	t, err := c.GetWithContext(ctx, "instance/service-accounts/default/identity?"+q.Encode())
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable,
			"the metadata server of Google Cloud gave no identity token: is this a virtual machine with a service account?")
	}
	return []byte(t), nil
}

// cluster is the API server, and who we are there.
type cluster struct {
	http  *http.Client
	base  string
	token string // of our own service account, for the API server's audience
}

// Where a pod finds its own account.
const podDir = "/var/run/secrets/kubernetes.io/serviceaccount/"

func inCluster(k *configs.KubernetesProof) (*cluster, error) {
	const op = "platform.kubernetes"
	at := configs.KubernetesProof{CAFile: podDir + "ca.crt", TokenFile: podDir + "token"}
	if host := os.Getenv("KUBERNETES_SERVICE_HOST"); host != "" {
		at.APIServer = "https://" + net.JoinHostPort(host, os.Getenv("KUBERNETES_SERVICE_PORT"))
	}
	if k != nil {
		for to, from := range map[*string]string{&at.APIServer: k.APIServer, &at.CAFile: k.CAFile, &at.TokenFile: k.TokenFile} {
			if from != "" {
				*to = from
			}
		}
	}
	if at.APIServer == "" {
		return nil, fault.New(op, fault.Unavailable, "this is no pod (KUBERNETES_SERVICE_HOST is not set): name proof.kubernetes.api_server")
	}
	ca, err := os.ReadFile(at.CAFile)
	roots := x509.NewCertPool()
	if err != nil || !roots.AppendCertsFromPEM(ca) {
		return nil, fault.Because(err, op, fault.Unavailable, "the CA of the API server can't be read: %s", at.CAFile)
	}
	own, err := os.ReadFile(at.TokenFile)
	if err != nil || len(own) > identity.MaxToken {
		return nil, fault.Because(err, op, fault.Unavailable, "the pod's own token can't be read: %s", at.TokenFile)
	}
	return &cluster{base: strings.TrimSuffix(at.APIServer, "/"), token: string(bytes.TrimSpace(own)), http: &http.Client{
		Timeout:       askTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true, MaxResponseHeaderBytes: 16 << 10,
			TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}},
	}}, nil
}

// request asks TokenRequest (authentication.k8s.io/v1) for a token of our own service account.
func (c *cluster) request(ctx context.Context, audience string) ([]byte, error) {
	const op = "platform.kubernetes"
	namespace, account, err := whose(c.token)
	if err != nil {
		return nil, err
	}
	ask, err := json.Marshal(map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
		"spec": map[string]any{"audiences": []string{audience}, "expirationSeconds": int(tokenLife.Seconds())}})
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	b, err := c.do(ctx, http.MethodPost,
		"/api/v1/namespaces/"+url.PathEscape(namespace)+"/serviceaccounts/"+url.PathEscape(account)+"/token", ask, identity.MaxToken+(16<<10))
	if err != nil {
		return nil, err
	}
	var got struct {
		Status struct {
			Token string `json:"token"`
		} `json:"status"`
	}
	if err := json.Unmarshal(b, &got); err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the API server's answer to TokenRequest does not parse")
	}
	return []byte(got.Status.Token), nil
}

// do sends one request and gives the body of an answer of at most so many bytes.
func (c *cluster) do(ctx context.Context, method, path string, body []byte, most int) ([]byte, error) {
	const op = "platform.kubernetes"
	r, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, fault.At(op, fault.Invalid, err)
	}
	r.Header.Set("Authorization", "Bearer "+c.token)
	r.Header.Set("Accept", "application/json, application/jwk-set+json") // the keys come as the second, and as nothing else
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	res, err := c.http.Do(r)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the API server does not answer")
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, int64(most)+1))
	switch {
	case err != nil:
		return nil, fault.Because(err, op, fault.Unavailable, "the API server's answer was cut off")
	case res.StatusCode == http.StatusForbidden && method == http.MethodPost:
		return nil, fault.New(op, fault.Denied,
			"the API server refuses the appliance a token of its own service account: it needs create on serviceaccounts/token, see docs/identity.md")
	case res.StatusCode == http.StatusForbidden:
		return nil, fault.New(op, fault.Denied,
			"the API server does not show its keys to the appliance: it needs the cluster role system:service-account-issuer-discovery")
	case res.StatusCode == http.StatusUnauthorized:
		return nil, fault.New(op, fault.Denied, "the API server does not know the pod's token: it ran out, or it is of another cluster")
	case res.StatusCode/100 != 2:
		return nil, fault.New(op, fault.Unavailable, "the API server answers %d", res.StatusCode)
	case len(b) > most:
		return nil, fault.New(op, fault.Invalid, "the API server's answer has more than %d bytes", most)
	}
	return b, nil
}

// whose reads, in the pod's own token, whose it is. It is not verified: the API server does that when it is asked.
func whose(token string) (namespace, account string, err error) {
	bad := func(err error) (string, string, error) {
		return "", "", fault.Because(err, "platform.kubernetes", fault.Invalid, "the pod's own token is not that of a service account")
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return bad(nil)
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return bad(err)
	}
	var c struct {
		Subject string `json:"sub"`
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return bad(err)
	}
	s := strings.Split(c.Subject, ":")
	if len(s) != 4 || s[0] != "system" || s[1] != "serviceaccount" || s[2] == "" || s[3] == "" {
		return bad(nil)
	}
	return s[2], s[3], nil
}

// Keys is what the cluster signs tokens with now, as its API server publishes it, and what asks it for a token made out
// to one audience. It gives nil where the proof is not asked of an API server.
func Keys(ctx context.Context, p configs.Proof) (jwks []byte, own func(ctx context.Context, audience string) (string, error), err error) {
	if p.Kind != configs.ProofKubernetes || len(p.TokenCommand) > 0 {
		return nil, nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, proveTimeout)
	defer cancel()
	c, err := inCluster(p.Kubernetes)
	if err != nil {
		return nil, nil, err
	}
	if jwks, err = c.do(ctx, http.MethodGet, "/openid/v1/jwks", nil, identity.MaxJWKS); err != nil {
		return nil, nil, err
	}
	return jwks, func(ctx context.Context, audience string) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, proveTimeout)
		defer cancel()
		t, err := token(c.request(ctx, audience))
		return t.Token, err
	}, nil
}
