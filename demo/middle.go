// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/mesh"
)

// canary is the secret's value: it must be nowhere but in the customer's store and the application.
const canary = "canary-7f3a91-store-token"

// publish is step 4: a release is offered, and nothing happens.
func (s *story) publish() {
	s.title(4, "The vendor publishes a release; at the customer nothing happens, for nothing was granted")
	app := s.path("app")
	s.copySample(app)
	s.ok("release", "publish", "--compose", filepath.Join(app, "compose.yaml"), "--appliance", "eu-1")
	s.wait("the offer is at the customer", 20*time.Second, func() bool { return s.quiet("review").code == 0 })
	if a := s.seen("eu-1"); a.State != "" {
		s.fail("something happened without a grant: %s", a.State)
	}
	s.ok("access")
}

// copySample lays the sample out as a vendor would: the Compose file, and a folder for each artifact.
func (s *story) copySample(to string) {
	for _, f := range []string{"compose.yaml", "operations/state.yaml"} {
		s.write(string(s.read(filepath.Join(s.sample, f))), "app", f)
	}
	for _, sv := range []string{"web", "store"} {
		dir := filepath.Join(to, sv, "bin")
		s.must(os.MkdirAll(dir, 0o700), "folder")
		s.must(os.WriteFile(filepath.Join(dir, sv), s.read(filepath.Join(s.bin, "sample", sv)), 0o700), "binary")
	}
}

// consent: the customer makes a key, pins it, grants, reviews and approves.
func (s *story) consent() {
	s.write("a passphrase for the demo\n", "customer", "passphrase")
	key := s.path("customer", "globex.key")
	s.ok("key", "create", "--out", key)
	s.ok("local", "pin", key+".pub", "--recipient-file", key+".recipient")
	s.ok("review")
	plan := s.planDigest()
	s.note("an approval without a grant changes nothing yet")
	s.ok("approve", "--plan", plan)
	s.wait("the deploy waits for its grant or its secret", 20*time.Second, func() bool { return s.seen("eu-1").State == "waiting" })
	s.ok("grant", "install", "--for", "24h")
	s.ok("grant", "deploy", "--for", "24h")
}

func (s *story) planDigest() string {
	var r struct {
		PlanDigest string `json:"plan_digest"`
	}
	if !s.ask(&r, "review") {
		s.fail("review")
	}
	return r.PlanDigest
}

// deploy is step 5: a secret is missing, the customer creates it, and it goes on by itself.
func (s *story) deploy() {
	s.title(5, "A required secret is missing: the deploy waits and says which command creates it; then it goes on by itself")
	want := "demarc secret create store-token"
	s.wait("the customer is told the command", 30*time.Second, func() bool {
		var l struct {
			Reason string `json:"reason"`
		}
		return s.ask(&l, "local", "status") && strings.Contains(l.Reason, want)
	})
	s.wait("the vendor is told the secret's own name, and no more", 30*time.Second, func() bool {
		a := s.seen("eu-1")
		return a.Why.Kind == "secret_missing" && a.Why.Secret == "store-token"
	})
	s.ok("local", "status")
	s.ok("appliance", "show", "eu-1")
	file := s.write(canary+"\n", "token.txt")
	s.ok("secret", "create", "store-token", "--dir", s.path("customer", "secrets"), "--from-file", file)
	s.must(os.Remove(file), "token.txt")
	took := s.wait("the application is deployed and healthy", 60*time.Second, func() bool {
		s.alive("appliance")
		a := s.seen("eu-1")
		if a.State == "failed" {
			s.fail("the deploy failed: %+v", a.Why)
		}
		well := 0
		for _, sv := range a.Services {
			if sv.Healthy {
				well++
			}
		}
		return a.State == "deployed" && well == 2 && len(a.Secrets) == 1 && a.Secrets[0].Present
	})
	s.note("deployed and healthy %s after the secret was there", took.Round(time.Millisecond))
	s.ok("appliance", "show", "eu-1")
}

// from makes a client that comes from one loopback address.
func from(ip string) *http.Client {
	d := &net.Dialer{Timeout: 3 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: d.DialContext, DisableKeepAlives: true}}
}

// posture sets one and shows its doors.
func (s *story) posture(args ...string) {
	s.ok(append([]string{"posture", "set"}, args...)...)
	s.ok("posture", "show")
}

// enters tells whether an end user from an address gets the page.
func (s *story) enters(ip string, want bool) {
	code, _, err := s.get(from(ip), "http://"+s.webAddr+"/")
	got := err == nil && code == http.StatusOK
	word := "is let in"
	if !got {
		word = "is shut out"
		if err != nil {
			word += ": " + clip(err.Error()[strings.LastIndex(err.Error(), ": ")+2:])
		}
	}
	fmt.Printf("  an end user from %s %s\n", ip, word)
	if got != want {
		s.fail("an end user from %s: let in %v, want %v (%v)", ip, got, want, err)
	}
}

// ingress is step 6: four postures, different doors, one connection that stays.
func (s *story) ingress() {
	s.title(6, "Ingress: closed, public, allowlist, private, each compiled to different doors")
	s.ok("posture", "show")
	s.enters("127.0.0.2", false)
	s.posture("public")
	s.enters("127.0.0.2", true)
	s.enters("127.0.0.3", true)
	stays := s.stream("127.0.0.2")
	s.posture("allowlist", "--allow", "127.0.0.2/32")
	s.enters("127.0.0.2", true)
	s.enters("127.0.0.3", false)
	n := stays.lines()
	s.wait("the connection that was open goes on", 5*time.Second, func() bool { return stays.lines() > n+3 })
	s.posture("public")
	n = stays.lines()
	s.wait("the connection that was open goes on", 5*time.Second, func() bool { return stays.lines() > n+3 })
	if err := stays.broken(); err != nil {
		s.fail("an established connection was cut by a change that still allows it: %v", err)
	}
	s.note("one connection from 127.0.0.2 stayed up across public, allowlist and public: %d lines without a gap", stays.lines())
	stays.close()
	s.posture("private")
	s.enters("127.0.0.2", false)
	var err error
	s.endUser, err = mesh.Join(s.ctx, mesh.TailnetConfig{ControlURL: s.tailnet.URL, Credentials: func() (mesh.Credentials, error) {
		return mesh.Credentials{AuthKey: s.tailnet.AuthKey}, nil
	}, Hostname: "laptop", Dir: s.path("laptop"), Addresses: []string{"notes:80"}})
	s.must(err, "the end user's tailnet node")
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) { return s.endUser.Dial(ctx, addr) }}}
	var body string
	s.wait("the application is reached over the tailnet", 30*time.Second, func() bool {
		var code int
		code, body, err = s.get(client, "http://notes:80/whoami")
		return err == nil && code == http.StatusOK
	})
	fmt.Printf("  from another node of the tailnet, http://notes/whoami:\n")
	for line := range strings.Lines(body) {
		fmt.Print("    " + line)
	}
	s.posture("public")
}

// streaming is a long-lived connection of an end user.
type streaming struct {
	cancel context.CancelFunc
	count  chan int
	last   int
	err    error
	done   chan struct{}
}

func (s *story) stream(ip string) *streaming {
	ctx, cancel := context.WithCancel(s.ctx)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.webAddr+"/stream", nil)
	s.must(err, "stream")
	c := from(ip)
	c.Timeout = 0
	res, err := c.Do(req)
	s.must(err, "stream")
	st := &streaming{cancel: cancel, count: make(chan int, 1<<16), done: make(chan struct{})}
	go func() {
		defer close(st.done)
		defer res.Body.Close()
		in := bufio.NewScanner(res.Body)
		for i := 1; in.Scan(); i++ {
			if in.Text() != fmt.Sprint(i) {
				st.err = fmt.Errorf("line %d is %q", i, in.Text())
				return
			}
			st.count <- i
		}
		if st.err = in.Err(); st.err == nil {
			st.err = fmt.Errorf("the connection ended")
		}
	}()
	return st
}

func (st *streaming) lines() int {
	for {
		select {
		case st.last = <-st.count:
		default:
			return st.last
		}
	}
}

func (st *streaming) broken() error {
	select {
	case <-st.done:
		return st.err
	default:
		return nil
	}
}

func (st *streaming) close() {
	st.cancel()
	<-st.done
}

// operate is step 7: an operation is refused, granted, approved, run, held, released, read, and revoked.
func (s *story) operate() {
	s.title(7, "An operation: refused for want of consent, then granted, approved, run, held, released, read, and revoked")
	template := s.path("app", "operations", "state.yaml")
	request := func() string {
		s.ok("operation", "request", "--appliance", "eu-1", "--template", template, "--var", "section=summary", "--reason", "ticket 4711")
		return s.newestOperation()
	}
	state := func(id, want string) {
		s.wait("operation "+id+" is "+want, 20*time.Second, func() bool { return s.operationState(id) == want })
	}
	id := request()
	state(id, "rejected")
	s.ok("operation", "show", id, "--appliance", "eu-1")
	s.ok("grant", "operate.read", "--uses", "5", "--operation", "state")
	id = request()
	state(id, "requested")
	s.ok("consent", "show", id)
	s.ok("consent", "approve", id)
	state(id, "held")
	s.refused(3, "has not released", "operation", "output", id, "--appliance", "eu-1")
	s.ok("consent", "output", id)
	s.ok("consent", "release", id)
	state(id, "released")
	out := s.ok("operation", "output", id, "--appliance", "eu-1")
	if !strings.Contains(out, `"service":"store"`) {
		s.fail("the output is not the state of the store: %q", out)
	}
	next := request()
	state(next, "requested")
	s.ok("revoke", "operate.read", "--receipt", s.path("receipt.json"))
	state(next, "rejected")
	s.refused(3, "", "consent", "approve", next)
	last := request()
	state(last, "rejected")
	s.ok("operation", "show", last, "--appliance", "eu-1")
	s.note("the time from the customer's word to the last refused act stands above; the appliance signed it in $D/receipt.json")
}

type seenOperation struct {
	ID    string `json:"id"`
	State string `json:"state"`
}

func (s *story) operations() []seenOperation {
	var all []seenOperation
	s.ask(&all, "operation", "list", "--appliance", "eu-1")
	return all
}

// newestOperation is the one that was not there before.
func (s *story) newestOperation() string {
	for _, o := range s.operations() {
		if !s.known[o.ID] {
			s.known[o.ID] = true
			return o.ID
		}
	}
	s.fail("the operation is not listed")
	return ""
}

func (s *story) operationState(id string) string {
	for _, o := range s.operations() {
		if o.ID == id {
			return o.State
		}
	}
	return ""
}
