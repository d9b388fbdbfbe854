// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// FAULTS.md G1: what the demo prints, a shell reads as it was meant.
func TestAPrintedWordIsThatWord(t *testing.T) {
	for _, dir := range []string{"/tmp/demarc-demo-1", "/tmp/it's a folder"} {
		for _, a := range []string{"", " ", "list", "a b", "it's", `"`, "$D", "$(true)", "`true`", "a;b", "a&b", "*", "~", "!x", `\`,
			"a\nb", "#", "<", "|", "(", "{a,b}", "spiffe://acme.example/operator/ann",
			dir, dir + "/a", dir + "/it's a file", "acme/eu-1=" + dir + "/log.pub", "--x=" + dir, dir + ":" + dir, "'" + dir, dir + "'",
			dir + "/$D", "'$D", "'" + dir + "'$D"} {
			w := word(a, dir)
			out, err := exec.Command("sh", "-c", "D="+word(dir, "")+"\nprintf %s. "+w).CombinedOutput()
			if err != nil || string(out) != a+"." {
				t.Errorf("%q is printed as %s, which a shell reads as %q (%v)", a, w, out, err)
			}
			if strings.Contains(w, dir) {
				t.Errorf("%q is printed as %s, with the folder written out", a, w)
			}
		}
	}
}

// FAULTS.md G1: the file has all that the printed commands need, and a shell with nothing else takes it.
func TestTheEnvironmentOfTheDemo(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "it's a folder")
	s := &story{ctx: t.Context(), dir: dir, bin: filepath.Join(dir, "bin")}
	if err := os.MkdirAll(s.bin, 0o700); err != nil {
		t.Fatal(err)
	}
	// In place of demarc: it prints its environment and its arguments, and fails.
	script := "#!/bin/sh\nenv | grep ^DEMARC_ | sort\nprintf '<%s>\\n' \"$@\"\nexit 3\n"
	if err := os.WriteFile(filepath.Join(s.bin, "demarc"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DEMARC_CONTEXT", "elsewhere")
	t.Setenv("DEMARC_TIMEOUT", "elsewhere")
	s.environment()
	r := s.paste(s.line("verify", dir+"/a b.json", "--reason", "ticket 4711"))
	want := "DEMARC_CONTEXT=" + dir + "/acme/operator/operator.yaml\nDEMARC_KEY=" + dir +
		"/customer/globex.key\nDEMARC_PASSPHRASE_FILE=" + dir + "/customer/passphrase\nDEMARC_SOCKET=" + dir +
		"/customer/appliance.sock\n<verify>\n<" + dir + "/a b.json>\n<--reason>\n<ticket 4711>\n"
	if r.out != want || r.errs != "" || r.code != 3 {
		t.Errorf("got %d\n%s%swant\n%s", r.code, r.out, r.errs, want)
	}
}
