// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"filippo.io/age"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/cmd/demarc/customer"
	"github.com/demarc-dev/demarc/cmd/demarc/evidence"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// ran is an operation with all its documents; a test spoils some before they are signed.
type ran struct {
	request  operation.Request
	approval operation.Approval
	result   operation.Result
	release  operation.Release
	output   operation.Output

	asks, approves, ends, releases ed25519.PrivateKey
	statements                     [][]byte
	sealedRequest, hidden          []byte
}

// run signs everything, the output encrypted to one reader.
func (r *ran) run(t *testing.T, to age.Recipient, released bool) {
	t.Helper()
	must := func(b []byte, err error) []byte {
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var hidden bytes.Buffer
	w, err := age.Encrypt(&hidden, to)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(r.output.Encode()); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	r.hidden = hidden.Bytes()
	r.sealedRequest = must(seal.Seal(r.request, r.asks))
	r.approval.Request = fleet.DigestOf(r.sealedRequest)
	approval := must(seal.Seal(r.approval, r.approves))
	r.result.Request, r.result.Approval = r.approval.Request, fleet.DigestOf(approval)
	result := must(seal.Seal(r.result, r.ends))
	r.statements = [][]byte{approval, result}
	if released {
		r.release.Result, r.release.Output = fleet.DigestOf(result), fleet.DigestOf(r.hidden)
		r.statements = append(r.statements, must(seal.Seal(r.release, r.releases)))
	}
}

var opStart = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func anOperation() *ran {
	nonce := strings.Repeat("n", 16)
	r := &ran{asks: seeded(11), approves: seeded(12), ends: seeded(13), releases: seeded(12),
		output: operation.Output{Stdout: []byte("the answer\n"), StdoutSalt: [32]byte{1}}}
	r.request = operation.Request{ID: "op-1", Appliance: "eu-1", Operator: "spiffe://acme.example/operator/ann", Template: "state",
		TemplateDigest: fleet.DigestOf([]byte("t")),
		Release:        fleet.DigestOf([]byte("r")), Recipient: "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p",
		At: opStart, NotAfter: opStart.Add(time.Hour), Nonce: nonce}
	r.approval = operation.Approval{ID: "op-1", Appliance: "eu-1", Decision: operation.DecisionApprove, Argv: []string{"x"}, At: opStart,
		NotAfter: opStart.Add(time.Hour), Nonce: nonce}
	r.result = operation.Result{ID: "op-1", Appliance: "eu-1", Argv: []string{"x"}, State: operation.Held, Started: opStart.Add(time.Minute),
		Ended: opStart.Add(time.Minute)}
	r.result.Stdout, r.result.Stderr = r.output.Commitments()
	r.release = operation.Release{ID: "op-1", Appliance: "eu-1", Decision: operation.DecisionRelease, At: opStart.Add(time.Hour), Nonce: nonce}
	return r
}

// spoiled is what may be wrong with what an appliance or a control plane hands over (FAULTS.md C9, MUTANTS cmd/demarc/operation.go:191).
var spoiled = map[string]func(r *ran){
	"a result of another key":               func(r *ran) { r.ends = seeded(14) },
	"a result that the operator signed":     func(r *ran) { r.ends = r.asks },
	"an approval that the operator signed":  func(r *ran) { r.approves = r.asks },
	"a request of somebody else":            func(r *ran) { r.asks = seeded(14) },
	"another command than was approved":     func(r *ran) { r.result.Argv = []string{"y"} },
	"another output than was signed for":    func(r *ran) { r.output.Stdout = []byte("another answer\n") },
	"an output with another salt":           func(r *ran) { r.output.StdoutSalt[0]++ },
	"streams exchanged":                     func(r *ran) { r.output.Stdout, r.output.Stderr = r.output.Stderr, r.output.Stdout },
	"an output that is said to be complete": func(r *ran) { r.output.Truncated = true },
	"a rejected operation":                  func(r *ran) { r.approval.Decision, r.approval.Argv = operation.DecisionReject, nil },
}

type localStub struct {
	localv1connect.UnimplementedLocalHandler
	r *ran
}

func (l localStub) ListOperations(context.Context,
	*connect.Request[localv1.ListOperationsRequest]) (*connect.Response[localv1.ListOperationsResponse], error) {
	pem := func(b byte) []byte { k, _ := seal.KeyOf(seeded(b).Public()); return k.PEM() }
	return connect.NewResponse(&localv1.ListOperationsResponse{LogKey: pem(13), OperatorKeys: [][]byte{pem(11)},
		CustomerKeys: [][]byte{pem(12)},
		Operations: []*localv1.Operation{{Id: "op-1", State: "held", Request: l.r.sealedRequest, Statements: l.r.statements,
			Output: l.r.hidden}}}), nil
}

// TestConsentShowsNoOutputOfAnUnverifiedResult types what the customer types, against an appliance that hands over all that is
// spoiled: nothing is shown, nothing is signed, and the exit code says so.
func TestConsentShowsNoOutputOfAnUnverifiedResult(t *testing.T) {
	dir := t.TempDir()
	locked, err := seal.EncryptKeyAt(seeded(12), []byte("a passphrase"), 10)
	if err != nil {
		t.Fatal(err)
	}
	keyFile, pass := filepath.Join(dir, "key"), filepath.Join(dir, "pass")
	for name, b := range map[string][]byte{keyFile: locked, pass: []byte("a passphrase")} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	reader, err := customer.OutputKey(seeded(12))
	if err != nil {
		t.Fatal(err)
	}
	stub := &localStub{}
	mux := http.NewServeMux()
	mux.Handle(localv1connect.NewLocalHandler(stub))
	socket := filepath.Join(dir, "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	types := func(command ...string) (int, string) {
		var out, errs bytes.Buffer
		code := run(t.Context(), append(command, "--socket", socket, "--key", keyFile, "--passphrase-file", pass), strings.NewReader(""), &out,
			&errs)
		return code, out.String() + errs.String()
	}
	stub.r = anOperation()
	stub.r.run(t, reader.Recipient(), false)
	if code, text := types("consent", "output", "op-1"); code != cli.ExitOK || !strings.Contains(text, "the answer") {
		t.Fatalf("what is well: %d, %s", code, text)
	}
	for name, spoil := range spoiled {
		stub.r = anOperation()
		spoil(stub.r)
		stub.r.run(t, reader.Recipient(), false)
		for _, command := range []string{"output", "release", "withhold"} {
			code, text := types("consent", command, "op-1")
			if code != cli.ExitRefused || strings.Contains(text, "answer") || len(text) < 20 {
				t.Errorf("%s, %s: exit code %d, %s", name, command, code, text)
			}
		}
	}
}

// TestOperatorReadsNoOutputOfAnUnverifiedResult is the vendor's side of the same.
func TestOperatorReadsNoOutputOfAnUnverifiedResult(t *testing.T) {
	reader, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	pub := func(b byte) []seal.Key {
		k, err := seal.KeyOf(seeded(b).Public())
		if err != nil {
			t.Fatal(err)
		}
		return []seal.Key{k}
	}
	reads := func(r *ran, customer bool) (string, error) {
		k := operation.Keys{Operators: pub(11), Appliance: pub(13), CustomerUnknown: !customer}
		if customer {
			k.Customers = pub(12)
		}
		c, err := evidence.Verify(r.sealedRequest, r.statements, k)
		if err != nil {
			return "", err
		}
		out, err := evidence.Open(r.hidden, c, reader)
		return string(out.Stdout) + string(out.Stderr), err
	}
	for _, customer := range []bool{true, false} {
		r := anOperation()
		r.run(t, reader.Recipient(), true)
		if text, err := reads(r, customer); err != nil || text != "the answer\n" {
			t.Errorf("what is well: %q, %v", text, err)
		}
		r.hidden = append(bytes.Clone(r.hidden), 'x')
		if text, err := reads(r, customer); fault.Of(err) != fault.Denied || text != "" {
			t.Errorf("another ciphertext: %q, %v", text, err)
		}
	}
	for name, spoil := range spoiled {
		r := anOperation()
		spoil(r)
		r.run(t, reader.Recipient(), true)
		text, err := reads(r, true)
		if fault.Of(err) != fault.Denied || text != "" {
			t.Errorf("%s: %q, %v", name, text, err)
		}
		// Without the customer's key the approval's signature is the only thing that is not seen.
		if text, err = reads(r, false); name != "an approval that the operator signed" && (fault.Of(err) != fault.Denied || text != "") {
			t.Errorf("%s, without the customer's key: %q, %v", name, text, err)
		}
	}
	r := anOperation()
	r.releases = seeded(14)
	r.run(t, reader.Recipient(), true)
	if text, err := reads(r, true); fault.Of(err) != fault.Denied || text != "" {
		t.Errorf("a release of another key: %q, %v", text, err)
	}
}
