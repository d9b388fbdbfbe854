// SPDX-License-Identifier: Apache-2.0

package identity_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

var (
	onAWS = identity.Expect{Kind: identity.KindAWS, Account: "123456789012", RoleARN: "arn:aws:iam::123456789012:role/a/b/appliance"}
	onGCP = identity.Expect{Kind: identity.KindGCP, Project: "acme-prod", ServiceAccount: "appliance@acme-prod.iam.gserviceaccount.com"}
)

// TestRegistrationByPlatform: a field belongs to one kind or is refused, and each has one form.
func TestRegistrationByPlatform(t *testing.T) {
	good := newIssuer(t).Expect("demarc", "appliance")
	for _, e := range []identity.Expect{good, onAWS, onGCP} {
		if err := e.Check(); err != nil {
			t.Errorf("%s: %v", e.Kind, err)
		}
	}
	// What stands in books from before there were other kinds.
	old := fmt.Sprintf(`{"kind":"kubernetes","issuer":"https://x.example","jwks":%s,"namespace":"demarc","service_account":"appliance"}`,
		good.JWKS)
	var e identity.Expect
	if err := json.Unmarshal([]byte(old), &e); err != nil || e.Check() != nil {
		t.Errorf("an old registration: %v, %v", err, e.Check())
	}
	for name, tc := range map[string]struct {
		from   identity.Expect
		change func(e *identity.Expect)
		want   string
	}{
		"unknown kind":          {good, func(e *identity.Expect) { e.Kind = "azure" }, "use aws, gcp, kubernetes or dev"},
		"role on kubernetes":    {good, func(e *identity.Expect) { e.RoleARN = onAWS.RoleARN }, "role_arn does not belong"},
		"project on kubernetes": {good, func(e *identity.Expect) { e.Project = "acme-prod" }, "project does not belong"},
		"pinned and fetched":    {good, func(e *identity.Expect) { e.Discovery = true }, "give one of them"},
		"neither":               {good, func(e *identity.Expect) { e.JWKS = nil }, "JWKS"},
		"fetched over http": {good, func(e *identity.Expect) { e.JWKS, e.Discovery, e.Issuer = nil, true, "http://x.example" },
			"https URL"},
		"fetched with a user": {good, func(e *identity.Expect) { e.JWKS, e.Discovery, e.Issuer = nil, true, "https://a@x.example" },
			"https URL"},
		"fetched with a query": {good, func(e *identity.Expect) { e.JWKS, e.Discovery, e.Issuer = nil, true, "https://x.example/?a" },
			"https URL"},
		"fetched, upper case": {good, func(e *identity.Expect) { e.JWKS, e.Discovery, e.Issuer = nil, true, "https://X.example" },
			"https URL"},
		"fetched, not ASCII": {good, func(e *identity.Expect) { e.JWKS, e.Discovery, e.Issuer = nil, true, "https://\u0445.example" },
			"https URL"},
		"issuer of 513 bytes":    {good, func(e *identity.Expect) { e.Issuer = "https://x.example/" + strings.Repeat("a", 495) }, "512 bytes"},
		"issuer on aws":          {onAWS, func(e *identity.Expect) { e.Issuer = "https://x.example" }, "issuer does not belong"},
		"service account on aws": {onAWS, func(e *identity.Expect) { e.ServiceAccount = "a" }, "service_account does not belong"},
		"account of 11 digits":   {onAWS, func(e *identity.Expect) { e.Account = "12345678901" }, "12 digits"},
		"role of another account": {onAWS, func(e *identity.Expect) { e.Account = "210987654321" },
			"account and role_arn name different accounts"},
		"a user":            {onAWS, func(e *identity.Expect) { e.RoleARN = "arn:aws:iam::123456789012:user/x" }, "role_arn"},
		"an assumed role":   {onAWS, func(e *identity.Expect) { e.RoleARN = "arn:aws:sts::123456789012:assumed-role/x/y" }, "role_arn"},
		"a star":            {onAWS, func(e *identity.Expect) { e.RoleARN = "arn:aws:iam::123456789012:role/*" }, "role_arn"},
		"unknown partition": {onAWS, func(e *identity.Expect) { e.RoleARN = "arn:aws-x:iam::123456789012:role/x" }, "role_arn"},
		"line end":          {onAWS, func(e *identity.Expect) { e.RoleARN += "\n" }, "role_arn"},
		"region elsewhere":  {onAWS, func(e *identity.Expect) { e.Regions = []string{"cn-north-1"} }, "none of the role's partition"},
		"unknown region":    {onAWS, func(e *identity.Expect) { e.Regions = []string{"evil"} }, "none of the role's partition"},
		"namespace on gcp":  {onGCP, func(e *identity.Expect) { e.Namespace = "demarc" }, "namespace does not belong"},
		"no project":        {onGCP, func(e *identity.Expect) { e.Project = "" }, "project"},
		"a person":          {onGCP, func(e *identity.Expect) { e.ServiceAccount = "x@gmail.com" }, "email address"},
		"host after the right end": {onGCP, func(e *identity.Expect) { e.ServiceAccount = "x@a.iam.gserviceaccount.com.evil.example" },
			"email address"},
		"unique id of letters": {onGCP, func(e *identity.Expect) { e.UniqueID = "abc" }, "digits only"},
		"zone":                 {onGCP, func(e *identity.Expect) { e.Zone = "Europe" }, "zone"},
	} {
		t.Run(name, func(t *testing.T) {
			e := tc.from
			tc.change(&e)
			err := e.Check()
			if fault.Of(err) != fault.Invalid || !strings.Contains(fault.Text(err), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
			f, ok := errors.AsType[*identity.FieldError](err)
			if !ok {
				if tc.want != "use aws, gcp, kubernetes or dev" {
					t.Errorf("%v names no field", err)
				}
				return
			}
			if f.Sentence(strings.ToUpper) != strings.ToUpper(f.Field)+strings.TrimPrefix(fault.Text(err), f.Field) && f.Other == "" {
				t.Errorf("%q with other names: %q", fault.Text(err), f.Sentence(strings.ToUpper))
			}
		})
	}
}

const answer = `<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">` +
	`<GetCallerIdentityResult><Arn>arn:aws:sts::123456789012:assumed-role/appliance/i-1</Arn>` +
	`<UserId>AROAEXAMPLE0123456789:i-1</UserId><Account>123456789012</Account></GetCallerIdentityResult>` +
	`<ResponseMetadata><RequestId>1</RequestId></ResponseMetadata></GetCallerIdentityResponse>`

func TestAnswerOfSTS(t *testing.T) {
	q := identity.STSRequest{Host: "sts.eu-central-1.amazonaws.com"}
	p, err := onAWS.VerifySTS(q, 200, []byte(answer))
	if err != nil || p.UID != "AROAEXAMPLE0123456789" || p.Issuer != q.Host {
		t.Fatalf("%+v, %v", p, err)
	}
	arn := func(s string) string {
		return strings.Replace(answer, "arn:aws:sts::123456789012:assumed-role/appliance/i-1", s, 1)
	}
	for name, tc := range map[string]struct {
		status int
		answer string
		kind   fault.Kind
	}{
		"a user":                  {200, arn("arn:aws:iam::123456789012:user/appliance"), fault.Denied},
		"a federated user":        {200, arn("arn:aws:sts::123456789012:federated-user/appliance"), fault.Denied},
		"root":                    {200, arn("arn:aws:iam::123456789012:root"), fault.Denied},
		"another case":            {200, arn("arn:aws:sts::123456789012:assumed-role/Appliance/i-1"), fault.Denied},
		"a longer name":           {200, arn("arn:aws:sts::123456789012:assumed-role/appliance2/i-1"), fault.Denied},
		"path in the name":        {200, arn("arn:aws:sts::123456789012:assumed-role/a/appliance/i-1"), fault.Denied},
		"account only in the ARN": {200, strings.Replace(answer, "<Account>123456789012", "<Account>210987654321", 1), fault.Denied},
		"two ARNs": {200,
			strings.Replace(answer, "<UserId>", "<Arn>arn:aws:sts::123456789012:assumed-role/appliance/i-1</Arn><UserId>", 1), fault.Unavailable},
		"another namespace": {200, strings.Replace(answer, "sts.amazonaws.com", "evil.example", 1), fault.Unavailable},
		"another action":    {200, strings.ReplaceAll(answer, "GetCallerIdentity", "GetSessionToken"), fault.Unavailable},
		"a document type":   {200, `<!DOCTYPE x [<!ENTITY a "b">]>` + answer, fault.Unavailable},
		"two documents":     {200, answer + answer, fault.Unavailable},
		"cut off":           {200, answer[:len(answer)-10], fault.Unavailable},
		"text around":       {200, "x" + answer, fault.Unavailable},
		"JSON":              {200, `{"GetCallerIdentityResponse":{}}`, fault.Unavailable},
		"too long":          {200, answer + strings.Repeat(" ", identity.MaxSTSAnswer), fault.Unavailable},
		"not 200":           {301, answer, fault.Denied},
		"trouble":           {503, "x", fault.Unavailable},
		"expired":           {403, `<ErrorResponse><Error><Code>ExpiredToken</Code></Error></ErrorResponse>`, fault.Expired},
	} {
		t.Run(name, func(t *testing.T) {
			if p, err := onAWS.VerifySTS(q, tc.status, []byte(tc.answer)); fault.Of(err) != tc.kind || p != (identity.Proven{}) {
				t.Errorf("%+v, %v, want %s", p, err, tc.kind)
			}
		})
	}
	// Nothing of a foreign answer is repeated.
	if _, err := onAWS.VerifySTS(q, 403,
		[]byte(`<E><Error><Code>evil &lt;b&gt;</Code></Error></E>`)); strings.Contains(fault.Text(err), "evil") {
		t.Error(err)
	}
}

func TestDiscoveryDocument(t *testing.T) {
	const is = "https://x.example:8443/id"
	if at, err := identity.KeysURL([]byte(`{"issuer":"`+is+`","jwks_uri":"https://x.example:8443/keys","more":1}`), is); err != nil ||
		at != "https://x.example:8443/keys" {
		t.Fatal(at, err)
	}
	for name, doc := range map[string]string{
		"another issuer": `{"issuer":"https://x.example:8443/other","jwks_uri":"https://x.example:8443/keys"}`,
		"another host":   `{"issuer":"` + is + `","jwks_uri":"https://y.example:8443/keys"}`,
		"another port":   `{"issuer":"` + is + `","jwks_uri":"https://x.example/keys"}`,
		"metadata":       `{"issuer":"` + is + `","jwks_uri":"http://169.254.169.254/latest"}`,
		"over http":      `{"issuer":"` + is + `","jwks_uri":"http://x.example:8443/keys"}`,
		"user, own host": `{"issuer":"` + is + `","jwks_uri":"https://a:b@x.example:8443/keys"}`,
		"of 65 KiB":      `{"issuer":"` + is + `","jwks_uri":"https://x.example:8443/keys"}` + strings.Repeat(" ", identity.MaxJWKS),
		"user":           `{"issuer":"` + is + `","jwks_uri":"https://x.example:8443@evil.example/keys"}`,
		"file":           `{"issuer":"` + is + `","jwks_uri":"file:///etc/passwd"}`,
		"none":           `{"issuer":"` + is + `"}`,
		"no document":    `<html>`,
	} {
		if at, err := identity.KeysURL([]byte(doc), is); err == nil {
			t.Errorf("%s: %s", name, at)
		}
	}
}

func FuzzSTSAnswer(f *testing.F) {
	f.Add([]byte(answer))
	f.Add([]byte(`<ErrorResponse><Error><Code>x</Code></Error></ErrorResponse>`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := onAWS.VerifySTS(identity.STSRequest{Host: "h"}, 200, b)
		if err == nil && (!strings.HasPrefix(p.Subject, "arn:aws:sts::123456789012:assumed-role/appliance/") ||
			!strings.Contains(string(b), "GetCallerIdentityResult")) {
			t.Fatalf("%+v", p)
		}
		_, _ = onAWS.VerifySTS(identity.STSRequest{Host: "h"}, 403, b)
	})
}

// FuzzSignedIdentity: whatever an appliance writes, the request has one host, one body and heads of one line.
func FuzzSignedIdentity(f *testing.F) {
	aud := audience(f, td, "n1.x", newCSR(f))
	f.Add("eu-central-1", now.Format("20060102T150405Z"), "ASIAEXAMPLE0123456789", "c2Vzc2lvbg==", make([]byte, 32))
	f.Add("eu-central-1\r\n", now.Format("20060102T150405Z"), "A\nB", "a b", []byte{1})
	f.Fuzz(func(t *testing.T, region, date, key, session string, sig []byte) {
		q, err := onAWS.STSRequest(identity.SignedIdentity{Region: region, Date: date, AccessKeyID: key, SessionToken: session, Signature: sig},
			aud, now)
		if err != nil {
			return
		}
		if !strings.HasPrefix(q.Host, "sts.") || !strings.HasSuffix(q.Host, ".amazonaws.com") || strings.Count(q.Host, ".") != 3 ||
			q.Body != "Action=GetCallerIdentity&Version=2011-06-15" || len(q.Headers) != 5 {
			t.Fatalf("%+v", q)
		}
		for _, h := range q.Headers {
			for _, c := range []byte(h.Value) {
				if c < ' ' || c > '~' {
					t.Fatalf("%q", h)
				}
			}
		}
	})
}

func FuzzKeys(f *testing.F) {
	i, err := identitytest.NewIssuer("https://x.example")
	if err != nil {
		f.Fatal(err)
	}
	token, err := i.Token("demarc", "appliance", "a", now)
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(i.JWKS()))
	f.Add([]byte(`{"keys":[{"kty":"oct","kid":"rsa-1","k":"AAAA"}]}`))
	e := i.Expect("demarc", "appliance")
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := identity.ParseKeys(b)
		if err != nil {
			return
		}
		if p, err := e.VerifyToken(k, token, "a", now); err == nil && p.Subject != "system:serviceaccount:demarc:appliance" {
			t.Fatalf("%+v", p)
		}
	})
}

func FuzzDiscovery(f *testing.F) {
	const is = "https://x.example/id"
	f.Add([]byte(`{"issuer":"` + is + `","jwks_uri":"https://x.example/keys"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if at, err := identity.KeysURL(b, is); err == nil && at != "https://x.example" && !strings.HasPrefix(at, "https://x.example/") &&
			!strings.HasPrefix(at, "https://x.example?") {
			t.Fatal(at)
		}
	})
}

// FuzzGoogleToken signs whatever claims: none of them proves more than is registered.
func FuzzGoogleToken(f *testing.F) {
	i, err := identitytest.NewIssuer(identity.GoogleIssuer)
	if err != nil {
		f.Fatal(err)
	}
	keys, err := identity.ParseKeys(i.JWKS())
	if err != nil {
		f.Fatal(err)
	}
	good := map[string]any{"iss": identity.GoogleIssuer, "aud": "a", "sub": "1", "email": onGCP.ServiceAccount, "email_verified": true,
		"exp":    now.Add(time.Hour).Unix(),
		"google": map[string]any{"compute_engine": map[string]any{"project_id": "acme-prod"}}}
	b, _ := json.Marshal(good)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var c map[string]any
		if json.Unmarshal(b, &c) != nil || c == nil {
			return
		}
		token, err := i.Mint(identitytest.EC, c)
		if err != nil {
			return
		}
		if p, err := onGCP.VerifyToken(keys, token, "a", now); err == nil && (p.Subject != onGCP.ServiceAccount || p.UID == "") {
			t.Fatalf("%+v", p)
		}
	})
}

// TestAudienceInAHeader: what goes into the signed header has one form, whoever made it.
func TestAudienceInAHeader(t *testing.T) {
	const good = "demarc://acme.example/enrol?nonce=n1.abc&key=0123456789abcdef0123456789abcdef0123456789a"
	if _, err := identity.NewSTSRequest("eu-central-1", good); err != nil {
		t.Fatal(err)
	}
	for name, audience := range map[string]string{
		"empty":        "",
		"a line":       strings.Replace(good, "n1.abc", "a\r\nX-Evil: 1", 1),
		"a line after": good + "\n",
		"a space":      strings.Replace(good, "n1.abc", "a b", 1),
		"another":      strings.Replace(good, "demarc:", "https:", 1),
		"no key":       good[:len(good)-43],
		"of 2 KiB":     strings.Replace(good, "n1.abc", strings.Repeat("a", 2<<10), 1),
	} {
		if q, err := identity.NewSTSRequest("eu-central-1", audience); fault.Of(err) != fault.Invalid || len(q.Headers) > 0 {
			t.Errorf("%s: %v, %v", name, q, err)
		}
	}
}

// TestGoogleTokenOfAnotherMachine: what may be registered beside the account is compared, too.
func TestGoogleTokenOfAnotherMachine(t *testing.T) {
	i, err := identitytest.NewIssuer(identity.GoogleIssuer)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := identity.ParseKeys(i.JWKS())
	if err != nil {
		t.Fatal(err)
	}
	token, err := i.Mint(identitytest.RSA, map[string]any{"iss": identity.GoogleIssuer, "aud": "aud", "sub": "112233445566778899001",
		"email": onGCP.ServiceAccount, "email_verified": true,
		"iat": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"google": map[string]any{"compute_engine": map[string]any{"project_id": "acme-prod", "zone": "europe-west3-a", "instance_name": "vm-1"}}})
	if err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*identity.Expect){
		"": func(e *identity.Expect) {
			e.UniqueID, e.Zone, e.Instance = "112233445566778899001", "europe-west3-a", "vm-1"
		},
		"unique id":   func(e *identity.Expect) { e.UniqueID = "112233445566778899002" },
		"the zone":    func(e *identity.Expect) { e.Zone = "europe-west3-b" },
		"the machine": func(e *identity.Expect) { e.Instance = "vm-2" },
	} {
		e := onGCP
		change(&e)
		_, err := e.VerifyToken(keys, token, "aud", now)
		if (err == nil) != (want == "") || err != nil && (fault.Of(err) != fault.Denied || !strings.Contains(fault.Text(err), want)) {
			t.Errorf("%q: %v", want, err)
		}
	}
}
