// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// offer is an appliance with one release on offer.
type offer struct {
	localv1connect.UnimplementedLocalHandler
	release, plan string
	asked         string
	signed        []byte
}

func (o *offer) Review(_ context.Context, r *connect.Request[localv1.ReviewRequest]) (*connect.Response[localv1.ReviewResponse], error) {
	o.asked = r.Msg.GetRelease()
	return connect.NewResponse(&localv1.ReviewResponse{Release: o.release, Version: "1.0.0", PlanDigest: o.plan, Plan: []byte("{}"),
		Diff: []string{"+ version: 1.0.0"}, Phase: "install,deploy"}), nil
}

func (o *offer) Status(context.Context, *connect.Request[localv1.StatusRequest]) (*connect.Response[localv1.StatusResponse], error) {
	return connect.NewResponse(&localv1.StatusResponse{Appliance: "eu-1"}), nil
}

func (o *offer) Submit(_ context.Context, r *connect.Request[localv1.SubmitRequest]) (*connect.Response[localv1.SubmitResponse], error) {
	o.signed = r.Msg.GetDocument()
	return connect.NewResponse(&localv1.SubmitResponse{}), nil
}

// FAULTS.md G1, G2: a plan is approved by what was reviewed, and nobody copies a digest by hand; it is still what was read that is
// signed for.
func TestApproveWhatWasReviewed(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	locked, err := seal.EncryptKeyAt(seeded(12), []byte("a passphrase"), 10)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"key": locked, "pass": []byte("a passphrase"), "none.json": []byte(`{"plan_digest":"x"}`)} {
		if err := os.WriteFile(at(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	o := &offer{release: string(fleet.DigestOf([]byte("release"))), plan: string(fleet.DigestOf([]byte("plan")))}
	mux := http.NewServeMux()
	mux.Handle(localv1connect.NewLocalHandler(o))
	ln, err := net.Listen("unix", at("s"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	do := func(want int, args ...string) string {
		t.Helper()
		var out bytes.Buffer
		if args[0] == "approve" {
			args = append(args, "--key", at("key"), "--passphrase-file", at("pass"))
		}
		if got := run(t.Context(), append(args, "--socket", at("s")), nil, &out, &out); got != want {
			t.Fatalf("%q: exit code %d, want %d: %s", args, got, want, out.String())
		}
		return out.String()
	}
	signed := func() operation.PlanApproval {
		t.Helper()
		doc, err := seal.Peek[operation.PlanApproval](o.signed)
		if err != nil {
			t.Fatal(err)
		}
		o.signed = nil
		return doc
	}
	if out := do(0, "review"); !strings.Contains(out, "demarc approve --plan "+o.plan+"\n") {
		t.Errorf("review does not say how its plan is approved: %s", out)
	}
	if out := do(0, "review", "--release", o.release); !strings.Contains(out,
		"demarc approve --release "+o.release+" --plan "+o.plan+"\n") {
		t.Errorf("review of a release does not say how its plan is approved: %s", out)
	}
	if out := do(0, "review", "--save", at("review.json")); !strings.Contains(out, "demarc approve --reviewed "+at("review.json")+"\n") {
		t.Errorf("review does not say how what it kept is approved: %s", out)
	}
	do(1, "review", "--save", at("review.json")) // nothing is overwritten
	do(0, "approve", "--reviewed", at("review.json"))
	if doc := signed(); string(doc.Release) != o.release || string(doc.Plan) != o.plan || o.asked != o.release {
		t.Errorf("signed for %+v of release %q", doc, o.asked)
	}
	do(0, "approve", "--plan", o.plan)
	if doc := signed(); string(doc.Plan) != o.plan {
		t.Errorf("signed for %+v", doc)
	}
	reviewed := o.release
	do(2, "approve")
	do(2, "approve", "--plan", o.plan, "--reviewed", at("review.json"))
	do(2, "approve", "--release", string(fleet.DigestOf([]byte("another"))), "--reviewed", at("review.json"))
	do(1, "approve", "--reviewed", at("none.json"))
	do(1, "approve", "--reviewed", at("nowhere.json"))
	o.plan = string(fleet.DigestOf([]byte("another plan"))) // the release compiles to something else since
	if out := do(1, "approve", "--reviewed", at("review.json")); !strings.Contains(out, "review again") || o.asked != reviewed {
		t.Errorf("another plan than was reviewed: %s", out)
	}
	if o.signed != nil {
		t.Error("something was signed for all the same")
	}
}
