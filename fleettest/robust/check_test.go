// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

const me = "spiffe://acme.example/operator/ann"

// at makes a call that began and ended at these moments.
func at(call, ret int64, o op) op {
	o.Call, o.Return = call, ret
	if o.Outcome == "" {
		o.Outcome = done
	}
	if o.Fault != "" {
		o.Outcome = refused
	}
	if o.Kind != opList && o.Kind != opGet && o.Request == "" {
		o.Request = "r"
	}
	return o
}

func g(o op) op { o.Key = groupPrefix + "1"; return o }
func c(o op) op { o.Key = counterPrefix + "1"; return o }

var (
	found  = g(op{Kind: opFound})
	create = g(op{Kind: opCreate, Name: 0})
	enlist = c(op{Kind: opEnlist})
)

func write(v string) op              { return g(op{Kind: opBan, Value: v}) }
func list(r ...string) op            { o := g(op{Kind: opList}); copy(o.Group[:], r); return o }
func add(n uint64) op                { return c(op{Kind: opAsk, Value: "a", Add: n}) }
func get(n uint64) op                { return c(op{Kind: opGet, Value: "a", Sent: n}) }
func ended(o op, how string) op      { o.Outcome = how; return o }
func told(o op, k string) op         { o.Fault = k; return o }
func other(o op) op                  { o.Name = 1; return o }
func after(first []op, o ...op) []op { return append(append([]op{}, first...), o...) }

// TestLinearizable gives the checker good and bad histories.
func TestLinearizable(t *testing.T) {
	ready := []op{at(0, 1, found), at(2, 3, create)}
	counted := []op{at(0, 1, enlist)}
	for _, tc := range []struct {
		name string
		ops  []op
		ok   bool
	}{
		{"nothing", nil, true},
		{"a write is read", after(ready, at(4, 5, write("x")), at(6, 7, list("x", absent, absent))), true},
		{"a read during a write may see either",
			after(ready, at(4, 9, write("x")), at(5, 6, list("", absent, absent)), at(7, 8, list("x", absent, absent))), true},
		{"a stale read", after(ready, at(4, 5, write("x")), at(6, 7, list("", absent, absent))), false},
		{"a read goes back", after(ready, at(4, 9, write("x")), at(5, 6, list("x", absent, absent)), at(7, 8, list("", absent, absent))), false},
		{"an acknowledged write is lost", after(ready, at(4, 5, write("x")), at(6, 7, write("y")), at(8, 9, list("x", absent, absent))), false},
		{"a torn read",
			after(ready, at(4, 5, other(create)), at(6, 7, write("x")), at(8, 9, other(write("y"))), at(10, 11, list("", "y", absent))), false},
		{"a value from nowhere", after(ready, at(4, 5, list("z", absent, absent))), false},
		{"two create the same, and both are told that they did", after(ready, at(4, 5, create)), false},
		{"two create the same, and one is refused", after(ready, at(4, 5, told(create, conflict))), true},
		{"refused before it was there", []op{at(0, 1, found), at(2, 3, told(create, conflict)), at(4, 5, create)}, false},
		{"of unknown end, and it happened late",
			after(ready, at(4, 5, ended(write("x"), unknown)), at(6, 7, list("", absent, absent)), at(8, 9, list("x", absent, absent))), true},
		{"of unknown end, and it never happened", after(ready, at(4, 5, ended(write("x"), unknown)), at(6, 7, list("", absent, absent))), true},
		{"of unknown end, and it happened and was taken back",
			after(ready, at(4, 5, ended(write("x"), unknown)), at(6, 7, list("x", absent, absent)), at(8, 9, list("", absent, absent))), false},
		{"it did not happen, and it did", after(ready, at(4, 5, ended(write("x"), undone)), at(6, 7, list("x", absent, absent))), false},
		{"a count", after(counted, at(2, 3, add(2)), at(4, 5, add(1)), at(6, 7, get(3))), true},
		{"a change applied twice", after(counted, at(2, 3, add(2)), at(4, 5, add(1)), at(6, 7, get(5))), false},
		{"a retry applied twice, of unknown end", after(counted, at(2, 3, ended(add(2), unknown)), at(4, 5, get(4))), false},
		{"an addition lost", after(counted, at(2, 3, add(2)), at(4, 5, add(1)), at(6, 7, get(2))), false},
		{"a new id begins at zero",
			after(counted, at(2, 3, add(2)), at(4, 5, c(op{Kind: opAsk, Value: "b", Add: 1})), at(6, 7, told(get(0), notFound))), true},
		{"no such probe, and there is", after(counted, at(2, 3, add(2)), at(4, 5, told(get(0), notFound))), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := linearizable(t.Context(), tc.ops, []act{{"kill of cp-1", 2, 5}}, time.Minute)
			if want, got := tc.ok, v.bad == ""; want != got {
				t.Fatalf("want %v, got %v: %s %s", want, got, v.bad, v.why)
			}
			if tc.ok {
				return
			}
			file := filepath.Join(t.TempDir(), "l.html")
			if err := v.picture(file); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(file); err != nil || !strings.Contains(string(b), "kill of cp-1") {
				t.Errorf("the picture does not show the fault: %v", err)
			}
		})
	}
}

// entry is a change as it stands in the log.
func entry(request string, k fault.Kind, kind, body string) audit.Entry {
	return audit.Entry{At: time.Unix(1, 0), By: me, Request: fleet.RequestID(request), Kind: kind, Fault: k, Body: json.RawMessage(body)}
}

func asked(call, ret int64, request, outcome, k string) op {
	return op{Kind: opAsk, Key: "c-1", Request: request, Call: call, Return: ret, Outcome: outcome, Fault: k}
}

// breached compares what was found with what was to be found, by a word of it.
func breached(t *testing.T, want string, got []string) {
	t.Helper()
	if want == "" && len(got) > 0 || want != "" && (len(got) == 0 || !strings.Contains(got[0], want)) {
		t.Errorf("want %q, got %q", want, got)
	}
}

// TestChecksOfWrites gives a log, and what clients were told.
func TestChecksOfWrites(t *testing.T) {
	log := func(ids ...string) (out []audit.Entry) {
		for _, id := range ids {
			out = append(out, entry(id, "", "probe.send/1", `{}`))
		}
		return out
	}
	for _, tc := range []struct {
		name    string
		ops     []op
		entries []audit.Entry
		want    string
	}{
		{"as it was answered", []op{asked(0, 1, "a", done, ""), asked(2, 3, "b", done, "")}, log("a", "b"), ""},
		{"at the same time, in either order", []op{asked(0, 3, "a", done, ""), asked(1, 2, "b", done, "")}, log("b", "a"), ""},
		{"lost", []op{asked(0, 1, "a", done, ""), asked(2, 3, "b", done, "")}, log("a"), "lost"},
		{"a refusal is lost", []op{asked(0, 1, "a", refused, "conflict")}, nil, "lost"},
		{"twice", []op{asked(0, 1, "a", done, "")}, log("a", "a"), "twice"},
		{"twice, and nobody was told", []op{asked(0, 1, "a", unknown, "unsure")}, log("a", "a"), "twice"},
		{"of unknown end, and not there", []op{asked(0, 1, "a", unknown, "unsure")}, nil, ""},
		{"it did not happen, and it did", []op{asked(0, 1, "a", undone, "unavailable")}, log("a"), "did not happen"},
		{"it did not happen", []op{asked(0, 1, "a", undone, "unavailable")}, nil, ""},
		{"answered otherwise", []op{asked(0, 1, "a", done, "")}, []audit.Entry{entry("a", fault.Conflict, "probe.send/1", `{}`)}, "was answered"},
		{"out of order", []op{asked(0, 1, "a", done, ""), asked(2, 3, "b", done, "")}, log("b", "a"), "out of order"},
		{"out of order, with others between", []op{asked(0, 9, "x", done, ""), asked(0, 1, "a", done, ""), asked(2, 3, "b", done, ""),
			asked(0, 9, "y", done, "")}, log("b", "x", "y", "a"), "out of order"},
	} {
		t.Run(tc.name, func(t *testing.T) { breached(t, tc.want, checkWrites(me, tc.ops, tc.entries)) })
	}
}

// TestChecksOfLooks gives what nodes showed of a log of three entries.
func TestChecksOfLooks(t *testing.T) {
	var log audit.Log
	var entries []audit.Entry
	roots := []string{}
	for i := range 4 {
		root := log.Root()
		roots = append(roots, hex.EncodeToString(root[:]))
		if i < 3 {
			e := entry(string(rune('a'+i)), "", "probe.send/1", `{}`)
			log, entries = log.Append(e), append(entries, e)
		}
	}
	see := func(call, ret int64, node string, size int64, root int) look {
		return look{Node: node, Call: call, Return: ret, Size: size, Root: roots[root]}
	}
	for _, tc := range []struct {
		name  string
		looks []look
		ops   []op
		want  string
	}{
		{"it grows", []look{see(0, 1, "cp-1", 1, 1), see(2, 3, "cp-2", 3, 3)}, nil, ""},
		{"at the same time", []look{see(0, 5, "cp-1", 3, 3), see(1, 4, "cp-2", 1, 1)}, nil, ""},
		{"another root", []look{see(0, 1, "cp-1", 2, 1)}, nil, "roots differ"},
		{"longer than it ever was", []look{{Node: "cp-1", Call: 0, Return: 1, Size: 4, Root: roots[3]}}, nil, "at the end there are 3"},
		{"a node goes back", []look{see(0, 1, "cp-1", 3, 3), see(2, 3, "cp-2", 2, 2)}, nil, "stale"},
		{"less than what was answered", []look{see(2, 3, "cp-2", 1, 1)}, []op{asked(0, 1, "b", done, "")}, "stale"},
		{"what is answered meanwhile need not show", []look{see(0, 3, "cp-2", 1, 1)}, []op{asked(0, 1, "b", done, "")}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) { breached(t, tc.want, checkLooks(me, tc.looks, tc.ops, log, entries)) })
	}
}

// TestChecksOfTerms gives the logs of nodes.
func TestChecksOfTerms(t *testing.T) {
	won := func(term string) string {
		return `time=x level=DEBUG msg="raft: election won: term=` + term + ` tally=2"` + "\n"
	}
	for _, tc := range []struct {
		name  string
		logs  map[string]string
		terms int
		want  string
	}{
		{"one each", map[string]string{"cp-1": won("2") + won("4"), "cp-2": "other\n" + won("3")}, 3, ""},
		{"two in one", map[string]string{"cp-1": won("2") + won("4"), "cp-2": won("4")}, 2, "two leaders in term 4"},
		{"twice the same node", map[string]string{"cp-1": won("2") + won("2")}, 1, "two leaders in term 2"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			logs := map[string]io.Reader{}
			for n, s := range tc.logs {
				logs[n] = strings.NewReader(s)
			}
			terms, bad := checkTerms(logs)
			if terms != tc.terms {
				t.Errorf("want %d terms, got %d", tc.terms, terms)
			}
			breached(t, tc.want, bad)
		})
	}
}

// TestChecksOfBans gives what a log says of an appliance around its ban.
func TestChecksOfBans(t *testing.T) {
	on, off := `{"name":"eu-2","online":true}`, `{"name":"eu-2","online":false}`
	ban := entry("b", "", "appliance.ban/1", `{"name":"eu-2"}`)
	for _, tc := range []struct {
		name    string
		entries []audit.Entry
		want    string
	}{
		{"online, banned, offline", []audit.Entry{entry("a", "", "appliance.edge/1", on), ban, entry("c", "", "appliance.edge/1", off)}, ""},
		{"another comes", []audit.Entry{ban, entry("c", "", "appliance.edge/1", `{"name":"eu-1","online":true}`)}, ""},
		{"it comes, and is refused", []audit.Entry{ban, entry("c", fault.Denied, "appliance.edge/1", on)}, ""},
		{"it comes", []audit.Entry{ban, entry("c", "", "appliance.edge/1", on)}, "lets it in"},
		{"it is given a certificate", []audit.Entry{ban, entry("c", "", "appliance.enrol/2", `{"name":"eu-2"}`)}, "lets it in"},
		{"it was never banned", []audit.Entry{entry("a", "", "appliance.edge/1", on)}, "no ban"},
	} {
		t.Run(tc.name, func(t *testing.T) { breached(t, tc.want, checkBan(tc.entries, "eu-2")) })
	}
}

// TestChecksOfTheRoster gives what a log says of nodes that come and go.
func TestChecksOfTheRoster(t *testing.T) {
	log := func(lines ...string) (out []audit.Entry) { // "kind fault body"
		for i, l := range lines {
			f := strings.SplitN(l, " ", 3)
			out = append(out, entry(string(rune('a'+i)), fault.Kind(strings.TrimPrefix(f[1], "-")), f[0], f[2]))
		}
		return out
	}
	add, is, gone := `node.add/1 - {"name":"cp-4"}`, `node.is/1 - {"name":"cp-4"}`, `node.remove/1 - {"name":"cp-4"}`
	vote := `node.changed/1 - {"do":"promote","name":"cp-4"}`
	for _, tc := range []struct {
		name    string
		entries []audit.Entry
		told    []change
		want    string
	}{
		{"it comes, votes and goes", log(add, is, vote, gone),
			[]change{{Do: "add", Name: "cp-4"}, {Do: "promote", Name: "cp-4"}, {Do: "remove", Name: "cp-4"}}, ""},
		{"another takes its place", log(gone, `node.add/1 - {"name":"cp-5"}`), []change{{Do: "replace", Name: "cp-4"}, {Do: "add", Name: "cp-5"}},
			""},
		{"it was done, and nobody was told", log(add, vote), nil, ""},
		{"it was removed, and speaks", log(add, gone, is), nil, "was removed by entry 1, and entry 2 takes it back"},
		{"it was removed, and is added", log(gone, add), nil, "takes it back"},
		{"it was removed, and is refused", log(gone, strings.Replace(is, "-", "denied", 1)), nil, ""},
		{"told, and not there", log(add), []change{{Do: "promote", Name: "cp-4"}}, "the log does not hold it"},
		{"replaced, and not there", log(add), []change{{Do: "replace", Name: "cp-1"}}, "the log does not hold it"},
		{"told twice, and there once", log(add, vote), []change{{Do: "promote", Name: "cp-4"}, {Do: "promote", Name: "cp-4"}},
			"the log does not hold it"},
		{"refused, and told", log(strings.Replace(add, "-", "denied", 1)), []change{{Do: "add", Name: "cp-4"}}, "the log does not hold it"},
		{"leadership went to whom it could", log(`node.changed/1 - {"do":"transfer","name":""}`), []change{{Do: "transfer", Name: "cp-2"}}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) { breached(t, tc.want, checkRoster(tc.entries, tc.told)) })
	}
}

// TestChecksOfMembers gives what a node says of the members at the end.
func TestChecksOfMembers(t *testing.T) {
	want := map[string]string{"cp-1": "removed", "cp-2": "voter", "cp-4": "voter"}
	for name, tc := range map[string]struct{ out, want string }{
		"as it should be":  {`{"members":[{"name":"cp-2","role":"voter"},{"name":"cp-4","role":"voter"}],"removed":["cp-1"]}`, ""},
		"it does not vote": {`{"members":[{"name":"cp-2","role":"voter"},{"name":"cp-4","role":"non-voter"}],"removed":["cp-1"]}`, "cp-4 is"},
		"it is not there":  {`{"members":[{"name":"cp-2","role":"voter"}],"removed":["cp-1"]}`, "cp-4 is"},
		"it is not removed": {`{"members":[{"name":"cp-1","role":"voter"},{"name":"cp-2","role":"voter"},{"name":"cp-4","role":"voter"}]}`,
			"cp-1 is"},
		"removed and member": {
			`{"members":[{"name":"cp-1","role":"voter"},{"name":"cp-2","role":"voter"},{"name":"cp-4","role":"voter"}],"removed":["cp-1"]}`,
			"and is a member"},
		"one too many": {
			`{"members":[{"name":"cp-2","role":"voter"},{"name":"cp-4","role":"voter"},{"name":"cp-9","role":"voter"}],"removed":["cp-1"]}`,
			"cp-9 is a voter"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := checkMembers([]byte(tc.out), want)
			if err != nil || tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
				t.Errorf("want %q, got %q, %v", tc.want, got, err)
			}
		})
	}
}
