// SPDX-License-Identifier: Apache-2.0

package ingress_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	"pgregory.net/rapid"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ingress"
)

var update = flag.Bool("update", false, "write the plans of testdata anew")

type input struct {
	Posture fleet.Posture  `json:"posture"`
	Ports   []ingress.Port `json:"ports"`
	Site    ingress.Site   `json:"site"`
}

func TestCompileGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no testdata: %v", err)
	}
	for _, name := range files {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(name)
			if err != nil {
				t.Fatal(err)
			}
			var in input
			if err := json.Unmarshal(ar.Files[0].Data, &in); err != nil {
				t.Fatal(err)
			}
			got := compiled(t, in)
			slices.Reverse(in.Ports)
			if again := compiled(t, in); !bytes.Equal(got, again) {
				t.Errorf("another order of ports gives another plan:\n%s", again)
			}
			if *update {
				ar.Files = append(ar.Files[:1], txtar.File{Name: "plan.json", Data: got})
				if err := os.WriteFile(name, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if len(ar.Files) != 2 || !bytes.Equal(ar.Files[1].Data, got) {
				t.Errorf("plan differs from the golden one; got:\n%s", got)
			}
		})
	}
}

func compiled(t *testing.T, in input) []byte {
	t.Helper()
	plan, err := ingress.Compile(in.Posture, in.Ports, in.Site)
	if err != nil {
		return []byte("error " + string(fault.Of(err)) + ": " + fault.Text(err) + "\n")
	}
	b, err := json.MarshalIndent(plan, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return append(b, '\n')
}

// TestNeverWiderThanEither: whatever is asked, no source enters that the vendor's limit or the customer's posture keeps out.
func TestNeverWiderThanEither(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		posture := fleet.Posture{Exposure: rapid.SampledFrom(fleet.Exposures()).Draw(t, "posture")}
		if posture.Exposure == fleet.Allowlist {
			posture.Allow = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
		}
		port := ingress.Port{Name: "web", Protocol: rapid.SampledFrom([]string{ingress.HTTP, ingress.TCP}).Draw(t, "protocol"),
			Widest: rapid.SampledFrom(fleet.Exposures()).Draw(t, "widest"), Upstream: "127.0.0.1:80", HostAddr: ":443"}
		plan, err := ingress.Compile(posture, []ingress.Port{port},
			ingress.Site{Tailnet: rapid.Bool().Draw(t, "tailnet"), TLS: rapid.Bool().Draw(t, "tls")})
		if err != nil {
			t.Fatal(err)
		}
		if len(plan.Doors)+len(plan.Shut) != 1 {
			t.Fatalf("%d doors and %d shut for one port", len(plan.Doors), len(plan.Shut))
		}
		for _, d := range plan.Doors {
			narrow := posture.Exposure
			if port.Widest.Narrower(narrow) {
				narrow = port.Widest
			}
			switch narrow {
			case fleet.Closed:
				t.Fatal("a door where one side wants none")
			case fleet.Private:
				if d.Side != ingress.Tailnet {
					t.Fatal("a door on the host where one side wants the tailnet only")
				}
			case fleet.Allowlist:
				if !slices.Equal(d.From, posture.Allow) {
					t.Fatalf("from %v", d.From)
				}
			}
		}
	})
}

func TestPlanCheckRefuses(t *testing.T) {
	good := func() ingress.Plan {
		return ingress.Plan{Version: ingress.Version, Posture: fleet.Posture{Exposure: fleet.Public},
			Doors: []ingress.Door{{Name: "web", Side: ingress.Host,
				Addr: ":443", Protocol: ingress.HTTP, TLS: ingress.TLSNone, From: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")},
				To: "127.0.0.1:80"}}}
	}
	if err := good().Check(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*ingress.Plan){
		"version":           func(p *ingress.Plan) { p.Version = "demarc-doors/2" },
		"no source":         func(p *ingress.Plan) { p.Doors[0].From = nil },
		"unmasked source":   func(p *ingress.Plan) { p.Doors[0].From = []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")} },
		"side":              func(p *ingress.Plan) { p.Doors[0].Side = "" },
		"no address":        func(p *ingress.Plan) { p.Doors[0].Addr = "" },
		"name as address":   func(p *ingress.Plan) { p.Doors[0].Addr = "example.com:443" },
		"protocol":          func(p *ingress.Plan) { p.Doors[0].Protocol = "udp" },
		"tls":               func(p *ingress.Plan) { p.Doors[0].TLS = "maybe" },
		"tls on tcp":        func(p *ingress.Plan) { p.Doors[0].Protocol, p.Doors[0].TLS = ingress.TCP, ingress.TLSFiles },
		"upstream":          func(p *ingress.Plan) { p.Doors[0].To = ":80" },
		"same name":         func(p *ingress.Plan) { d := p.Doors[0]; d.Addr = ":444"; p.Doors = append(p.Doors, d) },
		"same place":        func(p *ingress.Plan) { d := p.Doors[0]; d.Name = "other"; p.Doors = append(p.Doors, d) },
		"door when closed":  func(p *ingress.Plan) { p.Posture.Exposure = fleet.Closed },
		"host when private": func(p *ingress.Plan) { p.Posture.Exposure = fleet.Private },
		"wider than list": func(p *ingress.Plan) {
			p.Posture = fleet.Posture{Exposure: fleet.Allowlist, Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}}
		},
		"too many": func(p *ingress.Plan) { p.Doors = make([]ingress.Door, ingress.MaxPorts+1) },
	} {
		p := good()
		spoil(&p)
		if err := p.Check(); fault.Of(err) != fault.Invalid {
			t.Errorf("%s: Check = %v, want invalid", name, err)
		}
	}
}
