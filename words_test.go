// SPDX-License-Identifier: Apache-2.0

package demarc_test

import (
	"bytes"
	"fmt"
	"go/scanner"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// retired is a word that the field has another one for. How often it is still there, by area, is in testdata/words.txt.
type retired struct {
	word string // lower case, or a name for the pattern
	in   place
	use  string // instead
	why  string
	only []string       // areas that it is retired in; none: everywhere
	like *regexp.Regexp // prose only: what is looked for
}

type place int

const (
	anywhere place = iota // each word of the text, the parts of identifiers among them, and file names
	names                 // parts of Go and protobuf identifiers, and file names
	prose                 // comments and pages, with line ends as blanks
	docs                  // the first line of a doc comment
)

var words = []retired{
	{word: "road", use: "transport", why: "one thing had four names: road, way, route, transport"},
	{word: "roads", use: "transports", why: "one thing had four names: road, way, route, transport"},
	{word: "ways", in: names, use: "transports", why: "one thing had four names: road, way, route, transport"},
	{word: "door", in: names, use: "listener, endpoint", why: "a door is an ingress listener for end users, and nothing else",
		only: []string{"daemon/controlplane", "daemon/management", "mesh", "api"}},
	{word: "kept", in: names, use: "stored, signedBundle, caCache", why: "say what is stored",
		only: []string{"daemon/controlplane", "daemon/appliance", "raft", "api"}},
	{word: "remember", in: names, use: "dedupe", why: "the time in which a repeated request gets the same answer is a dedupe window"},
	{word: "remembered", in: names, use: "dedupe", why: "the time in which a repeated request gets the same answer is a dedupe window"},
	{word: "ahead", in: names, use: "newer, pending, offset", why: "three things had one name",
		only: []string{"daemon/controlplane", "ledger"}},
	{word: "roll", in: names, use: "index, reconcile, rotate", why: "three things had one name",
		only: []string{"daemon/controlplane", "api"}},
	{word: "told", in: names, use: "signedBundle, noticed", why: "say what it holds", only: []string{"daemon/controlplane", "raft"}},
	{word: "says", in: names, use: "facts", why: "say what it holds", only: []string{"daemon/controlplane", "api"}},
	{word: "stranger", use: "anonymous, unauthenticated", why: "the field's word for a caller without credentials"},
	{word: "strangers", use: "anonymous, unauthenticated", why: "the field's word for callers without credentials"},
	{word: "guest", use: "conn", why: "an open HTTP connection"},
	{word: "guests", use: "conns", why: "open HTTP connections"},
	{word: "crowd", use: "quota", why: "a quota of connections"},
	{word: "patience", use: "idle timeout, deadline", why: "the field's words"},
	{word: "hush", use: "keepalive, idle tolerance", why: "the field's words"},
	{word: "sickness", use: "transport health", why: "the field's words"},
	{word: "ill", in: names, use: "failing", why: "the field's word"},
	{word: "trouble", in: names, use: "failure, health", why: "the field's words"},
	{word: "wallet", use: "credentials", why: "certificate, key and CA certificates are a credential store"},
	{word: "wallets", use: "credentials", why: "certificate, key and CA certificates are a credential store"},
	{word: "porch", use: "accept queue", why: "the field's words"},
	{word: "glance", use: "evict, check", why: "the field's words"},
	{word: "given", in: names, use: "vendor secret", why: "say what is given", only: []string{"daemon/controlplane"}},
	{word: "vault", in: names, use: "secret cache, keyring", why: "a vault is a product of others"},
	{word: "late", in: names, use: "async", why: "an append with its sync afterwards is asynchronous", only: []string{"raft"}},
	{word: "weather", use: "peer status", why: "the field's words"},
	{word: "peek", in: names, use: "peer status", why: "the field's words", only: []string{"raft"}},
	{word: "turn", in: names, use: "slot", why: "a semaphore has slots", only: []string{"daemon/controlplane"}},
	{word: "turns", in: names, use: "slots", why: "a semaphore has slots", only: []string{"daemon/controlplane"}},
	{word: "page", in: names, use: "state, view", why: "an immutable state is a snapshot or a view",
		only: []string{"daemon/controlplane", "daemon/appliance", "ledger"}},
	{word: "ask", in: names, use: "call, enqueue, probe", why: "three things had one name",
		only: []string{"daemon/controlplane", "daemon/appliance", "raft"}},
	{word: "asks", in: names, use: "calls", why: "three things had one name",
		only: []string{"daemon/controlplane", "daemon/appliance", "raft"}},
	{word: "owed", in: names, use: "pending", why: "the field's word"},
	{word: "owes", in: names, use: "pending", why: "the field's word"},
	{word: "foresee", in: names, use: "dry run", why: "the field's words"},
	{word: "rehearse", use: "dry run", why: "the field's words"},
	{word: "rehearsal", use: "dry run", why: "the field's words"},
	{word: "recheck", in: names, use: "evict revoked", why: "say what it does"},
	{word: "introduce", in: names, use: "advertise", why: "the field's word"},
	{word: "bury", in: names, use: "mark removed", why: "say what it does"},
	{word: "steer", in: names, use: "reconcile", why: "the field's word"},
	{word: "obey", in: names, use: "handle", why: "the field's word"},
	{word: "nudge", in: names, use: "wake", why: "the field's word"},
	{word: "poke", in: names, use: "wake", why: "the field's word"},
	{word: "calm", in: names, use: "stable", why: "the field's word"},

	{word: "gap", in: prose, like: regexp.MustCompile(`\bleaves a gap\b`), use: "out of sequence", why: "the field's words"},
	{word: "tells-whether", in: prose, like: regexp.MustCompile(`\b(tells?|says|gives) whether\b`),
		use: "reports whether", why: "Go's own phrase"},
	{word: "gives", in: docs, like: regexp.MustCompile(`^// \w+ gives\b`), use: "returns", why: "Go's own word"},
	{word: "goes-on", in: prose, like: regexp.MustCompile(`\b(goes|go|went) on\b(?:[^ ]| [^r]| r[^e])`),
		use: "continues", why: "plain words"},
	{word: "stands", in: prose, like: regexp.MustCompile(`\bstands?\b(?: [^ai]| a[^l]| i[^n])`), use: "is", why: "plain words"},
}

var (
	texts   = []string{".go", ".proto", ".md", ".yaml", ".yml", ".toml", ".sh", ".txt", ".txtar", ".service"}
	spaces  = regexp.MustCompile(`[ \t\r\n]+(?:// ?|> )?`)
	comment = regexp.MustCompile(`(?s)//[^\n]*|/\*.*?\*/`)
)

// spoken is false for files that are not ours to word: generated, recorded, or the words themselves.
func spoken(name string) bool {
	switch {
	case generated(name), name == "CHANGELOG.md", name == "words_test.go", name == "testdata/words.txt":
		return false
	case name == "Makefile":
		return true
	}
	return slices.Contains(texts, path.Ext(name))
}

// parts splits text into its words: at what is not a letter, and before a capital that begins one.
func parts(text string, each func(word string)) {
	var word []rune
	end := func() {
		if len(word) > 0 {
			each(strings.ToLower(string(word)))
		}
		word = word[:0]
	}
	rs := []rune(text)
	for i, r := range rs {
		if !unicode.IsLetter(r) {
			end()
			continue
		}
		if i > 0 && unicode.IsUpper(r) {
			first := unicode.IsLower(rs[i-1])                                             // theWallet
			last := unicode.IsUpper(rs[i-1]) && i+1 < len(rs) && unicode.IsLower(rs[i+1]) // TLSWallet
			if first || last {
				end()
			}
		}
		word = append(word, r)
	}
	end()
}

// hear counts the retired words of one file, by their word.
func hear(name string, text []byte) map[string]int {
	found := map[string]int{}
	var all, ids, said []string
	var heads []string
	all = append(all, string(text), path.Base(name))
	ids = append(ids, path.Base(name))
	switch path.Ext(name) {
	case ".go":
		fset := token.NewFileSet()
		var s scanner.Scanner
		s.Init(fset.AddFile(name, fset.Base(), len(text)), text, nil, scanner.ScanComments)
		last, line := token.EOF, 0
		for {
			pos, tok, lit := s.Scan()
			if tok == token.EOF {
				break
			}
			at := fset.Position(pos).Line
			switch tok {
			case token.IDENT:
				ids = append(ids, lit)
			case token.COMMENT:
				said = append(said, lit)
				if last != token.COMMENT || at != line+1 {
					heads = append(heads, lit)
				}
				line = at
			}
			if tok != token.SEMICOLON || lit != "\n" {
				last = tok
			}
		}
	case ".proto":
		for _, c := range comment.FindAll(text, -1) {
			said = append(said, string(c))
		}
		ids = append(ids, string(comment.ReplaceAll(text, nil)))
	case ".md":
		said = append(said, string(text))
	}
	at := func(in place) map[string]int {
		n := map[string]int{}
		for _, s := range map[place][]string{anywhere: all, names: ids}[in] {
			parts(s, func(w string) { n[w]++ })
		}
		return n
	}
	every, named := at(anywhere), at(names)
	prosa := spaces.ReplaceAllString(strings.Join(said, "\n"), " ")
	for _, w := range words {
		if w.only != nil && !slices.Contains(w.only, area(name)) {
			continue
		}
		n := 0
		switch w.in {
		case anywhere:
			n = every[w.word]
		case names:
			n = named[w.word]
		case prose:
			n = len(w.like.FindAllString(prosa, -1))
		case docs:
			for _, h := range heads {
				n += len(w.like.FindAllString(h, -1))
			}
		}
		if n > 0 {
			found[w.word] = n
		}
	}
	return found
}

// much returns one line for each word that an area has more of than the table allows, and all counts.
func (r ratchet) much(files map[string][]byte) ([]string, map[string]int) {
	found, where := map[string]int{}, map[string][]string{}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !spoken(name) {
			continue
		}
		for w, n := range hear(name, files[name]) {
			key := area(name) + " " + w
			found[key] += n
			where[key] = append(where[key], fmt.Sprintf("%s (%d)", name, n))
		}
	}
	var out []string
	for _, key := range slices.Sorted(maps.Keys(found)) {
		most := r.most(key)
		if found[key] <= most {
			continue
		}
		_, word, _ := strings.Cut(key, " ")
		w := words[slices.IndexFunc(words, func(w retired) bool { return w.word == word })]
		out = append(out, fmt.Sprintf("%q: %d, and %s allows %d. Write %q: %s. It is in %s",
			key, found[key], r.path, most, w.use, w.why, strings.Join(where[key], ", ")))
	}
	return out, found
}

// TestRetiredWords keeps words away that were given up. Where a new use is right, its line in testdata/words.txt says why.
func TestRetiredWords(t *testing.T) {
	if _, err := os.Lstat(".git"); err != nil {
		t.Skip("not a git work tree: there is no list of tracked files")
	}
	list, err := exec.Command("git", "ls-files", "-z").Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	files := map[string][]byte{}
	for _, name := range bytes.Split(bytes.TrimSuffix(list, []byte{0}), []byte{0}) {
		if !spoken(string(name)) {
			continue
		}
		b, err := fs.ReadFile(os.DirFS("."), string(name))
		if os.IsNotExist(err) {
			continue // deleted and not yet committed
		}
		if err != nil {
			t.Fatal(err)
		}
		files[string(name)] = b
	}
	r, err := readRatchet("testdata/words.txt", 2)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range r.rows {
		_, word, _ := strings.Cut(x.key, " ")
		if !slices.ContainsFunc(words, func(w retired) bool { return w.word == word }) {
			t.Errorf("%s: %q is no retired word: delete its line", r.path, x.key)
		}
	}
	bad, found := r.much(files)
	for _, line := range bad {
		t.Error(line)
	}
	r.finish(t, found, 2)
}

// TestRetiredWordsAreHeard keeps the test above honest.
func TestRetiredWordsAreHeard(t *testing.T) {
	for name, tc := range map[string]struct{ path, text, want string }{
		"identifier": {"mesh/a.go", "package p\n\nvar theWalletOf int\n",
			`"mesh wallet": 1, and the table allows 0. Write "credentials"`},
		"capitals":              {"mesh/a.go", "package p\n\nvar TLSWallet int\n", `"mesh wallet": 1`},
		"several":               {"mesh/a.go", "package p\n\n// a wallet\nvar wallet = \"wallet\"\n", `"mesh wallet": 3`},
		"part of another word":  {"mesh/a.go", "package p\n\nvar broadcast, hushed int // patiences\n", ""},
		"a role":                {"daemon/x/y/a_test.go", "package p\n\nvar crowd int\n", `"daemon/x crowd": 1`},
		"comment":               {"mesh/a.go", "package p // on the porch\n", `"mesh porch": 1`},
		"file name":             {"mesh/wallet.go", "package p\n", `"mesh wallet": 1`},
		"field of protobuf":     {"api/a.proto", "message M { string the_wallet = 1; } // x\n", `"api wallet": 1`},
		"page":                  {"docs/a.md", "The weather\nof peers.\n", `"docs weather": 1`},
		"names only":            {"docs/a.md", "Given a vault, ask late.\n", ""},
		"names only, comment":   {"mesh/a.go", "package p\n\n// given a vault\nvar x int\n", ""},
		"name":                  {"mesh/a.go", "package p\n\nvar secretVault int\n", `"mesh vault": 1`},
		"name in protobuf":      {"api/a.proto", "// given a vault\nmessage Vault {}\n", `"api vault": 1`},
		"door of an appliance":  {"daemon/appliance/a.go", "package p\n\nvar door int\n", ""},
		"door of a node":        {"daemon/controlplane/a.go", "package p\n\nvar door int\n", `"daemon/controlplane door": 1`},
		"tells whether":         {"mesh/a.go", "package p\n\n// x tells\n// whether it is so.\nfunc x() {}\n", `"mesh tells-whether": 1`},
		"reports whether":       {"mesh/a.go", "package p\n\n// x reports whether it is so.\nfunc x() {}\n", ""},
		"gives":                 {"mesh/a.go", "package p\n\n// x gives one.\nfunc x() {}\n", `"mesh gives": 1. `},
		"gives, a later line":   {"mesh/a.go", "package p\n\n// Who reads what x\n// x gives knows one.\nfunc x() {}\n", ""},
		"stands in":             {"docs/a.md", "It stands in for another, or stands alone. It stands on floor 2.", `"docs stands": 1`},
		"goes on":               {"docs/a.md", "It goes on record. It goes on.", `"docs goes-on": 1`},
		"generated":             {"api/a.pb.go", "package p\n\nvar wallet int\n", ""},
		"the change log":        {"CHANGELOG.md", "wallet", ""},
		"as many as allowed":    {"raft/a.go", "package p\n\nvar wallet, Wallet int\n", ""},
		"one more than allowed": {"raft/a.go", "package p\n\nvar wallet, Wallet, aWallet int\n", `"raft wallet": 3, and the table allows 2`},
	} {
		t.Run(name, func(t *testing.T) {
			out, _ := ratchet{path: "the table", rows: []row{{"raft wallet", 2, ""}}}.much(map[string][]byte{tc.path: []byte(tc.text)})
			got := strings.Join(out, "\n")
			want := strings.TrimSuffix(tc.want, ". ")
			if (want == "" && got != "") || !strings.Contains(got, want) || len(out) > 1 {
				t.Errorf("much = %q, want %q", got, want)
			}
		})
	}
}
