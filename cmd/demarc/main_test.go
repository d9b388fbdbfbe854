// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

func TestMain(m *testing.M) {
	testscript.Main(leakless{m}, map[string]func(){"demarc": func() {
		os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}})
}

// leakless fails tests that leave a goroutine behind.
type leakless struct{ m *testing.M }

// Run implements [testscript.TestingM].
func (l leakless) Run() int {
	code := l.m.Run()
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// The scripts type what people type. Each begins with the evidence of two sides that watched each other.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireUniqueNames:  true,
		RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			for name, b := range evidenceFiles(t) {
				if err := os.WriteFile(filepath.Join(e.WorkDir, name), b, 0o600); err != nil {
					return err
				}
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"mode": mode, "exit": exit},
	})
}

// mode OCTAL FILE ... compares the rights of files.
func mode(ts *testscript.TestScript, _ bool, args []string) {
	for _, f := range args[1:] {
		fi, err := os.Stat(ts.MkAbs(f))
		ts.Check(err)
		if got := fi.Mode().Perm().String(); got != args[0] {
			ts.Fatalf("%s has mode %s, want %s", f, got, args[0])
		}
	}
}

// exit CODE COMMAND ... runs a command and compares its exit code.
func exit(ts *testscript.TestScript, _ bool, args []string) {
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var e *exec.ExitError
		if !errors.As(err, &e) {
			ts.Fatalf("%v", err)
		}
		got = e.ExitCode()
	}
	if strconv.Itoa(got) != args[0] {
		ts.Fatalf("exit code %d, want %s", got, args[0])
	}
}

const vendorLog, customerLog = "acme.example/control-plane", "acme.example/appliance/eu-1"

func seeded(b byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{b}, ed25519.SeedSize))
}

// trustDomain is that of the tests.
const trustDomain = "acme.example"

// evidenceFiles makes the files of both sides: each has its log, countersigned, and what it kept of the other's.
func evidenceFiles(t *testing.T) map[string][]byte {
	t.Helper()
	vendor, customer := side{vendorLog, seeded(1), 5}, side{customerLog, seeded(2), 7}
	return map[string][]byte{
		"vendor.pem":   publicPEM(t, vendor.key),
		"customer.pem": publicPEM(t, customer.key),
		"other.pem":    publicPEM(t, seeded(3)),
		"vendor.json":  vendor.bundle(t, vendor.log(vendor.size, ""), customer.cosigned(t, 4, "", vendor), vendor.cosigned(t, 3, "", customer)),
		"customer.json": customer.bundle(t, customer.log(customer.size, ""), vendor.cosigned(t, 3, "", customer),
			customer.cosigned(t, 4, "", vendor)),
		"forked.json": vendor.bundle(t, vendor.log(vendor.size, "another story"), nil, nil),
	}
}

type side struct {
	origin string
	key    ed25519.PrivateKey
	size   int
}

func (s side) log(size int, twist string) audit.Log {
	var l audit.Log
	for i := range size {
		l = l.Append(audit.Entry{At: time.Unix(int64(1_700_000_000+i), 0), By: "spiffe://acme.example/operator/ann", Kind: "test/1",
			Body: json.RawMessage(`{"n":` + string(rune('0'+i)) + `,"twist":"` + twist + `"}`), Request: fleet.RequestID(rune('a' + i))})
	}
	return l
}

// cosigned is a head of the log with another side's line.
func (s side) cosigned(t *testing.T, size int, twist string, by side) []byte {
	t.Helper()
	cp := s.checkpoint(t, s.log(size, twist))
	out, err := audit.Cosign(cp, by.origin, by.key, time.Unix(1_700_000_100, 0))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (s side) checkpoint(t *testing.T, l audit.Log) []byte {
	t.Helper()
	signer, err := audit.NoteSigner(s.origin, s.key)
	if err != nil {
		t.Fatal(err)
	}
	cp, err := audit.Checkpoint(s.origin, l.Size(), l.Root(), signer)
	if err != nil {
		t.Fatal(err)
	}
	return cp
}

func (s side) bundle(t *testing.T, l audit.Log, witnessed, cosigned []byte) []byte {
	t.Helper()
	var cos [][]byte
	if cosigned != nil {
		cos = [][]byte{cosigned}
	}
	e, err := audit.Collect(s.origin, s.key.Public(), l, [][]byte{s.checkpoint(t, l)}, cos)
	if err != nil {
		t.Fatal(err)
	}
	b := audit.Bundle{Version: audit.BundleVersion, Logs: []audit.LogEvidence{e}, Witnessed: []string{}, Documents: []string{}}
	if witnessed != nil {
		b.Witnessed = []string{string(witnessed)}
	}
	out, err := b.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func publicPEM(t *testing.T, k ed25519.PrivateKey) []byte {
	t.Helper()
	key, err := seal.KeyOf(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return key.PEM()
}
