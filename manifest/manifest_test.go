// SPDX-License-Identifier: Apache-2.0

package manifest_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
)

var update = flag.Bool("update", false, "write the golden files anew")

func notes(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("testdata/notes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func release(t testing.TB) manifest.Release {
	return manifest.Release{App: "notes", Version: "1.0.0", Compose: notes(t),
		Templates: map[string]string{"state": "version: demarc-template/1\n"},
		Artifacts: map[string]fleet.Digest{"web": fleet.DigestOf([]byte("web")), "store": fleet.DigestOf([]byte("store"))}}
}

func compiled(t testing.TB, r manifest.Release) manifest.Plan {
	t.Helper()
	p, err := manifest.Compile(r, manifest.Choices{Runtime: fleet.RuntimeProcess})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCompileGolden(t *testing.T) {
	p := compiled(t, release(t))
	var got bytes.Buffer
	if err := json.Indent(&got, p.JSON(), "", "  "); err != nil {
		t.Fatal(err)
	}
	got.WriteString("\n" + strings.Join(manifest.Diff(manifest.Plan{}, p), "\n") + "\n")
	const file = "testdata/notes.golden"
	if *update {
		if err := os.WriteFile(file, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil || got.String() != string(want) {
		t.Fatalf("the plan differs from %s (%v):\n%s", file, err, got.String())
	}
	back, err := manifest.ParsePlan(p.JSON())
	if err != nil || !reflect.DeepEqual(back, p) {
		t.Fatalf("%v\n%+v", err, back)
	}
}

// Whatever changes in what runs changes the digest, and what does not run does not.
func TestDigestBindsWhatRuns(t *testing.T) {
	base := compiled(t, release(t))
	for name, c := range map[string]struct {
		old, new string
		same     bool
	}{
		"argument":   {"--verbose", "--quiet", false},
		"variable":   {"LOG: plain", "LOG: json", false},
		"limit":      {"64m", "65m", false},
		"health":     {"retries: 5", "retries: 6", false},
		"wiring":     {"STORE_ADDR", "STORE_ADDRESS", false},
		"widest":     {"widest: public", "widest: private", false},
		"required":   {"required: true", "required: false", false},
		"hint":       {"the token that", "a token that", false},
		"comment":    {"services:", "# a comment\nservices:", true},
		"dependency": {"    depends_on: [store]\n", "", false},
	} {
		r := release(t)
		r.Compose = strings.Replace(r.Compose, c.old, c.new, 1)
		if r.Compose == notes(t) {
			t.Fatalf("%s: the case changes nothing", name)
		}
		p := compiled(t, r)
		if (p.Digest() == base.Digest()) != c.same || (len(manifest.Diff(base, p)) == 0) != c.same {
			t.Errorf("%s: digest %s, %s before, diff %q", name, p.Digest().Short(), base.Digest().Short(), manifest.Diff(base, p))
		}
	}
	r := release(t)
	r.Artifacts["web"] = fleet.DigestOf([]byte("other"))
	if p := compiled(t, r); p.Digest() == base.Digest() {
		t.Error("another artifact, and the same digest")
	}
	r = release(t)
	r.Templates["state"] += "# x"
	if p := compiled(t, r); p.Digest() == base.Digest() {
		t.Error("another template, and the same digest")
	}
	p, err := manifest.Compile(release(t),
		manifest.Choices{Runtime: fleet.RuntimeProcess, Secrets: map[string]string{"store-token": "prod-token"}})
	if err != nil || p.Secrets[0].Store != "prod-token" || p.Digest() == base.Digest() {
		t.Errorf("%v %+v", err, p.Secrets)
	}
	for range 20 {
		if compiled(t, release(t)).Digest() != base.Digest() {
			t.Fatal("compiling twice gives two plans")
		}
	}
}

func TestRefused(t *testing.T) {
	for name, c := range map[string]struct{ old, new, want string }{
		"privileged":   {"    command: [\"bin/web\", \"--verbose\"]", "    privileged: true", "line 11"},
		"build":        {"    command: [\"bin/web\", \"--verbose\"]", "    build: .", "artifacts by digest"},
		"volumes":      {"    command: [\"bin/web\", \"--verbose\"]", "    volumes: ['/:/host']", "mounts nothing"},
		"ports":        {"    command: [\"bin/web\", \"--verbose\"]", "    ports: ['80:80']", "x-demarc"},
		"host network": {"    command: [\"bin/web\", \"--verbose\"]", "    network_mode: host", "wired"},
		"env_file":     {"    command: [\"bin/web\", \"--verbose\"]", "    env_file: /etc/shadow", "no say"},
		"extends": {"    command: [\"bin/web\", \"--verbose\"]", "    extends: {file: /etc/passwd, service: x}",
			"whole"},
		"include":            {"services:", "include: [/etc/passwd]\nservices:", "whole"},
		"variable":           {"LOG: plain", "LOG: \"${HOME}\"", "line 21: a variable"},
		"short variable":     {"LOG: plain", "LOG: $HOME", "a variable"},
		"inherited variable": {"{LOG: plain, PRICE: \"5$$\"}", "[LOG]", "has no value"},
		"preload":            {"LOG: plain", "LD_PRELOAD: x.so", "LD_*"},
		"the mark of a run":  {"LOG: plain", "DEMARC_RUN: x", "DEMARC_*"}, // FAULTS.md B7: what is left over is found by it
		"path":               {"LOG: plain", "PATH: /x", "PATH"},
		"double variable":    {"LOG: plain", "STORE_LISTEN: x", "each once"},
		"anchor":             {"{LOG: plain", "&a {LOG: plain", "anchors"},
		"double key":         {"  store:\n", "  web:\n", "twice"},
		"unknown extension":  {"artifact: store", "artefact: store", "artefact"},
		"unknown in port":    {"widest: public", "wide: public", "wide"},
		"unknown widest":     {"widest: public", "widest: open", "open"},
		"artifact outside":   {"artifact: store", "artifact: ../store", "beside the file"},
		"artifact absolute":  {"artifact: store", "artifact: /store", "beside the file"},
		"program outside":    {"bin/store --name", "../../bin/sh --name", "inside the artifact"},
		"absolute program":   {"bin/store --name", "/bin/sh --name", "inside the artifact"},
		"wrong wire":         {"store:9000", "store:9001", "does not have"},
		"wire to nobody":     {"\"store:9000\"", "\"169.254.169.254:80\"", "service:port"},
		"cycle":              {"    mem_limit: 64m", "    depends_on: [web]", "store, web wait"},
		"missing dependency": {"depends_on: [store]", "depends_on: [gone]", "wait for each other"},
		"once finished": {"depends_on: [store]", "depends_on: {store: {condition: service_completed_successfully}}",
			"condition"},
		"secret from file": {"{external: true}", "{file: /etc/shadow}", "external"},
		"secret unlisted": {"  store-token: {external: true}", "  store-token: {external: true}\n  other: {external: true}",
			"not in x-demarc"},
		"secret as path":                        {"target: STORE_TOKEN_FILE", "target: /run/secrets/x", "TOKEN_FILE"},
		"health elsewhere":                      {"port: 8080}\n  store", "port: 22}\n  store", "does not listen"},
		"health path":                           {"http: /healthz, port: 8080", "http: 'http://evil/', port: 8080", "begins with /"},
		"health too often":                      {"interval: 500ms", "interval: 1ms", "100ms"},
		"no extension":                          {"x-demarc:\n  app: notes", "x-other:\n  app: notes", "x-other"},
		"app":                                   {"app: notes", "app: Notes!", "Notes!"},
		"version":                               {"version: 1.0.0", "version: 1 0", "1 0"},
		"template outside":                      {"operations/state.yaml", "../state.yaml", "operations"},
		"second document":                       {"secrets:\n  store-token: {ext", "---\nsecrets:\n  store-token: {ext", "second document"},
		"negative limit":                        {"pids_limit: 50", "pids_limit: -5", "negative"},
		"limit pids_limit 1.5":                  {"pids_limit: 50", "pids_limit: 1.5", "pids_limit"},                // FAULTS.md D2, D3
		"limit pids_limit 0":                    {"pids_limit: 50", "pids_limit: 0", "pids_limit"},                  // FAULTS.md D2, D3
		"limit pids_limit 99999999999999999999": {"pids_limit: 50", "pids_limit: 99999999999999999999", "4194304"},  // FAULTS.md D2, D3
		"limit mem_limit 0":                     {"mem_limit: 64m", "mem_limit: 0", "mem_limit"},                    // FAULTS.md D2, D3
		"limit mem_limit 0.4":                   {"mem_limit: 64m", "mem_limit: 0.4", "mem_limit"},                  // FAULTS.md D2, D3
		"limit mem_limit 18446744073709551617":  {"mem_limit: 64m", "mem_limit: 18446744073709551617", "mem_limit"}, // FAULTS.md D2, D3
		"limit mem_limit 99999999999g":          {"mem_limit: 64m", "mem_limit: 99999999999g", "1 PiB"},             // FAULTS.md D2, D3
		"limit mem_limit 1.5g":                  {"mem_limit: 64m", "mem_limit: 1.5g", "whole number"},              // FAULTS.md D2, D3
		"limit cpus nan":                        {"pids_limit: 50", "cpus: nan", "cpus"},                            // FAULTS.md D2, D3
		"limit cpus 0.0000000001":               {"pids_limit: 50", "cpus: 0.0000000001", "three digits"},           // FAULTS.md D2, D3
		"limit cpus 0":                          {"pids_limit: 50", "cpus: 0", "cpus"},                              // FAULTS.md D2, D3
		"limit cpus 1e3":                        {"pids_limit: 50", "cpus: 1e3", "decimal"},                         // FAULTS.md D2, D3
		"limit cpus 5000":                       {"pids_limit: 50", "cpus: 5000", "1024"},                           // FAULTS.md D2, D3
		"command missing":                       {"    command: [\"bin/web\", \"--verbose\"]\n", "", "command"},
	} {
		text := strings.Replace(notes(t), c.old, c.new, 1)
		if text == notes(t) {
			t.Fatalf("%s: the case changes nothing", name)
		}
		_, err := manifest.ParseCompose([]byte(text))
		if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if at := fault.Text(err); name != "second document" && (!strings.HasPrefix(at, "line ") || strings.Count(at, "line ") != 1) {
			t.Errorf("%s: %q names no line, or two", name, at)
		}
	}
	if _, err := manifest.ParseCompose(bytes.Repeat([]byte("#"), manifest.MaxCompose+1)); !errors.Is(err, fault.Invalid) {
		t.Error(err)
	}
}

func TestReleaseHoldsWhatItsFileNames(t *testing.T) {
	for want, edit := range map[string]func(*manifest.Release){
		"is called":             func(r *manifest.Release) { r.Version = "2" },
		"has no artifact":       func(r *manifest.Release) { delete(r.Artifacts, "web") },
		"artifact of \"extra\"": func(r *manifest.Release) { r.Artifacts["extra"] = fleet.DigestOf(nil) },
		"the artifact of":       func(r *manifest.Release) { r.Artifacts["web"] = "md5:0" },
		"no template":           func(r *manifest.Release) { delete(r.Templates, "state") },
		"a template \"extra\"":  func(r *manifest.Release) { r.Templates["extra"] = "x" },
	} {
		r := release(t)
		edit(&r)
		if err := r.Check(); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	if _, err := manifest.Compile(release(t), manifest.Choices{Runtime: "docker"}); !errors.Is(err, fault.Invalid) {
		t.Error(err)
	}
}

func TestParsePlanTakesOneSpelling(t *testing.T) {
	b := compiled(t, release(t)).JSON()
	for name, text := range map[string]string{
		"a space":       strings.Replace(string(b), ",", ", ", 1),
		"unknown field": strings.Replace(string(b), `"app":`, `"x":1,"app":`, 1),
		"version":       strings.Replace(string(b), "demarc-plan/1", "demarc-plan/2", 1),
		"trailing":      string(b) + "{}",
		"service order": strings.Replace(strings.Replace(string(b), `"name":"store"`, `"name":"zzz"`, 1), `"name":"web"`, `"name":"store"`, 1),
	} {
		if text == string(b) {
			t.Fatalf("%s: the case changes nothing", name)
		}
		if _, err := manifest.ParsePlan([]byte(text)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func FuzzParseCompose(f *testing.F) {
	f.Add(notes(f))
	f.Fuzz(func(t *testing.T, text string) {
		s, err := manifest.ParseCompose([]byte(text))
		if err != nil {
			return
		}
		r := manifest.Release{App: s.App, Version: s.Version, Compose: text, Artifacts: map[string]fleet.Digest{}, Templates: map[string]string{}}
		for _, sv := range s.Services {
			r.Artifacts[sv.Name] = fleet.DigestOf(nil)
		}
		for _, o := range s.Operations {
			r.Templates[manifest.TemplateName(o)] = "x"
		}
		p, err := manifest.Compile(r, manifest.Choices{Runtime: fleet.RuntimeProcess})
		if err != nil {
			t.Fatalf("what parses does not compile: %v", err)
		}
		if _, err := manifest.ParsePlan(p.JSON()); err != nil {
			t.Fatalf("the plan can't be read back: %v", err)
		}
	})
}

func FuzzParsePlan(f *testing.F) {
	f.Add(compiled(f, release(f)).JSON())
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := manifest.ParsePlan(b); err == nil && !bytes.Equal(p.JSON(), b) {
			t.Fatal("two spellings of one plan")
		}
	})
}
