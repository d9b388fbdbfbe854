// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
	"github.com/demarc-dev/demarc/seal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func demarcd(args ...string) (code int, out, errs string) {
	var o, e bytes.Buffer
	code = run(context.Background(), args, &o, &e)
	return code, o.String(), e.String()
}

// TestARemovedNodeIsNotStartedAgain: a node that was removed for good ends with a code of its own, and the unit does not start it
// again after that one, and after no other. FAULTS.md J9.
func TestARemovedNodeIsNotStartedAgain(t *testing.T) {
	gone := fault.At("daemon.Run: raft", "", fault.Because(raft.ErrRemoved, "raft.removed", fault.Denied, "it was removed"))
	for err, want := range map[error]int{gone: exitGone, fault.New("x", fault.Denied, "another refusal"): exitFailed, errUsage: exitUsage} {
		if got := exitOf(err); got != want {
			t.Errorf("%v ends with %d, want %d", err, got, want)
		}
	}
	unit, err := os.ReadFile(filepath.Join("..", "..", "deploy", "systemd", "demarcd@.service"))
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("RestartPreventExitStatus=%d", exitGone)
	if lines := strings.Split(string(unit), "\n"); !slices.Contains(lines, want) || !slices.Contains(lines, "Restart=on-failure") {
		t.Errorf("the unit has no line %s", want)
	}
}

func TestCheckPrintsWhatHolds(t *testing.T) {
	file := filepath.Join("..", "..", "configs", "control-plane.example.yaml")
	if _, err := os.Stat(file); err != nil {
		all, _ := filepath.Glob(filepath.Join("..", "..", "configs", "control*.example.yaml"))
		file = all[0]
	}
	t.Setenv("DEMARC_METRICS_LISTEN", "127.0.0.1:1111")
	code, out, errs := demarcd("check", "-c", file)
	if code != exitOK || !strings.Contains(out, "127.0.0.1:1111") || !strings.Contains(out, "backdate: 12h") {
		t.Fatalf("%d\n%s%s", code, out, errs)
	}
	code, out, _ = demarcd("check", "-c", file, "--metrics.listen", "127.0.0.1:2222")
	if code != exitOK || !strings.Contains(out, "127.0.0.1:2222") || strings.Contains(out, ":1111") {
		t.Fatalf("a flag goes before the environment: %d\n%s", code, out)
	}
}

// TestCheckReadsTheVendorsKeys (FAULTS.md A13): check refuses what run would: a key that signs releases and requests.
func TestCheckReadsTheVendorsKeys(t *testing.T) {
	dir := t.TempDir()
	key := func(seed string) []byte {
		k, err := seal.KeyOf(ed25519.NewKeyFromSeed([]byte(strings.Repeat(seed, 32))).Public())
		if err != nil {
			t.Fatal(err)
		}
		return k.PEM()
	}
	for name, b := range map[string][]byte{"release.pub": key("r"), "ann.pub": key("a"), "copy.pub": key("r")} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for ann, want := range map[string]string{"ann.pub": "", "copy.pub": "one key speaks for one", "none.pub": "can't be read"} {
		file := filepath.Join(dir, "a.yaml")
		text := fmt.Sprintf("version: demarc/1\nrole: appliance\nname: eu-1\ncustomer: globex\ntrust_domain: acme.example\n"+
			"control_plane: {addresses: [\"h:1\"], bundle_file: b, "+
			"release_keys: [release.pub], operators: [{name: ann, keys: [%s]}]}\ntransports: [{kind: https}]\nproof: {kind: gcp}\n", ann)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		code, _, errs := demarcd("check", "-c", file)
		if (code == exitOK) != (want == "") || !strings.Contains(errs, want) {
			t.Errorf("%s: %d %q, want %q", ann, code, errs, want)
		}
	}
}

func TestErrorsNameTheirPlace(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a.yaml")
	if err := os.WriteFile(file, []byte("version: demarc/1\nrole: appliance\nname: eu-1\ncolour: red\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"check", "-c", file}, exitFailed, "a.yaml:4"},
		{[]string{"check"}, exitUsage, "-c FILE"},
		{[]string{"check", "-c", file, "extra"}, exitUsage, "no arguments"},
		{[]string{"check", "-c", file + ".none"}, exitFailed, ".none"},
		{[]string{"run", "-c", file, "--log-format", "xml"}, exitUsage, "text or json"},
		{[]string{"run", "-c", file, "--log-level", "loud"}, exitUsage, "debug"},
		{[]string{"check", "--unknown"}, exitUsage, "--unknown"},
	} {
		code, _, errs := demarcd(c.args...)
		if code != c.code || !strings.Contains(errs, c.want) {
			t.Errorf("%q: %d %q, want %d %q", c.args, code, errs, c.code, c.want)
		}
	}
}
