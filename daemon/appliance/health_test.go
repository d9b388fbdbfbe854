// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
)

// TestWhichTroublesTheVendorHears: what needs a human at once, what may pass after a minute, each kind and reason once, and never more
// than a vendor takes.
func TestWhichTroublesTheVendorHears(t *testing.T) {
	roads := []configs.Transport{{Name: "a", Kind: configs.HTTPS}, {Name: "b", Kind: configs.HTTPS}, {Name: "c", Kind: configs.Tailscale}}
	away := fault.New("x", fault.Unavailable, "no answer from 10.1.2.3")
	refused := mesh.For(mesh.TailnetKey, fault.New("x", fault.Denied, "it says %q", "s3cret"))
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var s transportHealth
	for i, x := range []struct {
		after time.Duration
		last  map[string]error
		want  []book.TransportFailure
	}{
		{0, nil, nil},
		{0, map[string]error{"a": away}, nil},
		{59 * time.Second, map[string]error{"a": away, "b": away, "c": refused},
			[]book.TransportFailure{{Kind: configs.Tailscale, Reason: mesh.TailnetKey}}},
		{time.Second, map[string]error{"a": away, "b": away}, []book.TransportFailure{{Kind: configs.HTTPS, Reason: mesh.Unreached}}},
		{time.Minute, map[string]error{"a": away, "b": away}, []book.TransportFailure{{Kind: configs.HTTPS, Reason: mesh.Unreached}}}, // once
		{0, nil, nil},
		{time.Second, map[string]error{"a": io.EOF}, nil}, // it begins anew
	} {
		at = at.Add(x.after)
		if got := s.failures(roads, func(name string) error { return x.last[name] }, at); !slices.Equal(got, x.want) {
			t.Errorf("%d: %v, want %v", i, got, x.want)
		}
	}
	var many []configs.Transport
	for _, r := range mesh.Reasons() {
		for _, k := range []string{"1", "2", "3", "4", "5"} {
			many = append(many, configs.Transport{Name: string(r), Kind: k})
		}
	}
	if got := s.failures(many, func(name string) error { return mesh.For(mesh.Reason(name), away) },
		at.Add(time.Hour)); len(got) > maxFailures {
		t.Errorf("%d troubles", len(got))
	}
	if w := transportStatus("c", configs.Tailscale, false, refused); w.GetReason() != "tailnet_key" || w.GetSaid() != `it says "s3cret"` ||
		w.GetDo() == "" {
		t.Errorf("%v", w)
	}
	if w := transportStatus("c", configs.Tailscale, true, refused); w.GetReason() != "" {
		t.Errorf("a road in use has trouble: %v", w)
	}
	r := reportToWire(book.Report{At: at, Status: &book.Status{Transports: []book.TransportFailure{{Kind: configs.Tailscale,
		Reason: mesh.TailnetKey}}}}, 1).GetStatus().GetRoads()
	if len(r) != 1 || r[0].GetKind() != "tailscale" || r[0].GetReason() != "tailnet_key" {
		t.Errorf("%v", r)
	}
}

// TestARoadWithoutMLKEMIsTold: a road that is in use in the small form of TLS says so on both sides, at once (FAULTS.md F1).
func TestARoadWithoutMLKEMIsTold(t *testing.T) {
	small := mesh.For(mesh.HelloTooLarge, errors.New("a box on the path"))
	w := transportStatus("a", configs.HTTPS, true, small)
	if w.GetReason() != "hello_too_large" || !w.GetInUse() || w.GetDo() == "" {
		t.Errorf("the customer is told %v", w)
	}
	var s transportHealth
	got := s.failures([]configs.Transport{{Name: "a", Kind: configs.HTTPS}}, func(string) error { return small }, time.Now())
	if want := []book.TransportFailure{{Kind: configs.HTTPS, Reason: "hello_too_large"}}; !slices.Equal(got, want) {
		t.Errorf("the vendor is told %v, want %v", got, want)
	}
}

// TestATokenCommandIsTold (FAULTS.md F2): how it failed is on the customer's page, and its reason is that there is no proof.
func TestATokenCommandIsTold(t *testing.T) {
	slow, end := context.WithCancel(t.Context())
	end()
	for name, x := range map[string]struct {
		ctx  context.Context
		argv []string
		said string
	}{
		"it is not there": {t.Context(), []string{"/nowhere/token"},
			"it can't be started (fork/exec /nowhere/token: no such file or directory)"},
		"not in the path":   {t.Context(), []string{"demarc-no-such-program"}, "executable file not found"},
		"it fails":          {t.Context(), []string{"/bin/sh", "-c", "echo s3cret; exit 7"}, "it ended with exit status 7"},
		"it is interrupted": {slow, []string{"/bin/sh", "-c", "exit 0"}, "it did not end in time"},
	} {
		a := &Appliance{cfg: &configs.Appliance{Proof: configs.Proof{Kind: configs.ProofKubernetes, TokenCommand: x.argv}}}
		_, err := a.proof(x.ctx, "audience", time.Now())
		w := transportStatus("https", configs.HTTPS, false, later{err, time.Second})
		if w.GetReason() != "no_proof" || !strings.Contains(w.GetSaid(), x.said) ||
			!strings.HasPrefix(w.GetSaid(), "proof.token_command gave no token") || strings.Contains(w.GetSaid(), "s3cret") {
			t.Errorf("%s: %v", name, w)
		}
		again := (&proving{why: err}).again(4 * time.Second)
		if w := transportStatus("https", configs.HTTPS, false, again); w.GetReason() != "no_proof" || !strings.Contains(w.GetSaid(), x.said) ||
			!strings.Contains(w.GetSaid(), "again in 4s") {
			t.Errorf("%s, while it waits: %v", name, w)
		}
	}
}

// TestARefusedCertificateKeepsTheSentence (FAULTS.md F2): the certificate of a banned appliance is refused by an alert of TLS, without a
// word; what the vendor said to its proof stays.
func TestARefusedCertificateKeepsTheSentence(t *testing.T) {
	alert := errors.New("remote error: tls: bad certificate")
	said := func(p *proving) string {
		w := transportStatus("a", configs.HTTPS, false, p.refusal(alert))
		if w.GetReason() != "vendor_refuses" {
			t.Errorf("%v", w)
		}
		return w.GetSaid()
	}
	if got := said(&proving{}); !strings.Contains(got, "refuses this appliance's certificate") {
		t.Errorf("%q", got)
	}
	if got := said(&proving{why: answered(fault.New("x", fault.Denied, "it is banned"))}); got != "it is banned" {
		t.Errorf("%q", got)
	}
	if got := said(&proving{why: mesh.For(mesh.NoProof, fault.New("x", fault.Unavailable, "no token"))}); !strings.Contains(got,
		"refuses this") {
		t.Errorf("%q", got)
	}
}

// TestEachCauseIsToldApart (FAULTS.md F2): what the vendor's node says, a disk that is full and a clock that is off are no firewall.
func TestEachCauseIsToldApart(t *testing.T) {
	for _, x := range []struct {
		err  error
		want string
		said string
	}{
		{closed(&boundaryv1.Closed{Kind: "denied", Reason: `appliance "eu-1" is banned`}), "vendor_refuses", "is banned"},
		{closed(&boundaryv1.Closed{Kind: "busy", Reason: "too many", RetryAfterMs: 5}), "vendor_unready", "too many"},
		{closed(&boundaryv1.Closed{Kind: "unavailable", Reason: "this node stops"}), "vendor_unready", "stops"},
		{mesh.Explain(x509.CertificateInvalidError{Reason: x509.Expired}), "clock_off", "check the clock"},
		{mesh.For(mesh.OwnDisk, fault.New("x", fault.Unavailable, "the disk is full")), "own_disk", "the disk is full"},
		{refusedBy("x", fault.New("x", fault.Unavailable, "the line broke")), "unreached", "the line broke"},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, "conn_refused", ""},
		{&net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "node"}}, "name_unknown", ""},
	} {
		w := transportStatus("a", configs.HTTPS, false, x.err)
		if w.GetReason() != x.want || !strings.Contains(w.GetSaid(), x.said) || w.GetDo() == "" {
			t.Errorf("%v: %v, want %s", x.err, w, x.want)
		}
	}
}
