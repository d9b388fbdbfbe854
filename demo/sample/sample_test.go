// SPDX-License-Identifier: Apache-2.0

package sample_test

import (
	"os"
	"testing"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/operation"
)

// The sample is a release that compiles, and its operation is one that can be asked for.
func TestTheSampleCompiles(t *testing.T) {
	compose, err := os.ReadFile("compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	s, err := manifest.ParseCompose(compose)
	if err != nil {
		t.Fatal(err)
	}
	r := manifest.Release{App: s.App, Version: s.Version, Compose: string(compose), Artifacts: map[string]fleet.Digest{},
		Templates: map[string]string{}}
	for _, sv := range s.Services {
		r.Artifacts[sv.Name] = fleet.DigestOf([]byte(sv.Name))
	}
	for _, file := range s.Operations {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		tpl, err := operation.ParseTemplate(b)
		if err != nil || tpl.Name != manifest.TemplateName(file) {
			t.Fatalf("%s: %q, %v", file, tpl.Name, err)
		}
		r.Templates[tpl.Name] = string(b)
	}
	p, err := manifest.Compile(r, manifest.Choices{Runtime: fleet.RuntimeProcess})
	if err != nil || p.Services[0].Name != "store" || len(p.Operations) != 1 {
		t.Fatalf("%v\n%s", err, p.JSON())
	}
}
