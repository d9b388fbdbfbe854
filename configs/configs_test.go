// SPDX-License-Identifier: Apache-2.0

package configs_test

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
)

func example(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(name + ".example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// allKeys lists each key of a role's file, by its type.
func allKeys(t reflect.Type, out map[string]bool) {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return
	}
	for i := range t.NumField() {
		key, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
		out[key] = true
		allKeys(t.Field(i).Type, out)
	}
}

// TestExamples loads each example, and shows that it explains each key and that what is printed loads again.
func TestExamples(t *testing.T) {
	for name, want := range map[string]configs.Config{"control-plane": &configs.Control{}, "appliance": &configs.Appliance{},
		"management-plane": &configs.Management{}} {
		t.Run(name, func(t *testing.T) {
			c, err := configs.Load(name+".example.yaml", nil)
			if err != nil {
				t.Fatal(err)
			}
			if reflect.TypeOf(c) != reflect.TypeOf(want) {
				t.Fatalf("it is a %T", c)
			}
			text, keys := example(t, name), map[string]bool{}
			allKeys(reflect.TypeOf(want), keys)
			for key := range keys {
				if !regexp.MustCompile(`\b` + key + `:`).MatchString(text) {
					t.Errorf("the example does not show %s", key)
				}
			}
			out, err := c.Effective()
			if err != nil {
				t.Fatal(err)
			}
			again, err := configs.Parse("effective.yaml", out, nil)
			if err != nil || !reflect.DeepEqual(c, again) {
				t.Errorf("printed and loaded: %v\n%s", err, out)
			}
		})
	}
	if files, err := filepath.Glob("*.yaml"); err != nil || len(files) != 3 {
		t.Errorf("examples: %v %v", files, err)
	}
}

const control = `version: demarc/1
role: control-plane
name: cp-1
trust_domain: acme.example
cluster:
  - {name: cp-1, raft: "127.0.0.1:1", api: "127.0.0.1:2"}
kek_file: kek
certificate: {file: a, key: b, bundle: c}
`

const appliance = `version: demarc/1
role: appliance
name: eu-1
customer: globex
trust_domain: acme.example
control_plane: {addresses: ["127.0.0.1:2"], bundle_file: b, release_keys: [k]}
transports:
  - kind: https
proof: {kind: kubernetes, kubernetes: {token_file: token}}
`

func TestDefaultsAndPaths(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "demarc.yaml")
	if err := os.WriteFile(file, []byte(control), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := configs.Load(file, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := c.(*configs.Control)
	if got.Listen != "0.0.0.0:7443" || got.Advertise != "127.0.0.1:2" || got.Raft.Advertise != "127.0.0.1:1" ||
		got.Leaf.Life != 720*time.Hour ||
		got.KEKFile != filepath.Join(dir, "kek") || got.Certificate.Key != filepath.Join(dir, "b") ||
		got.Artifacts != "/var/lib/demarc/artifacts" ||
		got.Management != nil || got.Tailnet != nil || got.Self().API != "127.0.0.1:2" {
		t.Errorf("%+v", got)
	}
	a, err := configs.Parse("/etc/demarc/x.yaml", []byte(appliance), nil)
	if err != nil {
		t.Fatal(err)
	}
	app := a.(*configs.Appliance)
	if app.Metrics != nil || app.Transports[0].Name != "https" || app.Transports[0].Addresses[0] != "127.0.0.1:2" ||
		app.Proof.Kubernetes.TokenFile != "/etc/demarc/token" || app.ControlPlane.ReleaseKeys[0] != "/etc/demarc/k" {
		t.Errorf("%+v", app)
	}
}

// TestOrder: the file, then the environment, then the flags; and each is named when its value is bad.
func TestOrder(t *testing.T) {
	flags := pflag.NewFlagSet("demarcd", pflag.ContinueOnError)
	flags.String("listen", "9.9.9.9:9", "")
	flags.String("raft.listen", "9.9.9.9:9", "a default of a flag is none of the file's")
	flags.String("config", "x", "")
	file := []byte(control + "listen: 127.0.0.1:10\nmetrics: {listen: \"\"}\n")
	listen := func() (string, string, *configs.Control) {
		t.Helper()
		c, err := configs.Parse("f.yaml", file, flags)
		if err != nil {
			t.Fatal(err)
		}
		got := c.(*configs.Control)
		return got.Listen, got.Raft.Listen, got
	}
	if a, b, c := listen(); a != "127.0.0.1:10" || b != "0.0.0.0:7444" || c.Metrics.Listen != "" {
		t.Errorf("file: %s %s %q", a, b, c.Metrics.Listen)
	}
	t.Setenv("DEMARC_LISTEN", "127.0.0.1:11")
	t.Setenv("DEMARC_RAFT_LISTEN", "127.0.0.1:12")
	t.Setenv("DEMARC_LEAF_LIFE", "24h")
	t.Setenv("DEMARC_ROLE", "appliance")
	t.Setenv("DEMARC_MANAGEMENT_URL", "https://m.example")
	t.Setenv("DEMARC_MANAGEMENT_CA_FILE", "ca")
	t.Setenv("DEMARC_MANAGEMENT_NAME", "acme")
	if a, b, c := listen(); a != "127.0.0.1:11" || b != "127.0.0.1:12" || c.Leaf.Life != 24*time.Hour || c.Role != configs.RoleControl ||
		c.Management == nil || c.Management.Name != "acme" {
		t.Errorf("environment: %s %s %+v", a, b, c)
	}
	if err := flags.Set("listen", "127.0.0.1:13"); err != nil {
		t.Fatal(err)
	}
	if a, _, _ := listen(); a != "127.0.0.1:13" {
		t.Errorf("flag: %s", a)
	}
	if err := flags.Set("listen", "nonsense"); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DEMARC_RAFT_LISTEN", "nonsense")
	_, err := configs.Parse("f.yaml", file, flags)
	if fault.Of(err) != fault.Invalid || !strings.Contains(err.Error(), `--listen: listen: "nonsense"`) ||
		!strings.Contains(err.Error(), `DEMARC_RAFT_LISTEN in the environment: raft.listen: "nonsense"`) {
		t.Errorf("bad values: %v", err)
	}
	t.Setenv("DEMARC_LEAF_LIFE", "long")
	if _, err := configs.Parse("f.yaml", file, nil); fault.Of(err) != fault.Invalid || !strings.Contains(err.Error(), "leaf.life") {
		t.Errorf("a duration of the environment: %v", err)
	}
}

func TestListFromEnvironment(t *testing.T) {
	t.Setenv("DEMARC_CONTROL_PLANE_ADDRESSES", "a.example:1,b.example:2")
	c, err := configs.Parse("f.yaml", []byte(appliance), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.(*configs.Appliance).ControlPlane.Addresses; !reflect.DeepEqual(got, []string{"a.example:1", "b.example:2"}) {
		t.Errorf("%q", got)
	}
}

// TestRefused changes one thing of a good file at a time.
func TestRefused(t *testing.T) {
	for name, tc := range map[string]struct{ file, old, new, want string }{
		"proxy of nowhere": {appliance, "kind: https", "kind: https\n    proxy: {auth_file: a}",
			"transports[0].proxy: name one of url and from"},
		"proxy twice": {appliance, "kind: https", "kind: https\n    proxy: {url: \"http://p:1\", from: environment}",
			"name one of url and from"},
		"proxy from abroad":  {appliance, "kind: https", "kind: https\n    proxy: {from: dhcp}", "transports[0].proxy.from"},
		"inner by http":      {appliance, "kind: https", "kind: https\n    inner_tls: {url: \"https://a.example\"}", "use wss://"},
		"inner without port": {appliance, "kind: https", "kind: https\n    inner_tls: {url: a.example}", "use wss://"},
		"inner, bad port":    {appliance, "kind: https", "kind: https\n    inner_tls: {url: \"wss://a.example:0\"}", "the port"},
		"inner, password":    {appliance, "kind: https", "kind: https\n    inner_tls: {url: \"wss://u:p@a.example\"}", "carries no credentials"},
		"inner elsewhere": {appliance, "kind: https", "kind: privatelink\n    addresses: [\"a:1\"]\n    inner_tls: {url: \"a:1\"}",
			"belongs to the kind https"},
		"inner door taken": {control, "kek_file: kek", "kek_file: kek\ninner_tls: {listen: \"0.0.0.0:7443\", cert_file: a, key_file: b}",
			"inner_tls.listen"},
		"inner door, bare":   {control, "kek_file: kek", "kek_file: kek\ninner_tls: {listen: \"0.0.0.0:1\"}", "inner_tls.cert_file: missing"},
		"empty":              {"", "", "", "f.yaml"},
		"no version":         {control, "version: demarc/1\n", "", "f.yaml:1: version"},
		"other version":      {control, "demarc/1", "demarc/2", "f.yaml:1: version"},
		"other role":         {control, "control-plane", "root", "f.yaml:2: role"},
		"no role":            {control, "role: control-plane\n", "", "role"},
		"not a mapping":      {"- a\n", "", "", "must be a mapping"},
		"two documents":      {control, "kek_file: kek", "kek_file: kek\n---\nx: 1", "a second document"},
		"broken document":    {control, "kek_file: kek", "kek_file: [", "f.yaml"},
		"unknown key":        {control, "kek_file: kek", "kek_file: kek\nkek_fil: x", "f.yaml:8: kek_fil: unknown key; known here: version"},
		"unknown, nested":    {control, "bundle: c", "bundle: c, ca: d", "f.yaml:8: certificate.ca: unknown key; known here: file, key, bundle"},
		"unknown, in a list": {control, `api: "127.0.0.1:2"`, `api: "127.0.0.1:2", x: y`, "f.yaml:6: cluster[0].x: unknown key"},
		"other case":         {control, "kek_file", "KEK_file", "unknown key"},
		"of another role":    {control, "kek_file: kek", "kek_file: kek\ncustomer: x", "customer: unknown key"},
		"dotted":             {control, "kek_file: kek", "kek_file: kek\nraft.listen: 127.0.0.1:1", "raft.listen: unknown key"},
		"twice":              {control, "kek_file: kek", "kek_file: kek\nkek_file: kok", "written twice"},
		"empty section":      {control, "certificate: {file: a, key: b, bundle: c}", "certificate:", "f.yaml:8: certificate: a section"},
		"empty value":        {control, "kek_file: kek", "kek_file:", "f.yaml:7: kek_file"},
		"a number":           {control, "name: cp-1\n", "name: 1\n", "f.yaml:3: name"},
		"a list for text":    {control, "kek_file: kek", "kek_file: [kek]", "a single value"},
		"text for a list":    {appliance, "release_keys: [k]", "release_keys: k", "a list"},
		"text for a section": {control, "{file: a, key: b, bundle: c}", "abc", "a section"},
		"an anchor":          {control, "kek_file: kek", "kek_file: &a kek", "anchors"},
		"an alias":           {control, "kek_file: kek\ncertificate: {file: a", "kek_file: &a kek\ncertificate: {file: *a", "anchors"},
		"a merge":            {control, "{file: a,", "{<<: {file: a},", "this is no key"},
		"a tag":              {control, "kek_file: kek", "kek_file: !!binary a2Vr", "is not text"},
		"missing":            {control, "kek_file: kek\n", "", "kek_file: missing"},
		"missing, nested":    {control, ", bundle: c", "", "f.yaml:8: certificate.bundle: missing"},
		"missing section":    {control, "certificate: {file: a, key: b, bundle: c}\n", "", "certificate.file: missing"},
		"bad name":           {control, "name: cp-1\n", "name: CP\n", "f.yaml:3: name"},
		"bad domain":         {control, "acme.example", "10.0.0.1", "f.yaml:4: trust_domain"},
		"two nodes":          {control, "kek_file", "  - {name: b, raft: \"h:1\", api: \"h:2\"}\nkek_file", "f.yaml:6: cluster: 2 nodes"},
		"not in the cluster": {control, "{name: cp-1", "{name: cp-2", "is not among the nodes"},
		"a node twice": {control, "kek_file", "  - {name: cp-1, raft: \"h:1\", api: \"h:2\"}\n  - {name: c, raft: \"h:1\", api: " +
			"\"h:3\"}\nkek_file", "f.yaml:7: cluster[1].name"},
		"wild in cluster":   {control, `"127.0.0.1:1"`, `"0.0.0.0:1"`, "f.yaml:6: cluster[0].raft"},
		"no port":           {control, `"127.0.0.1:1"`, `"127.0.0.1"`, "use host:port"},
		"port out of range": {control, `"127.0.0.1:1"`, `"127.0.0.1:65536"`, "the port must"},
		"two doors, one": {control, "kek_file: kek", "kek_file: kek\nlisten: 127.0.0.1:5\nraft: {listen: 127.0.0.1:5}",
			"raft.listen: 127.0.0.1:5 is that of listen too"},
		"raft elsewhere":   {control, "kek_file: kek", "kek_file: kek\nraft: {advertise: \"127.0.0.1:9\"}", "f.yaml:8: raft.advertise"},
		"listen on a name": {control, "kek_file: kek", "kek_file: kek\nlisten: cp.example:1", "not on a name"},
		"leaf life":        {control, "kek_file: kek", "kek_file: kek\nleaf: {life: 1s}", "leaf.life"},
		"leaf duration":    {control, "kek_file: kek", "kek_file: kek\nleaf: {life: 30 days}", "not a duration"},
		"no life": {control, "kek_file: kek", "kek_file: kek\noidc: {issuer: \"https://i.example\", client_id: c, domains: " +
			"[a.example], roles: [{group: g, role: admin}], life: 0s}", "oidc.life: \"0s\": use more than 0s"},
		"one key for two": {appliance, "release_keys: [k]", "release_keys: [k], operators: [{name: ann, keys: [k]}]",
			"control_plane.operators[0].keys[0]: k is that of control_plane.release_keys[0] too"},
		"a key of two": {appliance, "release_keys: [k]", "release_keys: [k], operators: [{name: ann, keys: [a]}, {name: ben, keys: [a]}]",
			"control_plane.operators[1].keys[0]"},
		"operator twice": {appliance, "release_keys: [k]", "release_keys: [k], operators: [{name: ann, keys: [a]}, {name: ann, keys: [b]}]",
			"control_plane.operators[1].name"},
		"operator, no key": {appliance, "release_keys: [k]", "release_keys: [k], operators: [{name: ann}]",
			"control_plane.operators[0].keys: missing"},
		"operator, no name": {appliance, "release_keys: [k]", "release_keys: [k], operators: [{name: spiffe://a/operator/ann, keys: [a]}]",
			"control_plane.operators[0].name"},
		"keys without names": {appliance, "release_keys: [k]", "release_keys: [k], operator_keys: [a]", "unknown key"},
		"backdate":           {control, "kek_file: kek", "kek_file: kek\nleaf: {backdate: -1h}", "leaf.backdate"},
		"URL with password": {control, "kek_file: kek", "kek_file: kek\nmanagement: {url: \"https://u:hunter2@h\", ca_file: a, name: b}",
			"carries no credentials"},
		"URL of a file":    {control, "kek_file: kek", "kek_file: kek\nmanagement: {url: \"file:///x\", ca_file: a, name: b}", "use https"},
		"transport kind":   {appliance, "kind: https", "kind: smoke", "f.yaml:8: transports[0].kind"},
		"no transport":     {appliance, "transports:\n  - kind: https\n", "", "transports: missing"},
		"empty transports": {appliance, "transports:\n  - kind: https\n", "transports: []\n", "at least one entry"},
		"transport twice":  {appliance, "- kind: https", "- kind: https\n  - kind: https", "f.yaml:9: transports[1].name"},
		"privatelink":      {appliance, "kind: https", "kind: privatelink", "transports[0].addresses: missing"},
		"tailscale":        {appliance, "kind: https", "kind: tailscale", "transports[0].tailnet: missing"},
		"tailnet misplaced": {appliance, "kind: https", "kind: https\n    tailnet: {auth_key_file: a, hostname: b}",
			"belongs to the kind tailscale"},
		"tailnet no way": {appliance, "kind: https", "kind: tailscale\n    tailnet: {hostname: b}", "tailnet: name one of auth_key_file"},
		"tailnet two ways": {appliance, "kind: https", "kind: tailscale\n    tailnet: {hostname: b, auth_key_file: a, oauth_client_file: c}",
			"auth_key_file and oauth_client_file: name one"},
		"tailnet no tags": {appliance, "kind: https", "kind: tailscale\n    tailnet: {hostname: b, oauth_client_file: c}",
			"tailnet.tags: missing"},
		"tailnet tag": {appliance, "kind: https", "kind: tailscale\n    tailnet: {hostname: b, auth_key_file: a, tags: [demarc]}",
			"tailnet.tags[0]"},
		"tailnet workload": {appliance, "kind: https", "kind: tailscale\n    tailnet: {hostname: b, tags: [\"tag:a\"], workload_identity: " +
			"{client_id: c}}", "one of audience and id_token_file"},
		"tailnet client": {appliance, "kind: https", "kind: tailscale\n    tailnet: {hostname: b, tags: [\"tag:a\"], workload_identity: " +
			"{audience: c}}", "workload_identity.client_id: missing"},
		"tailnet of ingress": {appliance, "proof:", "ingress: {tailnet: {hostname: b}}\nproof:", "ingress.tailnet: name one of"},
		"tailnet shared dir": {appliance, "kind: https", "kind: tailscale\n    tailnet: {hostname: b, auth_key_file: a, dir: /same}\ningress: " +
			"{tailnet: {hostname: c, auth_key_file: a, dir: /same}}", "ingress.tailnet.dir"},
		"proxy misplaced": {appliance, "kind: https", "kind: privatelink\n    addresses: [\"h:1\"]\n    proxy: {url: \"http://p:1\"}",
			"belongs to the kind https"},
		"proof kind":       {appliance, "kind: kubernetes", "kind: trust-me", "proof.kind"},
		"token file alone": {appliance, "kubernetes: {token_file: token}", "token_file: token", "unknown key"},
		"both tokens": {appliance, "kubernetes: {token_file: token}", "kubernetes: {token_file: token}, token_command: [a]",
			"name one of"},
		"proof unknown": {appliance, "{kind: kubernetes, kubernetes: {token_file: token}}", "{kind: azure}",
			"use aws, gcp, kubernetes or dev"},
		"foreign proof": {appliance, "{kind: kubernetes,", "{kind: aws,", "belongs to the kind kubernetes only"},
		"foreign region": {appliance, "{kind: kubernetes,", "{kind: kubernetes, aws: {region: eu-central-1},",
			"belongs to the kind aws only"},
		"command on gcp": {appliance, "{kind: kubernetes, kubernetes: {token_file: token}}", "{kind: gcp, token_command: [a]}",
			"belongs to the kinds kubernetes and dev only"},
		"dev, no command": {appliance, "{kind: kubernetes, kubernetes: {token_file: token}}", "{kind: dev}",
			"proof.token_command: missing: [demarc, platform, dev, token"},
		"odd region": {appliance, "{kind: kubernetes, kubernetes: {token_file: token}}", "{kind: aws, aws: {region: Frankfurt}}",
			"proof.aws.region"},
		"runtime":      {appliance, "proof:", "runtime: {kind: chroot}\nproof:", "runtime.kind"},
		"port name":    {appliance, "proof:", "ingress: {ports: {Web: \"0.0.0.0:1\"}}\nproof:", "ingress.ports.Web"},
		"port address": {appliance, "proof:", "ingress: {ports: {web: \"1\"}}\nproof:", "ingress.ports.web"},
		"port shared":  {appliance, "proof:", "ingress: {ports: {a: \"0.0.0.0:1\", b: \"0.0.0.0:1\"}}\nproof:", "ingress.ports.b"},
		"tailnet port": {appliance, "proof:", "ingress: {tailnet: {hostname: c, auth_key_file: a}, tailnet_ports: {web: " +
			"\"1.2.3.4:80\"}}\nproof:", "ingress.tailnet_ports.web"},
		"tailnet port 0": {appliance, "proof:", "ingress: {tailnet: {hostname: c, auth_key_file: a}, tailnet_ports: {web: \":0\"}}\nproof:",
			"ingress.tailnet_ports.web"},
		"tailnet port twice": {appliance, "proof:", "ingress: {tailnet: {hostname: c, auth_key_file: a}, tailnet_ports: {a: \":80\", b: " +
			"\":80\"}}\nproof:", "ingress.tailnet_ports.b"},
		"no tailnet":       {appliance, "proof:", "ingress: {tailnet_ports: {a: \":80\"}}\nproof:", "ingress.tailnet_ports: without"},
		"limit zero":       {appliance, "proof:", "ingress: {limits: {connections: 0}}\nproof:", "ingress.limits.connections: \"0\""},
		"limit below zero": {appliance, "proof:", "ingress: {limits: {requests: -5}}\nproof:", "ingress.limits.requests: \"-5\""},
		"limit as text":    {appliance, "proof:", "ingress: {limits: {requests: \"5\"}}\nproof:", "ingress.limits.requests"},
		"limit too large":  {appliance, "proof:", "ingress: {limits: {connections: 2000000}}\nproof:", "use 1 to"},
		"source above all": {appliance, "proof:", "ingress: {limits: {connections: 10, connections_per_source: 11}}\nproof:",
			"more than all sources"},
		"pq":          {appliance, "kind: https", "kind: https\n    pq: maybe", "transports[0].pq"},
		"half of TLS": {appliance, "proof:", "ingress: {tls: {cert_file: a}}\nproof:", "ingress.tls.key_file: missing"},
		"long socket": {appliance, "proof:", "socket: /" + strings.Repeat("a", 107) + "\nproof:", "107 bytes"},
		"too large":   {control + "#" + strings.Repeat("x", configs.MaxFile), "", "", "larger than"},
	} {
		t.Run(name, func(t *testing.T) {
			file := strings.Replace(tc.file, tc.old, tc.new, 1)
			if tc.old != "" && file == tc.file {
				t.Fatal("the test changes nothing")
			}
			c, err := configs.Parse("f.yaml", []byte(file), nil)
			if c != nil || fault.Of(err) != fault.Invalid || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
			if err != nil && strings.Contains(fault.Text(err), "f.yaml") {
				t.Error("a remote reader would see the file's name")
			}
		})
	}
	for _, good := range []string{control, appliance} {
		if _, err := configs.Parse("f.yaml", []byte(good), nil); err != nil {
			t.Error(err)
		}
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	_, err := configs.Parse("f.yaml", []byte("version: demarc/1\nrole: appliance\nname: A\ncustomer: B\n"), nil)
	for _, want := range []string{"f.yaml:3: name", "f.yaml:4: customer", "trust_domain: missing", "transports: missing",
		"proof.kind: missing"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %q", err, want)
		}
	}
}

func TestEffectiveHidesSecrets(t *testing.T) {
	file := strings.Replace(appliance, "kubernetes: {token_file: token}", "token_command: [/bin/token, --password, hunter2]", 1)
	c, err := configs.Parse("f.yaml", []byte(file), nil)
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.Effective()
	if err != nil || bytes.Contains(out, []byte("hunter2")) || !bytes.Contains(out, []byte("/bin/token")) {
		t.Errorf("%s %v", out, err)
	}
	if n := len(c.(*configs.Appliance).Proof.TokenCommand); n != 3 {
		t.Errorf("printing changed the command: %d words", n)
	}
	// A refused URL must not be repeated with its password either.
	_, err = configs.Parse("f.yaml",
		[]byte(strings.Replace(appliance, "kind: https", "kind: https\n    proxy: {url: \"http://u:hunter2@p:1\"}", 1)), nil)
	if err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("the error repeats a password: %v", err)
	}
}

func TestLoadMissing(t *testing.T) {
	if _, err := configs.Load(filepath.Join(t.TempDir(), "none.yaml"), nil); fault.Of(err) != fault.NotFound {
		t.Errorf("%v", err)
	}
	if _, err := configs.Load(t.TempDir(), nil); err == nil {
		t.Error("a folder loads")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(control))
	f.Add([]byte(appliance))
	for _, name := range []string{"control-plane", "appliance", "management-plane"} {
		f.Add([]byte(example(f, name)))
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		c, err := configs.Parse("/f.yaml", file, nil)
		if err != nil {
			if fault.Of(err) != fault.Invalid {
				t.Fatal(err)
			}
			return
		}
		out, err := c.Effective()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := configs.Parse("/f.yaml", out, nil); err != nil {
			t.Fatalf("what is printed does not load: %v\n%s", err, out)
		}
	})
}

// TestInnerTLS: the file alone allows it, and what is left out is written out.
func TestInnerTLS(t *testing.T) {
	for url, want := range map[string][2]string{
		"wss://a.example":           {"wss://a.example/demarc/inner", "a.example:443"},
		"wss://a.example:8443/x":    {"wss://a.example:8443/x", "a.example:8443"},
		"a.example:9000":            {"wss://a.example:9000/demarc/inner", "a.example:9000"},
		"wss://[2001:db8::1]:1/y/z": {"wss://[2001:db8::1]:1/y/z", "[2001:db8::1]:1"},
	} {
		c, err := configs.Parse("f.yaml", []byte(strings.Replace(appliance, "kind: https", "kind: https\n    inner_tls: {url: \""+url+"\"}", 1)),
			nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.(*configs.Appliance).Transports[0]; got.InnerTLS.URL != want[0] || len(got.Addresses) != 1 || got.Addresses[0] != want[1] {
			t.Errorf("%s: %+v %q", url, got.InnerTLS, got.Addresses)
		}
	}
	c, err := configs.Parse("f.yaml", []byte(appliance), nil)
	if err != nil || c.(*configs.Appliance).Transports[0].InnerTLS != nil {
		t.Errorf("allowed by nobody: %v", err)
	}
}
