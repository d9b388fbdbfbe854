// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"cmp"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
)

// record is a change as the audit log holds it.
type record struct {
	at    int64
	entry audit.Entry
}

// records indexes a log by request id. A request that has two entries was applied twice.
func records(entries []audit.Entry) (map[string]record, []string) {
	out := map[string]record{}
	var bad []string
	for i, e := range entries {
		id := string(e.By) + " " + string(e.Request)
		if first, twice := out[id]; twice {
			bad = append(bad, fmt.Sprintf("request %s of %s was applied twice: entries %d and %d of the log", e.Request, e.By, first.at, i))
			continue
		}
		out[id] = record{int64(i), e}
	}
	return out, bad
}

// checkWrites compares what clients were told with the log: nothing that was answered is missing or other than answered, nothing
// happened that a node said did not, nothing twice, and the order is one that the clients' own times allow.
func checkWrites(by string, ops []op, entries []audit.Entry) []string {
	have, bad := records(entries)
	type placed struct {
		op
		at int64
	}
	var order []placed
	for _, o := range ops {
		if !o.writes() {
			continue
		}
		e, ok := have[by+" "+o.Request]
		switch {
		case !ok && (o.Outcome == done || o.Outcome == refused):
			bad = append(bad,
				fmt.Sprintf("lost: %s %s (request %s) was answered by node %s, and the log does not hold it", o.Kind, o.Key, o.Request, o.Node))
		case ok && o.Outcome == undone:
			bad = append(bad, fmt.Sprintf("every node said that %s %s (request %s) did not happen (%s), and it is entry %d of the log", o.Kind,
				o.Key, o.Request, o.Detail, e.at))
		case !ok || o.Outcome == unknown:
		case string(e.entry.Fault) != o.Fault:
			bad = append(bad, fmt.Sprintf("%s %s (request %s) was answered %q, and entry %d of the log says %q", o.Kind, o.Key, o.Request, o.Fault,
				e.at, e.entry.Fault))
		default:
			order = append(order, placed{o, e.at})
		}
	}
	slices.SortFunc(order, func(a, b placed) int { return cmp.Compare(a.at, b.at) })
	var latest placed // of those earlier in the log, the one that was begun last
	for _, p := range order {
		if latest.Request != "" && p.Return < latest.Call {
			bad = append(bad,
				fmt.Sprintf("out of order: request %s was answered before %s was made, and comes after it in the log", p.Request, latest.Request))
			break
		}
		if p.Call > latest.Call || latest.Request == "" {
			latest = p
		}
	}
	return bad
}

// checkLooks compares what the nodes said of the log while the run went on with the log as it is at the end: equal sizes have equal
// roots, and nobody was shown less than what had been answered before he asked.
func checkLooks(by string, looks []look, ops []op, log audit.Log, entries []audit.Entry) []string {
	var bad []string
	have, _ := records(entries)
	type known struct{ at, size int64 }
	var past []known // from this moment on, the log is at least so long
	for _, l := range looks {
		past = append(past, known{l.Return, l.Size})
		root, err := log.RootAt(l.Size)
		if err != nil {
			bad = append(bad, fmt.Sprintf("node %s showed a log of %d entries, and at the end there are %d", l.Node, l.Size, log.Size()))
		} else if hex.EncodeToString(root[:]) != l.Root {
			bad = append(bad, fmt.Sprintf("the audit roots differ: node %s showed %.16s for %d entries, and the log at the end gives %.16s", l.Node,
				l.Root, l.Size, hex.EncodeToString(root[:])))
		}
	}
	for _, o := range ops {
		if e, ok := have[by+" "+o.Request]; ok && o.writes() && (o.Outcome == done || o.Outcome == refused) {
			past = append(past, known{o.Return, e.at + 1})
		}
	}
	slices.SortFunc(past, func(a, b known) int { return cmp.Compare(a.at, b.at) })
	sorted := slices.SortedFunc(slices.Values(looks), func(a, b look) int { return cmp.Compare(a.Call, b.Call) })
	var least int64
	for _, l := range sorted {
		for len(past) > 0 && past[0].at < l.Call {
			least, past = max(least, past[0].size), past[1:]
		}
		if l.Size < least {
			bad = append(bad, fmt.Sprintf("stale: node %s showed a log of %d entries after %d were known", l.Node, l.Size, least))
		}
	}
	return bad
}

var wonLine = regexp.MustCompile(`election won: term=(\d+)`)

// checkTerms reads the logs of all nodes, by name: in each term one of them won.
func checkTerms(logs map[string]io.Reader) (terms int, bad []string) {
	winner := map[string]string{}
	for _, node := range slices.Sorted(maps.Keys(logs)) {
		s := bufio.NewScanner(logs[node])
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			m := wonLine.FindStringSubmatch(s.Text())
			if m == nil {
				continue
			}
			if w := winner[m[1]]; w != "" {
				bad = append(bad, fmt.Sprintf("two leaders in term %s: %s and %s", m[1], w, node))
			}
			winner[m[1]] = node
		}
		if err := s.Err(); err != nil {
			bad = append(bad, fmt.Sprintf("the log of %s can't be read: %v", node, err))
		}
	}
	return len(winner), bad
}

// checkBan looks for anything that a banned appliance was still granted after its ban.
func checkBan(entries []audit.Entry, name string) []string {
	var bad []string
	banned := int64(-1)
	for i, e := range entries {
		var body struct {
			Name   string `json:"name"`
			Online bool   `json:"online"`
		}
		if e.Fault != fault.Kind("") || json.Unmarshal(e.Body, &body) != nil || body.Name != name {
			continue
		}
		kind, _, _ := strings.Cut(e.Kind, "/")
		switch {
		case kind == "appliance.ban":
			banned = int64(i)
		case banned < 0:
		case kind == "appliance.edge" && body.Online, kind == "appliance.enrol", kind == "appliance.renew":
			bad = append(bad, fmt.Sprintf("appliance %s was banned by entry %d, and entry %d lets it in (%s)", name, banned, i, e.Kind))
		}
	}
	if banned < 0 {
		bad = append(bad, fmt.Sprintf("the log holds no ban of appliance %s", name))
	}
	return bad
}

// checkRoster follows who is a member by the log: no name comes back after it was removed, and each change of the members that was
// answered is on record.
func checkRoster(entries []audit.Entry, answered []change) []string {
	var bad []string
	removed, count := map[string]int{}, map[string]int{}
	for i, e := range entries {
		kind, _, _ := strings.Cut(e.Kind, "/")
		var body struct{ Do, Name string }
		if !strings.HasPrefix(kind, "node.") || e.Fault != fault.Kind("") || json.Unmarshal(e.Body, &body) != nil {
			continue
		}
		switch at, gone := removed[body.Name]; {
		case kind == "node.remove":
			removed[body.Name] = i
			count["remove "+body.Name]++
		case gone && (kind == "node.add" || kind == "node.is"):
			bad = append(bad, fmt.Sprintf("node %s was removed by entry %d, and entry %d takes it back (%s)", body.Name, at, i, e.Kind))
		case kind == "node.add":
			count["add "+body.Name]++
		case kind == "node.changed":
			count[body.Do+" "+body.Name]++
		}
	}
	for _, c := range answered {
		what := c.Do + " " + c.Name
		switch c.Do {
		case "transfer": // recorded with the name that was asked for, which may be none
			continue
		case "replace":
			what = "remove " + c.Name
		}
		if count[what]--; count[what] < 0 {
			bad = append(bad, fmt.Sprintf("the change of the members %q was answered, and the log does not hold it", what))
		}
	}
	return bad
}
