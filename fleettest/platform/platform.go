// SPDX-License-Identifier: Apache-2.0

// Package platform is the Kubernetes of appliances that tests run as real processes: a Unix socket that hands out projected
// tokens, and the token command that prints one.
package platform

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/demarc-dev/demarc/identity/identitytest"
)

// space is the namespace of all service accounts.
const space = "demarc"

// word makes a program the token command: "platform-token SOCKET ACCOUNT AUDIENCE".
const word = "platform-token"

// Platform hands out tokens until it is closed.
type Platform struct {
	issuer *identitytest.Issuer
	socket string
	server *http.Server
}

// Serve makes an issuer of its own, and listens at a socket, whose path has 107 bytes at most.
func Serve(socket string) (*Platform, error) {
	issuer, err := identitytest.NewIssuer("https://cluster.globex.example")
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	p := &Platform{issuer: issuer, socket: socket}
	p.server = &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		t, err := issuer.Token(space, q.URL.Query().Get("account"), q.URL.Query().Get("audience"), time.Now())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_, _ = io.WriteString(w, t)
	})}
	go func() { _ = p.server.Serve(l) }()
	return p, nil
}

// Expect is what the vendor registers for the appliance of a service account.
func (p *Platform) Expect(account string) ([]byte, error) {
	return json.Marshal(p.issuer.Expect(space, account))
}

// Proof is the section of an appliance's file that has it run the calling program as its token command. That program calls
// [Command] before all else.
func (p *Platform) Proof(account string) (string, error) {
	self, err := os.Executable()
	return fmt.Sprintf("proof:\n  kind: kubernetes\n  token_command: [%q, %s, %q, %q]\n", self, word, p.socket, account), err
}

// Close hands out no more.
func (p *Platform) Close() error { return p.server.Close() }

// Command ends the program where it was run as a token command, after it has printed the token.
func Command() {
	if len(os.Args) != 5 || os.Args[1] != word {
		return
	}
	if err := printToken(os.Args[2], os.Args[3], os.Args[4]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func printToken(socket, account, audience string) error {
	c := &http.Client{Timeout: 10 * time.Second,
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}}
	res, err := c.Get("http://platform/?" + url.Values{"account": {account}, "audience": {audience}}.Encode())
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	_, err = io.Copy(os.Stdout, io.LimitReader(res.Body, 64<<10))
	return err
}
