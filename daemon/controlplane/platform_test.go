// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/configs"
	own "github.com/demarc-dev/demarc/daemon/appliance/platform"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/platform"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// authority is a CA for the hosts of platforms, and a server with its certificate.
func serveTLS(t *testing.T, hosts []string, h http.Handler) (addr string, roots *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ok(t, err)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "platform"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, DNSNames: hosts, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	ok(t, err)
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS12}
	s.StartTLS()
	t.Cleanup(s.Close)
	leaf, err := x509.ParseCertificate(der)
	ok(t, err)
	roots = x509.NewCertPool()
	roots.AddCert(leaf)
	return s.Listener.Addr().String(), roots
}

// credential is a role's, as STS knows it.
type credential struct{ secret, session, arn, account, uid string }

// sts checks signatures for real: it signs what it received again with the secret that it knows, by AWS's own signer.
type sts struct {
	mu    sync.Mutex
	known map[string]credential // by access key id
	asked int
}

func (s *sts) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

func (s *sts) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	refuse := func(status int, code string) {
		w.WriteHeader(status)
		fmt.Fprintf(w, `<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>%s</Code><Message>m</Message></Error><RequestId>1</RequestId></ErrorResponse>`, code)
	}
	body, _ := io.ReadAll(r.Body)
	auth := r.Header.Get("Authorization")
	var id, day, region string
	if head, ok := strings.CutPrefix(auth, "AWS4-HMAC-SHA256 Credential="); ok {
		scope, _, _ := strings.Cut(head, ",")
		if p := strings.Split(scope, "/"); len(p) == 5 && p[3] == "sts" && p[4] == "aws4_request" {
			id, day, region = p[0], p[1], p[2]
		}
	}
	c, known := s.known[id]
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	_, list, _ := strings.Cut(auth, "SignedHeaders=")
	list, _, _ = strings.Cut(list, ",")
	switch {
	case r.Method != http.MethodPost || r.URL.Path != "/" || r.URL.RawQuery != "" || string(body) != "Action=GetCallerIdentity&Version=2011-06-15":
		refuse(400, "InvalidAction")
		return
	case !known || r.Header.Get("X-Amz-Security-Token") != c.session:
		refuse(403, "InvalidClientTokenId")
		return
	case err != nil || day != at.Format("20060102") || r.Host != "sts."+region+".amazonaws.com":
		refuse(403, "IncompleteSignature")
		return
	case time.Since(at).Abs() > 15*time.Minute:
		refuse(403, "SignatureExpired")
		return
	}
	again, _ := http.NewRequest(http.MethodPost, "https://"+r.Host+"/", bytes.NewReader(body))
	for _, h := range strings.Split(list, ";") {
		if h != "host" && h != "content-length" {
			again.Header.Set(h, r.Header.Get(h))
		}
	}
	sum := sha256.Sum256(body)
	ok := v4.NewSigner().SignHTTP(r.Context(), aws.Credentials{AccessKeyID: id, SecretAccessKey: c.secret, SessionToken: c.session}, again, hex.EncodeToString(sum[:]), "sts", region, at)
	if ok != nil || again.Header.Get("Authorization") != auth || !strings.Contains(list, "x-demarc-audience") {
		refuse(403, "SignatureDoesNotMatch")
		return
	}
	fmt.Fprintf(w, `<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><GetCallerIdentityResult><Arn>%s</Arn><UserId>%s:i-0123456789</UserId><Account>%s</Account></GetCallerIdentityResult><ResponseMetadata><RequestId>1</RequestId></ResponseMetadata></GetCallerIdentityResponse>`, c.arn, c.uid, c.account)
}

const (
	keyID   = "ASIAEXAMPLE0123456789"
	roleARN = "arn:aws:iam::123456789012:role/demarc/appliance"
)

// onAWS is a gate whose STS is on loopback, and the appliance eu-1 registered with a role.
func onAWS(t *testing.T) (*gate, *sts) {
	t.Helper()
	g := newGate(t, time.Minute)
	s := &sts{known: map[string]credential{
		keyID:                   {"secret", "c2Vzc2lvbg==", "arn:aws:sts::123456789012:assumed-role/appliance/i-0123456789", "123456789012", "AROAEXAMPLE0123456789"},
		"ASIAOTHER00123456789":  {"other", "b3RoZXI=", "arn:aws:sts::123456789012:assumed-role/other/i-0123456789", "123456789012", "AROAOTHER00123456789"},
		"ASIAFOREIGN123456789":  {"foreign", "Zm9yZWlnbg==", "arn:aws:sts::210987654321:assumed-role/appliance/i-0123456789", "210987654321", "AROAFOREIGN123456789"},
		"ASIAANEW000123456789":  {"anew", "YW5ldw==", "arn:aws:sts::123456789012:assumed-role/appliance/i-0123456789", "123456789012", "AROAANEW000123456789"},
		"ASIACHINA00123456789X": {"china", "Y2hpbmE=", "arn:aws-cn:sts::123456789012:assumed-role/appliance/i-0123456789", "123456789012", "AROACHINA00123456789"},
	}}
	addr, roots := serveTLS(t, []string{"sts.eu-central-1.amazonaws.com", "sts.us-east-1.amazonaws.com"}, s)
	g.asks(platform.Options{Roots: roots, Now: time.Now, Dial: to(addr)})
	g.expects(identity.Expect{Kind: identity.KindAWS, Account: "123456789012", RoleARN: roleARN, Regions: []string{"eu-central-1"}})
	for _, k := range []string{"AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"} {
		t.Setenv(k, "")
	}
	t.Setenv("AWS_CONFIG_FILE", filepath.Join(t.TempDir(), "none"))
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", filepath.Join(t.TempDir(), "none"))
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	return g, s
}

// to dials one address, whatever is asked for.
func to(addr string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, addr)
	}
}

func (g *gate) asks(o platform.Options) {
	g.t.Helper()
	v, err := platform.New(o)
	ok(g.t, err)
	g.server.Platforms = v
}

func (g *gate) expects(e identity.Expect) {
	g.t.Helper()
	ok(g.t, e.Check())
	b, err := json.Marshal(e)
	ok(g.t, err)
	submitAs(g, book.SetExpect{Name: "eu-1", Expect: b})
}

// proves enrols with what the appliance's own code obtains from its platform.
func (g *gate) proves(p configs.Proof, log []byte, change func(*boundaryv1.EnrolRequest)) error {
	g.t.Helper()
	m, err := g.proof(p, log)
	if err != nil {
		return err
	}
	if change != nil {
		change(m)
	}
	_, err = g.enrol(m)
	return err
}

func (g *gate) proof(p configs.Proof, log []byte) (*boundaryv1.EnrolRequest, error) {
	g.t.Helper()
	ch, err := g.bootstrap(g.caller(nil)).Challenge(g.t.Context(), connect.NewRequest(&boundaryv1.ChallengeRequest{}))
	ok(g.t, err)
	m, _ := g.request(logKey(g.t))
	if log != nil {
		m.LogKey = log
	}
	m.Nonce = ch.Msg.GetNonce()
	audience, err := identity.Audience(domain, m.GetNonce(), m.GetCsr())
	ok(g.t, err)
	proof, err := own.Prove(g.t.Context(), p, audience, time.Unix(ch.Msg.GetServerTimeUnix(), 0))
	if err != nil {
		return nil, err
	}
	if m.Token = proof.Token; proof.AWS != nil {
		s := proof.AWS
		m.Aws = &boundaryv1.SignedIdentity{Region: s.Region, Date: s.Date, AccessKeyId: s.AccessKeyID, SessionToken: s.SessionToken, Signature: s.Signature}
	}
	return m, nil
}

func role(t *testing.T, id string, s *sts) {
	t.Helper()
	t.Setenv("AWS_ACCESS_KEY_ID", id)
	t.Setenv("AWS_SECRET_ACCESS_KEY", s.known[id].secret)
	t.Setenv("AWS_SESSION_TOKEN", s.known[id].session)
}

var awsProof = configs.Proof{Kind: configs.ProofAWS, AWS: &configs.AWSProof{Region: "eu-central-1"}}

func TestAWSProvesByEnvironment(t *testing.T) {
	g, s := onAWS(t)
	role(t, keyID, s)
	ok(t, g.proves(awsProof, nil, nil))
	a, err := g.order.book.View().Appliance("eu-1")
	ok(t, err)
	if a.Status != book.Enrolled || a.UID != "AROAEXAMPLE0123456789" {
		t.Fatalf("%+v", a)
	}
	if n := s.count(); n != 1 {
		t.Fatalf("STS was asked %d times", n)
	}
}

func TestAWSProvesBySharedFile(t *testing.T) {
	g, s := onAWS(t)
	file := filepath.Join(t.TempDir(), "config")
	c := s.known[keyID]
	ok(t, os.WriteFile(file, fmt.Appendf(nil, "[default]\nregion = eu-central-1\naws_access_key_id = %s\naws_secret_access_key = %s\naws_session_token = %s\n", keyID, c.secret, c.session), 0o600))
	t.Setenv("AWS_CONFIG_FILE", file)
	ok(t, g.proves(configs.Proof{Kind: configs.ProofAWS}, nil, nil))
}

func TestAWSProvesByInstance(t *testing.T) {
	g, s := onAWS(t)
	c := s.known[keyID]
	imds := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token":
			w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
			fmt.Fprint(w, "v2")
		case r.Header.Get("X-Aws-Ec2-Metadata-Token") != "v2":
			w.WriteHeader(http.StatusUnauthorized)
		case r.URL.Path == "/latest/meta-data/iam/security-credentials/":
			fmt.Fprint(w, "appliance")
		case r.URL.Path == "/latest/meta-data/iam/security-credentials/appliance":
			fmt.Fprintf(w, `{"Code":"Success","Type":"AWS-HMAC","AccessKeyId":%q,"SecretAccessKey":%q,"Token":%q,"Expiration":%q}`, keyID, c.secret, c.session, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
		case r.URL.Path == "/latest/dynamic/instance-identity/document":
			fmt.Fprint(w, `{"region":"eu-central-1"}`)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	t.Cleanup(imds.Close)
	t.Setenv("AWS_EC2_METADATA_DISABLED", "false")
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", imds.URL)
	ok(t, g.proves(configs.Proof{Kind: configs.ProofAWS}, nil, nil))
}

func TestAWSRefuses(t *testing.T) {
	g, s := onAWS(t)
	for name, tc := range map[string]struct {
		key    string
		change func(*boundaryv1.SignedIdentity)
		kind   fault.Kind
		want   string
		asked  bool // may STS be asked at all
	}{
		"another role":      {"ASIAOTHER00123456789", nil, fault.Denied, "has the role other", true},
		"another account":   {"ASIAFOREIGN123456789", nil, fault.Denied, "of the account 210987654321", true},
		"another partition": {"ASIACHINA00123456789X", nil, fault.Denied, "of the partition aws-cn", true},
		"another secret":    {keyID, func(m *boundaryv1.SignedIdentity) { m.Signature[0] ^= 1 }, fault.Denied, "SignatureDoesNotMatch", true},
		"another's session": {keyID, func(m *boundaryv1.SignedIdentity) { m.SessionToken = "b3RoZXI=" }, fault.Denied, "InvalidClientTokenId", true},
		"another date": {keyID, func(m *boundaryv1.SignedIdentity) {
			m.Date = time.Now().Add(time.Minute).UTC().Format("20060102T150405Z")
		}, fault.Denied, "SignatureDoesNotMatch", true},
		"stale date": {keyID, func(m *boundaryv1.SignedIdentity) {
			m.Date = time.Now().Add(-6 * time.Minute).UTC().Format("20060102T150405Z")
		}, fault.Expired, "compare the clocks", false},
		"date to come": {keyID, func(m *boundaryv1.SignedIdentity) {
			m.Date = time.Now().Add(6 * time.Minute).UTC().Format("20060102T150405Z")
		}, fault.Expired, "compare the clocks", false},
		"foreign host as region":  {keyID, func(m *boundaryv1.SignedIdentity) { m.Region = "evil.example/" }, fault.Invalid, "is no region", false},
		"host in region":          {keyID, func(m *boundaryv1.SignedIdentity) { m.Region = "eu-central-1.amazonaws.com@evil.example#" }, fault.Invalid, "is no region", false},
		"region not registered":   {keyID, func(m *boundaryv1.SignedIdentity) { m.Region = "us-east-1" }, fault.Denied, "is not registered", false},
		"region of China":         {keyID, func(m *boundaryv1.SignedIdentity) { m.Region = "cn-north-1" }, fault.Denied, "partition", false},
		"header in session token": {keyID, func(m *boundaryv1.SignedIdentity) { m.SessionToken = "a\r\nX-Evil: 1" }, fault.Invalid, "session token", false},
		"header in access key":    {keyID, func(m *boundaryv1.SignedIdentity) { m.AccessKeyId = "ASIAEXAMPLE0123\r\nX: 1" }, fault.Invalid, "access key id", false},
		"scope in access key": {keyID, func(m *boundaryv1.SignedIdentity) {
			m.AccessKeyId = keyID + "/20260101/eu-central-1/sts/aws4_request, X="
		}, fault.Invalid, "access key id", false},
		"header in date":           {keyID, func(m *boundaryv1.SignedIdentity) { m.Date += "\r\nX: 1" }, fault.Invalid, "date", false},
		"line end after the date":  {keyID, func(m *boundaryv1.SignedIdentity) { m.Date += "\n" }, fault.Invalid, "date", false},
		"no session":               {keyID, func(m *boundaryv1.SignedIdentity) { m.SessionToken = "" }, fault.Invalid, "credentials of a role", false},
		"session of 9 KiB":         {keyID, func(m *boundaryv1.SignedIdentity) { m.SessionToken = strings.Repeat("a", 9<<10) }, fault.Invalid, "session token", false},
		"unicode in the key":       {keyID, func(m *boundaryv1.SignedIdentity) { m.AccessKeyId = "ASIAEXAMPLE012345678\u0661" }, fault.Invalid, "access key id", false},
		"half a signature":         {keyID, func(m *boundaryv1.SignedIdentity) { m.Signature = m.Signature[:16] }, fault.Invalid, "16 bytes", false},
		"two proofs, token beside": {keyID, nil, fault.Invalid, "shows another", false},
	} {
		t.Run(name, func(t *testing.T) {
			role(t, tc.key, s)
			before := s.count()
			err := g.proves(awsProof, nil, func(m *boundaryv1.EnrolRequest) {
				if tc.change != nil {
					tc.change(m.Aws)
				}
				if strings.HasPrefix(name, "two proofs") {
					m.Token = "x.y.z"
				}
			})
			refusedWith(t, err, tc.kind, tc.want)
			if asked := s.count() > before; asked != tc.asked {
				t.Errorf("STS was asked: %v", asked)
			}
		})
	}
	if a, _ := g.order.book.View().Appliance("eu-1"); a.Status == book.Enrolled {
		t.Fatal("enrolled")
	}
}

// TestAWSProofIsBound takes a good proof to another nonce and to another key: the audience in the rebuilt request is another.
func TestAWSProofIsBound(t *testing.T) {
	g, s := onAWS(t)
	role(t, keyID, s)
	a, err := g.proof(awsProof, nil)
	ok(t, err)
	b, err := g.proof(awsProof, nil)
	ok(t, err)
	a.Aws, b.Aws = b.GetAws(), a.GetAws()
	for _, m := range []*boundaryv1.EnrolRequest{a, b} {
		_, err := g.enrol(m)
		refusedWith(t, err, fault.Denied, "SignatureDoesNotMatch")
	}
	a.Aws, b.Aws = b.GetAws(), a.GetAws()
	a.Csr = b.GetCsr()
	_, err = g.enrol(a)
	refusedWith(t, err, fault.Denied, "SignatureDoesNotMatch")
	_, err = g.enrol(b)
	ok(t, err)
}

// TestAnotherAccountOfTheSameName is a role that was deleted and made anew: SetExpect lifts it.
func TestAnotherAccountOfTheSameName(t *testing.T) {
	g, s := onAWS(t)
	role(t, keyID, s)
	m, err := g.proof(awsProof, nil)
	ok(t, err)
	_, err = g.enrol(m)
	ok(t, err)
	role(t, "ASIAANEW000123456789", s)
	refusedWith(t, g.proves(awsProof, m.GetLogKey(), nil), fault.Denied, "AROAANEW000123456789")
	g.expects(identity.Expect{Kind: identity.KindAWS, Account: "123456789012", RoleARN: roleARN})
	ok(t, g.proves(awsProof, m.GetLogKey(), nil))
	role(t, keyID, s)
	refusedWith(t, g.proves(awsProof, m.GetLogKey(), nil), fault.Denied, "demarc appliance expect")
}

func TestAWSUserKeysStayAtHome(t *testing.T) {
	g, _ := onAWS(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE0123456789")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	refusedWith(t, g.proves(awsProof, nil, nil), fault.Invalid, "give it a role")
}
