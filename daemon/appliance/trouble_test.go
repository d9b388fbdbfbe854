// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/mesh"
)

// TestWhichTroublesTheVendorHears: what needs a human at once, what may pass after a minute, each kind and reason once, and never more
// than a vendor takes.
func TestWhichTroublesTheVendorHears(t *testing.T) {
	roads := []configs.Transport{{Name: "a", Kind: configs.HTTPS}, {Name: "b", Kind: configs.HTTPS}, {Name: "c", Kind: configs.Tailscale}}
	away := fault.New("x", fault.Unavailable, "no answer from 10.1.2.3")
	refused := mesh.For(mesh.TailnetKey, fault.New("x", fault.Denied, "it says %q", "s3cret"))
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var s sickness
	for i, x := range []struct {
		after time.Duration
		last  map[string]error
		want  []Trouble
	}{
		{0, nil, nil},
		{0, map[string]error{"a": away}, nil},
		{59 * time.Second, map[string]error{"a": away, "b": away, "c": refused}, []Trouble{{configs.Tailscale, mesh.TailnetKey}}},
		{time.Second, map[string]error{"a": away, "b": away}, []Trouble{{configs.HTTPS, mesh.Unreached}}},
		{time.Minute, map[string]error{"a": away, "b": away}, []Trouble{{configs.HTTPS, mesh.Unreached}}}, // once
		{0, nil, nil},
		{time.Second, map[string]error{"a": io.EOF}, nil}, // it begins anew
	} {
		at = at.Add(x.after)
		if got := s.look(roads, func(name string) error { return x.last[name] }, at); !slices.Equal(got, x.want) {
			t.Errorf("%d: %v, want %v", i, got, x.want)
		}
	}
	var many []configs.Transport
	for _, r := range mesh.Reasons() {
		for _, k := range []string{"1", "2", "3", "4", "5"} {
			many = append(many, configs.Transport{Name: string(r), Kind: k})
		}
	}
	if got := s.look(many, func(name string) error { return mesh.For(mesh.Reason(name), away) }, at.Add(time.Hour)); len(got) > maxTroubles {
		t.Errorf("%d troubles", len(got))
	}
	if w := way("c", configs.Tailscale, false, refused); w.GetReason() != "tailnet_key" || w.GetSaid() != `it says "s3cret"` || w.GetDo() == "" {
		t.Errorf("%v", w)
	}
	if w := way("c", configs.Tailscale, true, refused); w.GetReason() != "" {
		t.Errorf("a road in use has trouble: %v", w)
	}
	r := Report{At: at, Status: &Status{Roads: []Trouble{{configs.Tailscale, mesh.TailnetKey}}}}.toWire(1).GetStatus().GetRoads()
	if len(r) != 1 || r[0].GetKind() != "tailscale" || r[0].GetReason() != "tailnet_key" {
		t.Errorf("%v", r)
	}
}

// TestARoadWithoutMLKEMIsTold: a road that is in use in the small form of TLS says so on both sides, at once (FAULTS.md F1).
func TestARoadWithoutMLKEMIsTold(t *testing.T) {
	small := mesh.For(mesh.HelloTooLarge, errors.New("a box on the path"))
	w := way("a", configs.HTTPS, true, small)
	if w.GetReason() != "hello_too_large" || !w.GetInUse() || w.GetDo() == "" {
		t.Errorf("the customer is told %v", w)
	}
	var s sickness
	got := s.look([]configs.Transport{{Name: "a", Kind: configs.HTTPS}}, func(string) error { return small }, time.Now())
	if want := []Trouble{{configs.HTTPS, "hello_too_large"}}; !slices.Equal(got, want) {
		t.Errorf("the vendor is told %v, want %v", got, want)
	}
}
