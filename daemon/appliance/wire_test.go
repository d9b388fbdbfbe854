// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/mesh"
)

// texts are reasons and names whose cut is anywhere inside of a letter, that are no UTF-8, or have no end.
func texts() []string {
	out := []string{"", "\xff\xfe", strings.Repeat("\xf0\x9f", 3000), strings.Repeat("\u00e9", 1<<20)}
	for n := range 6 {
		for _, limit := range []int{64, 96, channel.MaxName, 1000, channel.MaxSentence} {
			out = append(out, strings.Repeat("x", limit-n)+strings.Repeat("\U0001F600", 40))
		}
	}
	return out
}

// TestEachReportCanBeEncoded: FAULTS.md C8. A reason was cut inside a letter, its report could not be encoded, and each channel
// ended at it.
func TestEachReportCanBeEncoded(t *testing.T) {
	for _, s := range texts() {
		status, why := &book.Status{}, fleet.Reason{Kind: fleet.ReasonKind(s), Service: s, Secret: s, Runs: fleet.Runs(s)}
		for range 1000 {
			status.Services = append(status.Services, book.ServiceHealth{Name: s, Why: why})
			status.Secrets = append(status.Secrets, book.Presence{Name: s})
			status.Transports = append(status.Transports, book.TransportFailure{Kind: s, Reason: mesh.Reason(s)})
		}
		for what, r := range map[string]book.Report{
			"deploy":    {Deploy: &book.Deploy{Release: "sha256:x", Version: s, State: "failed", Reason: s, Why: why}},
			"operation": {Operation: &book.OperationReport{ID: s, State: s, Why: why}},
			"probe":     {Probe: &book.ProbeIndex{ID: s}},
			"status":    {Status: status},
		} {
			m := reportToWire(r, 7)
			b, err := proto.Marshal(m)
			if err != nil {
				t.Fatalf("%s with %.20q: %v", what, s, err)
			}
			var got boundaryv1.Report
			if err := proto.Unmarshal(b, &got); err != nil || got.GetNumber() != 7 {
				t.Fatalf("%s: %v", what, err)
			}
			for _, x := range []*boundaryv1.Reason{got.GetDeploy().GetReason(), got.GetOperation().GetReason()} {
				if len(x.GetService()) > 63 || len(x.GetSecret()) > 63 {
					t.Errorf("%s: the names %q and %q", what, x.GetService(), x.GetSecret())
				}
			}
			for _, x := range []string{got.GetDeploy().GetVersion(), got.GetOperation().GetId(), got.GetProbe().GetId()} {
				if len(x) > channel.MaxName {
					t.Errorf("%s: a name of %d bytes", what, len(x))
				}
			}
			if n := got.GetStatus(); len(n.GetServices()) > channel.MaxServices || len(n.GetSecrets()) > channel.MaxSecrets ||
				len(n.GetRoads()) > channel.MaxTroubles {
				t.Errorf("%s: more than the vendor takes", what)
			}
		}
	}
}

// TestAReportThatCantBeSentBlocksNobody: FAULTS.md C8. Whatever is wrong with one report, the next one is heard.
func TestAReportThatCantBeSentBlocksNobody(t *testing.T) {
	a := &Appliance{log: slog.New(slog.DiscardHandler)}
	for what, r := range map[string]*boundaryv1.Report{
		"no UTF-8": {Number: 3, Body: &boundaryv1.Report_Deploy{Deploy: &boundaryv1.DeployReport{Version: "\xff"}}},
		"too long": {Number: 3, Body: &boundaryv1.Report_Cosigned{Cosigned: make([]byte, channel.MaxUp)}},
	} {
		var wire bytes.Buffer
		if err := channel.Write(&wire, a.sendable(r), channel.MaxUp); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		var up boundaryv1.Up
		if err := channel.Read(&wire, &up, channel.MaxUp); err != nil || up.GetReport().GetNumber() != 3 || up.GetReport().GetBody() == nil {
			t.Fatalf("%s: %v, %v", what, &up, err)
		}
	}
	good := book.Report{At: time.Unix(1, 0), Probe: &book.ProbeIndex{ID: "p", Index: 4}}
	if p := a.sendable(reportToWire(good, 3)).GetReport().GetProbe(); p.GetId() != "p" || p.GetIndex() != 4 {
		t.Errorf("a good report became %v", p)
	}
}
