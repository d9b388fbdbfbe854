// SPDX-License-Identifier: Apache-2.0

package roads

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"
)

// TestRefusedTailnet: the tailnet refuses the key that the appliance shows. The appliance is there over its other road, its own status
// tells the customer why and what helps, the vendor is told the kind and the reason and nothing else, and a new file serves without a
// restart.
func TestRefusedTailnet(t *testing.T) {
	needs(t)
	bin := programs(t)
	dir, err := os.MkdirTemp("", "dmroads")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	w, err := newWorld(len(faults) + 2)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := w.close(); err != nil {
			t.Error(err)
		}
	}()
	p := &pair{net: &w.topology, bin: bin, dir: dir}
	defer func() {
		if err := p.close(); err != nil {
			t.Error(err)
		}
	}()
	if err := p.beginTailnet(ctx, w, "spent", "https"); err != nil {
		t.Fatal(err)
	}
	type road struct {
		Kind, Reason, Said, Do string
		InUse                  bool `json:"in_use"`
	}
	var local struct{ Ways []road }
	var vendor struct{ Roads []map[string]string }
	told := func(vendors bool) bool {
		local.Ways, vendor.Roads = nil, nil
		out, err := p.customer(ctx, "local", "status", "--output", "json").Output()
		if err != nil || json.Unmarshal(out, &local) != nil || len(local.Ways) != 2 {
			return false
		}
		out, err = p.vendor(ctx, "appliance", "show", appliance, "--output", "json").Output()
		return err == nil && json.Unmarshal(out, &vendor) == nil && (len(vendor.Roads) > 0) == vendors
	}
	if err := until(ctx, 30*time.Second, "both sides are told", func() bool { return told(true) }); err != nil {
		t.Fatalf("%v: %+v, %+v", err, local, vendor)
	}
	if r := local.Ways[0]; r.Kind != "tailscale" || r.Reason != "tailnet_key" || !strings.Contains(r.Said, "invalid authkey") ||
		!strings.Contains(r.Do, "without a restart") || r.InUse {
		t.Errorf("the customer is told %+v", r)
	}
	if r := local.Ways[1]; r.Reason != "" || !r.InUse {
		t.Errorf("of the road in use the customer is told %+v", r)
	}
	if len(vendor.Roads) != 1 || len(vendor.Roads[0]) != 2 || vendor.Roads[0]["kind"] != "tailscale" ||
		vendor.Roads[0]["reason"] != "tailnet_key" {
		t.Errorf("the vendor is told %v", vendor.Roads)
	}
	for text, want := range map[string][]string{
		words(p.customer(ctx, "local", "status")):            {"tailscale does not work (tailnet_key)", "invalid authkey", "make a new key"},
		words(p.vendor(ctx, "appliance", "show", appliance)): {"does not work (tailnet_key)", "refuses the credentials", "make a new key"},
	} {
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("%q is not in %s", w, text)
			}
		}
	}
	if err := p.write(w.tailnet.AuthKey, "customer", "tailnet.key"); err != nil {
		t.Fatal(err)
	}
	if out, err := p.customer(ctx, "transport", "use", "tailscale").CombinedOutput(); err != nil {
		t.Fatalf("with the new file: %v: %s", err, out)
	}
	if err := p.seen(ctx, "tailscale", 20*time.Second); err != nil {
		t.Fatal(err)
	}
	if err := until(ctx, 20*time.Second, "nobody is told of trouble any more", func() bool {
		return told(false) && local.Ways[0].InUse && local.Ways[0].Reason == ""
	}); err != nil {
		t.Errorf("%v: %+v, %+v", err, local, vendor)
	}
}
