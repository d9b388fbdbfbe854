// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
)

// builds are two folders with demarc and demarcd.
type builds struct{ old, now string }

// git asks about the repository that the test is in.
func git(args ...string) (string, error) {
	var errs bytes.Buffer
	c := exec.Command("git", args...)
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		err = fmt.Errorf("git %s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	return strings.TrimSpace(string(out)), err
}

// choose tells which commit is the previous build: the newest tag of a release that is not this commit itself, else the commit
// that the file PREVIOUS holds.
func choose(tags []string, file string) (commit, from string, err error) {
	for _, tag := range tags {
		if release.MatchString(tag) {
			return "refs/tags/" + tag, "the newest release", nil
		}
	}
	commit = strings.TrimSpace(file)
	if !hash.MatchString(commit) {
		return "", "", fmt.Errorf("PREVIOUS holds %q, and should hold the whole hash of a commit", commit)
	}
	return commit, "the file PREVIOUS", nil
}

var (
	release = regexp.MustCompile(`^v[0-9]+\.[0-9]+\.[0-9]+$`)
	hash    = regexp.MustCompile(`^[0-9a-f]{40}$`)
)

// previous is the commit of the previous build. Where this clone does not hold it the reason is in missing.
func previous() (commit, missing string, err error) {
	if _, err := exec.LookPath("git"); err != nil {
		return "", "there is no git here", nil
	}
	if _, err := git("rev-parse", "--git-dir"); err != nil {
		return "", "this is not a clone of the repository: " + err.Error(), nil
	}
	out, err := git("tag", "--merged", "HEAD", "--no-contains", "HEAD", "--sort=-v:refname")
	if err != nil {
		return "", "", err
	}
	file, err := os.ReadFile("PREVIOUS")
	if err != nil {
		return "", "", err
	}
	name, from, err := choose(strings.Fields(out), string(file))
	if err != nil {
		return "", "", err
	}
	if commit, err = git("rev-parse", "--verify", "--quiet", name+"^{commit}"); err != nil {
		return "", fmt.Sprintf("this clone does not hold %s, which %s names: it is shallow (git fetch --unshallow)", name, from), nil
	}
	return commit, "", nil
}

// TestChoosesThePreviousBuild: a release moves it.
func TestChoosesThePreviousBuild(t *testing.T) {
	const commit = "c4f7409000000000000000000000000000000000"
	for name, tc := range map[string]struct {
		tags       []string
		file, want string
	}{
		"no release yet":                  {nil, commit + "\n", commit},
		"the newest release":              {[]string{"v1.10.0", "v1.9.0"}, commit, "refs/tags/v1.10.0"},
		"a tag that is no release":        {[]string{"nightly", "v2.0.0-rc1"}, commit, commit},
		"a release below other tags":      {[]string{"v2.0.0-rc1", "v1.0.0"}, commit, "refs/tags/v1.0.0"},
		"a short hash":                    {nil, "c4f7409", ""},
		"a name":                          {nil, "main", ""},
		"nothing":                         {nil, "", ""},
		"a word that git reads as a flag": {[]string{"--exec=x"}, commit, commit},
	} {
		t.Run(name, func(t *testing.T) {
			got, _, err := choose(tc.tags, tc.file)
			if want := tc.want; want != got || (want == "") != (err != nil) {
				t.Errorf("want %q, got %q, %v", want, got, err)
			}
		})
	}
	// The file in the tree is one that a release can move.
	file, err := os.ReadFile("PREVIOUS")
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := choose(nil, string(file)); err != nil {
		t.Error(err)
	}
}

// older builds the programs of a commit once, into a cache outside of the tree.
func older(commit string) (string, error) {
	cache := os.Getenv("DEMARC_UPGRADE_CACHE")
	if cache == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		cache = filepath.Join(base, "demarc-test")
	}
	out := filepath.Join(cache, "build-"+commit+"-"+runtime.Version())
	if _, err := os.Stat(filepath.Join(out, "demarcd")); err == nil {
		return out, nil
	}
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cache, ".build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	src, bin := filepath.Join(tmp, "src"), filepath.Join(tmp, "bin")
	if err := os.Mkdir(src, 0o700); err != nil {
		return "", err
	}
	if _, err := git("-C", "../..", "archive", "--format=tar", "-o", filepath.Join(tmp, "src.tar"), commit); err != nil {
		return "", err
	}
	if b, err := exec.Command("tar", "-xf", filepath.Join(tmp, "src.tar"), "-C", src).CombinedOutput(); err != nil {
		return "", fmt.Errorf("tar: %w: %s", err, b)
	}
	if err := build(src, bin); err != nil {
		return "", err
	}
	err = os.Rename(bin, out)
	if _, there := os.Stat(filepath.Join(out, "demarcd")); there == nil {
		err = nil // another run was faster
	}
	return out, err
}

func build(src, out string, flags ...string) error {
	c := exec.Command("go", append(append([]string{"build", "-trimpath"}, flags...), "-o", out+"/", "./cmd/demarc", "./cmd/demarcd")...)
	c.Dir = src
	if b, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("go build in %s: %w: %s", src, err, b)
	}
	return nil
}

// laterKind is a change that no build knows but the one of this test.
const laterKind = "upgrade.test/1"

// laid is what the new build of the test has beside the tree's source, as the next release would have it: the policy of the
// autopilot is written by a kind of change that the previous build does not know.
var laid = []struct{ file, was, is string }{
	{"daemon/controlplane/book/state.go", "ledger.Learn[SetAutopilot](),", "ledger.Learn[SetAutopilot](), ledger.Learn[UpgradeTest](),"},
	{"daemon/controlplane/members.go", "book.SetAutopilot{Autopilot: p})", "book.UpgradeTest{SetAutopilot: book.SetAutopilot{Autopilot: p}})"},
	{"daemon/controlplane/book/upgrade_test_overlay.go", "", "package book\n\ntype UpgradeTest struct{ SetAutopilot }\n\nfunc " +
		"(UpgradeTest) Kind() string { return \"" + laterKind + "\" }\n"},
}

// newer builds the programs of this tree, with what is laid over it. The tree is not touched.
func newer(out string) error {
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	over := map[string]string{}
	tmp, err := os.MkdirTemp("", "upgrade")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	for i, l := range laid {
		file := filepath.Join(root, l.file)
		text := []byte(l.is)
		if l.was != "" {
			b, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			if bytes.Count(b, []byte(l.was)) != 1 {
				return fmt.Errorf("%s does not hold %q once: mend laid in builds_test.go", l.file, l.was)
			}
			text = bytes.Replace(b, []byte(l.was), []byte(l.is), 1)
		}
		over[file] = filepath.Join(tmp, fmt.Sprintf("%d.go", i))
		if err := os.WriteFile(over[file], text, 0o600); err != nil {
			return err
		}
	}
	b, err := json.Marshal(map[string]any{"Replace": over})
	if err != nil {
		return err
	}
	overlay := filepath.Join(tmp, "overlay.json")
	return errors.Join(os.WriteFile(overlay, b, 0o600), build(root, out, "-overlay", overlay))
}

// TestLaidOver: what is laid over the tree fits, so that a change of the tree is found without make test-upgrade.
func TestLaidOver(t *testing.T) {
	for _, l := range laid {
		b, err := os.ReadFile(filepath.Join("..", "..", l.file))
		switch {
		case l.was == "" && !errors.Is(err, os.ErrNotExist):
			t.Errorf("%s is there: %v", l.file, err)
		case l.was != "" && (err != nil || bytes.Count(b, []byte(l.was)) != 1):
			t.Errorf("%s does not hold %q once (%v)", l.file, l.was, err)
		}
	}
}

// programs builds both, or skips the test where there is no previous build to be had.
func programs(t *testing.T) builds {
	commit, missing, err := previous()
	if err != nil {
		t.Fatal(err)
	}
	if missing != "" {
		t.Skipf("NOT RUN: the previous build can't be had: %s", missing)
	}
	var b builds
	if b.old, err = older(commit); err != nil {
		t.Fatal(err)
	}
	b.now = t.TempDir()
	if err := newer(b.now); err != nil {
		t.Fatal(err)
	}
	t.Logf("the previous build is %s, in %s", commit, b.old)
	return b
}
