// SPDX-License-Identifier: Apache-2.0

package runbooks

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// power kills these nodes, all of them before any is started again.
func (w *world) power(nodes string) {
	w.t.Helper()
	for _, do := range []string{"kill", "start"} {
		for n := range strings.FieldsSeq(nodes) {
			w.run("systemctl " + do + " demarcd@" + n + "\n")
		}
	}
}

// holds waits until each node holds so many key-encryption keys. With one, no node may need another.
func (w *world) holds(want string) {
	w.t.Helper()
	var got string
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		out, err := w.shell("demarc control-plane kek status --output json\n")
		if got = out; err != nil {
			continue
		}
		var doc struct {
			Nodes     []struct{ Keys []string }
			Unsettled []string
		}
		if err := json.Unmarshal([]byte(out), &doc); err != nil {
			w.t.Fatalf("%v: %s", err, out)
		}
		short := len(doc.Nodes) == 0 || want == "1" && len(doc.Unsettled) > 0
		for _, n := range doc.Nodes {
			short = short || fmt.Sprint(len(n.Keys)) != want
		}
		if !short {
			return
		}
	}
	w.t.Fatalf("the nodes do not hold %s keys each: %s", want, got)
}
