// SPDX-License-Identifier: Apache-2.0

package vendor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/fault"
)

// FAULTS.md D4: a release was published whose command is not in its artifact, or may not be executed.
func TestAReleaseHasItsPrograms(t *testing.T) {
	const template = "version: demarc-template/1\nname: state\nabout: tells the state\nkind: exec\nservice: web\ntier: operate.read\n" +
		"argv: [web, state]\ntimeout: 5s\noutput: 1024\n"
	for what, row := range map[string]struct {
		mode              os.FileMode
		command, template string
		want              string // "" for none
	}{
		"a whole one":                      {0o700, "[web]", template, ""},
		"no such program":                  {0o700, "[bin/web]", template, "no file"},
		"a program that can't be run":      {0o600, "[web]", template, "chmod +x"},
		"a folder":                         {0o700, "[folder]", template, "no file"},
		"an operation without its program": {0o700, "[web]", strings.Replace(template, "argv: [web", "argv: [gone", 1), "no file"},
		"an operation of no service":       {0o700, "[web]", strings.Replace(template, "service: web", "service: other", 1), "no such service"},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "compose.yaml")
			text := "x-demarc: {app: notes, version: 1.0.0, operations: [state.yaml]}\nservices:\n" +
				"  web:\n    command: " + row.command + "\n    x-demarc: {artifact: web}\n"
			err := errors.Join(os.MkdirAll(filepath.Join(dir, "web", "folder"), 0o700), os.WriteFile(file, []byte(text), 0o600),
				os.WriteFile(filepath.Join(dir, "state.yaml"), []byte(row.template), 0o600), os.WriteFile(filepath.Join(dir, "web", "web"),
					[]byte("#!/bin/sh\n"), row.mode))
			if err != nil {
				t.Fatal(err)
			}
			_, packed, err := packRelease(file)
			packed.remove()
			if row.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, fault.Invalid) || !strings.Contains(fault.Text(err), row.want) {
				t.Fatalf("%v, want %q", err, row.want)
			}
			if _, err := os.Stat(packed.dir); packed.dir != "" && !os.IsNotExist(err) {
				t.Fatalf("the packed artifacts are left behind: %v", err)
			}
		})
	}
}
