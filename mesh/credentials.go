// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"net/url"
	"os"
	"strconv"
	"strings"

	// Linked in only where it is named, since it brings the clouds' own ways to a token. OAuth clients come with tsnet.
	_ "tailscale.com/feature/identityfederation"
	"tailscale.com/tsnet"

	"github.com/demarc-dev/demarc/fault"
)

// Credentials are what a new node shows to the tailnet, or one whose key has expired: exactly one of the three. An OAuth
// client and a workload make a single-use auth key at Tailscale's API, for nodes with the tags of [TailnetConfig].
type Credentials struct {
	AuthKey      string
	ClientSecret string // of an OAuth client with the scope auth_keys: tskey-client-...
	Workload     Workload
}

// Workload is a workload identity that the tailnet's administrator has federated.
type Workload struct {
	ClientID string
	IDToken  string // a JWT of the platform's; or
	Audience string // the platform that this runs on is asked for a JWT with it
}

// CredentialFiles are the files that hold credentials, one of the three kinds, as the operator's file names them.
type CredentialFiles struct {
	AuthKey      string
	ClientSecret string
	ClientID     string // of a workload identity: the value itself, it is no secret
	IDToken      string
	Audience     string // the value itself
}

// maxCredential bounds a credential's file, in bytes.
const maxCredential = 64 << 10

// Read reads the files anew, so that a rotated secret serves at the next join.
func (f CredentialFiles) Read() (Credentials, error) {
	c := Credentials{Workload: Workload{ClientID: f.ClientID, Audience: f.Audience}}
	for _, x := range []struct {
		key, path string
		to        *string
	}{{"auth_key_file", f.AuthKey, &c.AuthKey}, {"oauth_client_file", f.ClientSecret, &c.ClientSecret},
		{"id_token_file", f.IDToken, &c.Workload.IDToken}} {
		if x.path == "" {
			continue
		}
		b, err := os.ReadFile(x.path)
		if err != nil {
			return Credentials{}, fault.Because(err, "mesh.Credentials", fault.Invalid, "%s can't be read: %s", x.key, x.path)
		}
		*x.to = strings.TrimSpace(string(b))
		if *x.to == "" || len(b) > maxCredential {
			return Credentials{}, fault.New("mesh.Credentials", fault.Invalid, "%s holds no credential: %s", x.key, x.path)
		}
	}
	return c, nil
}

// oauthPrefix is that of the secret of an OAuth client; the library tells it from an auth key by this.
const oauthPrefix = "tskey-client-"

// CredentialOf tells the secret of an OAuth client from an auth key.
func CredentialOf(secret string) Credentials {
	if secret = strings.TrimSpace(secret); strings.HasPrefix(secret, oauthPrefix) {
		return Credentials{ClientSecret: secret}
	}
	return Credentials{AuthKey: secret}
}

func (c Credentials) check(tags []string) error {
	const op = "mesh.Credentials"
	bad := func(format string, args ...any) error { return fault.New(op, fault.Invalid, format, args...) }
	given := 0
	for _, is := range []bool{c.AuthKey != "", c.ClientSecret != "", c.Workload != Workload{}} {
		if is {
			given++
		}
	}
	w := c.Workload
	switch {
	case given != 1:
		return bad("name exactly one of an auth key, an OAuth client and a workload identity")
	case strings.HasPrefix(c.AuthKey, oauthPrefix):
		return bad("the auth key is the secret of an OAuth client: name its file as oauth_client_file")
	case c.ClientSecret != "" && !strings.HasPrefix(c.ClientSecret, oauthPrefix):
		return bad("the secret of an OAuth client begins with %s", oauthPrefix)
	case w != Workload{} && (w.ClientID == "" || (w.IDToken == "") == (w.Audience == "")):
		return bad("a workload identity needs a client_id, and one of an ID token and an audience")
	case c.AuthKey == "" && len(tags) == 0:
		return bad("an OAuth client and a workload identity make keys for tagged nodes only: name tags")
	}
	return nil
}

// put hands the credentials to a node that has not started.
func (c Credentials) put(s *tsnet.Server, ephemeral bool) {
	s.AuthKey = c.AuthKey
	if c.ClientSecret != "" {
		s.AuthKey = lasting(c.ClientSecret, ephemeral)
	}
	if c.Workload.ClientID != "" {
		s.ClientID, s.IDToken, s.Audience = lasting(c.Workload.ClientID, ephemeral), c.Workload.IDToken, c.Workload.Audience
	}
}

// lasting says in the library's way what kind of key is to be made, where the credential does not: the library's own default
// is an ephemeral node, which the tailnet would forget when it is away for a while.
func lasting(credential string, ephemeral bool) string {
	head, tail, _ := strings.Cut(credential, "?")
	attrs, err := url.ParseQuery(tail)
	if err != nil {
		return credential // the library says what is wrong with it
	}
	if !attrs.Has("ephemeral") {
		attrs.Set("ephemeral", strconv.FormatBool(ephemeral))
	}
	if !attrs.Has("preauthorized") {
		attrs.Set("preauthorized", "true")
	}
	return head + "?" + attrs.Encode()
}
