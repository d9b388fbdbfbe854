// SPDX-License-Identifier: Apache-2.0

package runbooks

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// register has the operator register an appliance.
func (w *world) register(name string) {
	w.t.Helper()
	w.run("demarc appliance add " + name + " --customer globex --expect " + name + ".json\n")
}

// comes starts an appliance that knows every node, also those that are still to come, and waits until it is online.
func (w *world) comes(name string) {
	w.t.Helper()
	w.startAppliance(name, slices.Clone(w.all)...)
	w.online(name, "")
}

// echoes sends an appliance some probes ("NAME COUNT") and waits for the echoes. By the customer's book, none of all that were ever sent is
// lost and none came twice.
func (w *world) echoes(what string) {
	w.t.Helper()
	var name string
	var count int
	if _, err := fmt.Sscanf(what, "%s %d", &name, &count); err != nil {
		w.t.Fatalf("%q: %v", what, err)
	}
	w.run(fmt.Sprintf("demarc probe --appliance %s --count %d --rate 50 --watch --timeout 120s\n", name, count))
	w.sent[name] += count
	var doc struct {
		Seen int `json:"probes_seen"`
	}
	out, err := w.shell("demarc local status --output json --socket acme/" + name + "/a.sock\n")
	if err == nil {
		err = json.Unmarshal([]byte(out), &doc)
	}
	if err != nil || doc.Seen != w.sent[name] {
		w.t.Fatalf("%s saw %d probes, and %d were sent: %v %s", name, doc.Seen, w.sent[name], err, out)
	}
}

// since does what a snapshot then does not have: orders that are acknowledged, and an appliance that is registered and enrols.
func (w *world) since(name string) {
	w.t.Helper()
	w.echoes(name + " 25")
	w.comes("eu-2")
	w.echoes("eu-2 5")
}

// lost looks into the evidence of both sides for what they say is lost, and has it verified together. FAULTS.md I3.
func (w *world) lost(name string) {
	w.t.Helper()
	theirs := name + ".json.evidence"
	w.run("demarc local evidence --socket acme/" + name + "/a.sock --out " + theirs + "\n")
	for file, want := range map[string]string{"evidence.json": "appliance.meet/1", theirs: "vendor.epoch/1"} {
		b, err := os.ReadFile(filepath.Join(w.dir, file))
		if err != nil {
			w.t.Fatal(err)
		}
		if !strings.Contains(string(b), want) || !strings.Contains(string(b), `\"lost\":{\"orders\":{\"from\":`) {
			w.t.Errorf("%s does not say which orders are lost", file)
		}
	}
	pins := " --pin acme.example/control-plane=acme/log.pub"
	for _, one := range []string{name, "eu-2"} {
		pins += " --pin acme.example/appliance/" + one + "=acme/" + one + "/data/log.pub"
	}
	out, err := w.shell("demarc verify evidence.json " + theirs + pins + "\n")
	if err != nil || !strings.Contains(out, "HISTORY RESTARTED (restore") {
		w.t.Errorf("verify: %v\n%s", err, out)
	}
	w.t.Log(out)
}

// redo does again what the snapshot did not have: the appliance that was registered since comes back as who it was.
func (w *world) redo(name string) {
	w.t.Helper()
	w.register("eu-2")
	w.run("systemctl stop demarcd@eu-2\nsystemctl start demarcd@eu-2\n") // it would ask within 10 minutes by itself
	w.online("eu-2", "")
	w.echoes("eu-2 10")
	w.echoes(name + " 10")
}

// wake starts nodes that have the forgotten history, and a majority in it. They end by themselves, as removed ones, and what was done since
// is still there. FAULTS.md I3.
func (w *world) wake(nodes ...string) {
	w.t.Helper()
	name := "after-" + nodes[0]
	w.run("demarc customer add " + name + "\n")
	for _, n := range nodes {
		w.run("systemctl start demarcd@" + n + "\n")
	}
	for _, n := range nodes {
		w.gone(n)
	}
	if out, err := w.shell("demarc customer add " + name + "\n"); err == nil || !strings.Contains(out, "registered already") {
		w.t.Fatalf("customer %s: %v %s", name, err, out)
	}
}
