// SPDX-License-Identifier: Apache-2.0

package manifest_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
)

// compose is a file with one row of a table in it, whose service web begins at line 4.
func compose(top, service string) string {
	return "x-demarc: {app: notes, version: 1.0.0" + top + "}\nservices:\n  db: {command: [db], x-demarc: {artifact: db}}\n  web:\n" + service
}

// refusedAt wants a refusal that names the line, once, and says something of what it is about.
func refusedAt(t *testing.T, what, file string, line int, word string) {
	t.Helper()
	_, err := manifest.ParseCompose([]byte(file))
	if !errors.Is(err, fault.Invalid) {
		t.Errorf("%s: %v, want a refusal", what, err)
		return
	}
	text := fault.Text(err)
	if !strings.HasPrefix(text, fmt.Sprintf("line %d: ", line)) || strings.Count(text, "line ") != 1 || !strings.Contains(text, word) {
		t.Errorf("%s: %q, want line %d and %q", what, text, line, word)
	}
}

const artifact = "    x-demarc: {artifact: web}\n"

// FAULTS.md D3: what is written is in the plan, or refused with its line.
func TestNothingIsLeftOutInSilence(t *testing.T) {
	for what, row := range map[string]struct {
		lines string
		line  int
		word  string
	}{
		"image":  {"    command: [web]\n    image: example.invalid/a:1\n", 6, "by digest"},
		"labels": {"    command: [web]\n    labels: {a: b}\n", 6, "labels"},
		"depends_on required": {"    command: [web]\n    depends_on:\n      db: {condition: service_started, required: false}\n", 7,
			"required"},
		"depends_on restart": {"    command: [web]\n    depends_on:\n      db: {condition: service_started, restart: true}\n", 7,
			"restart"},
		"a variable twice in a list": {"    command: [web]\n    environment: [A=1, A=2]\n", 6, "twice"},
		"a variable without value":   {"    command: [web]\n    environment: {A: }\n", 6, "no value"},
		"a command cut at ;":         {"    command: web --a; web --b\n", 5, "list"},
		"a command cut at |":         {"    command: web | tee log\n", 5, "list"},
		"a command cut at >":         {"    command: web >log\n", 5, "list"},
		"a command cut at &":         {"    command: web & wait\n", 5, "list"},
		"a command cut at a line":    {"    command: \"web --a\\nweb --b\"\n", 5, "list"},
		"a command with a backtick":  {"    command: web `id`\n", 5, "list"},
		"a command that is open":     {"    command: web 'a\n", 5, "list"},
		"a command that is a number": {"    command: 8080\n", 5, "text"},
		"a command with a number":    {"    command: [web, 8080]\n", 5, "quote"},
		"a command with a list":      {"    command: [web, [a]]\n", 5, "quote"},
	} {
		refusedAt(t, what, compose("", row.lines+artifact), row.line, row.word)
	}
	refusedAt(t, "name of a secret", compose(", secrets: {token: {required: true}}",
		"    command: [web]\n"+artifact)+"secrets:\n  token: {external: true, name: other}\n", 8, "name")
	refusedAt(t, "another name of the project", "name: other\n"+compose("", "    command: [web]\n"+artifact), 1, "other")
}

// FAULTS.md D3: a value in an environment is its own text; elsewhere a number has one reading.
func TestANumberKeepsItsSpelling(t *testing.T) {
	both := map[string]fleet.Digest{"web": fleet.DigestOf(nil), "db": fleet.DigestOf(nil)}
	for _, v := range []string{"1.10", "010", "0x1F", "1_000", "1e3", "1.0", ".5", "0o17", "12345678901234567890", "100000000", "true", "yes",
		"2026-01-02", "-0", "+1", ".inf", "\"a=b\""} {
		r := manifest.Release{App: "notes", Version: "1.0.0", Artifacts: both,
			Compose: compose("", "    command: [web]\n    environment: {A: "+v+"}\n"+artifact)}
		p, err := manifest.Compile(r, manifest.Choices{Runtime: fleet.RuntimeProcess})
		if err != nil {
			t.Errorf("%s: %v", v, err)
			continue
		}
		if got := p.Services[1].Env[0].Value; got != strings.Trim(v, "\"") {
			t.Errorf("A: %s becomes %q", v, got)
		}
	}
	for _, v := range []string{"010", "0x50", "0o120", "8_0", "8e1", "+80"} {
		refusedAt(t, v, compose("", "    command: [web]\n    x-demarc:\n      artifact: web\n      listen: {A: "+v+"}\n"), 8, v)
	}
	r := manifest.Release{App: "notes", Version: "1.10",
		Compose: strings.Replace(compose("", "    command: [web]\n"+artifact), "1.0.0", "1.10", 1), Artifacts: both}
	if err := r.Check(); err != nil {
		t.Errorf("version 1.10: %v", err)
	}
}

// FAULTS.md D2: a value of the wrong kind in x-demarc became the zero value: a required secret was optional.
func TestAWrongKindOfValueIsRefused(t *testing.T) {
	const file = "x-demarc:\n  app: notes\n  version: 1.0.0\n  secrets: {token: {required: true, hint: h}}\n  operations: [state.yaml]\n" +
		"  ports: {web: {service: web, port: 80, protocol: http, widest: public}}\nsecrets: {token: {external: true}}\n" +
		"services:\n  web:\n    command: [web]\n    secrets: [{source: token, target: TOKEN_FILE}]\n" +
		"    x-demarc: {artifact: web, listen: {A: 80}, wire: {B: \"web:80\"}, health: {port: 80, interval: 1s, retries: 3}}\n"
	if _, err := manifest.ParseCompose([]byte(file)); err != nil {
		t.Fatal(err)
	}
	for what, row := range map[string]struct {
		old, new string
		line     int
	}{
		"a required secret becomes optional": {"required: true", "required: \"yes please\"", 4},
		"a hint that is a list is gone":      {"hint: h", "hint: [h]", 4},
		"a hint that is a mapping is gone":   {"hint: h", "hint: {h: h}", 4},
		"an operation is gone":               {"[state.yaml]", "state.yaml", 5},
		"operations are a mapping":           {"[state.yaml]", "{a: state.yaml}", 5},
		"a port is text":                     {"port: 80, protocol", "port: http, protocol", 6},
		"a port is half":                     {"port: 80, protocol", "port: 80.5, protocol", 6},
		"how wide is a list":                 {"widest: public", "widest: [public]", 6},
		"a listener is gone":                 {"listen: {A: 80}", "listen: {A: 80, C: high}", 12},
		"a wire is gone":                     {"{B: \"web:80\"}", "[\"B=web:80\"]", 12},
		"retries are the default":            {"retries: 3", "retries: many", 12},
		"the interval is the default":        {"interval: 1s", "interval: [5m]", 12},
		"health is text":                     {"health: {port: 80, interval: 1s, retries: 3}", "health: fine", 12},
		"an artifact is a list":              {"artifact: web", "artifact: [web]", 12},
		"a secret is text":                   {"secrets: {token: {required: true, hint: h}}", "secrets: {token: required}", 4},
		"the app is a list":                  {"app: notes", "app: [notes]", 2},
	} {
		changed := strings.Replace(file, row.old, row.new, 1)
		if changed == file {
			t.Fatal("the test's own change does not fit:", what)
		}
		refusedAt(t, what, changed, row.line, "")
	}
}

// FAULTS.md D3: each refusal names its line, once. The rows of TestRefused do too.
func TestEachRefusalNamesItsLine(t *testing.T) {
	for _, row := range []struct {
		lines string
		line  int
	}{
		{"    command: /usr/bin/web\n" + artifact, 5},
		{"    command: [web]\n    environment:\n      discovery.type: one\n" + artifact, 7},
		{"    command: [web]\n    environment:\n      - A\n" + artifact, 7},
		{"    command: [web]\n    pids_limit: -1\n" + artifact, 6},
		{"    command: [web]\n    mem_limit: lots\n" + artifact, 6},
		{"    command: [web]\n    cpus: [1]\n" + artifact, 6},
		{"    command: [web]\n    depends_on: [cache]\n" + artifact, 6},
		{"    command: [web]\n    x-demarc: {artifact: ../web}\n", 6},
		{"    command: [web]\n    x-demarc:\n      artifact: web\n      wire: {A: \"db:1\"}\n", 8},
		{"    command: [web]\n    x-demarc:\n      artifact: web\n      health: {port: 1}\n", 8},
		{"    command: [web]\n    secrets: [{source: gone, target: A_FILE}]\n" + artifact, 6},
		{"    command: [web]\n    secrets: [gone]\n" + artifact, 6},
	} {
		refusedAt(t, row.lines, compose("", row.lines), row.line, "")
	}
	refusedAt(t, "version: latest", strings.Replace(compose("", "    command: [web]\n"+artifact), "1.0.0", "latest", 1), 1, "latest")
}
