// SPDX-License-Identifier: Apache-2.0

package upgrade

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// recordings is where make record-release puts what a release left.
const recordings = "daemon/controlplane/testdata/root-"

// stale tells an error where the commit of PREVIOUS is older than it should be: each release is recorded on the commit that is
// released, which holds what was recorded before. Of the newest recording it may hold nothing.
func stale(recorded []int, holds func(release int) bool) error {
	if len(recorded) == 0 {
		return errors.New("no release is recorded")
	}
	slices.Sort(recorded)
	for _, n := range recorded[:len(recorded)-1] {
		if !holds(n) {
			return fmt.Errorf("PREVIOUS is stale: release %d is recorded, and the commit that it holds does not even have release %d: make "+
				"record-release moves it", recorded[len(recorded)-1], n)
		}
	}
	return nil
}

// TestPreviousIsNotStale: the build that upgrades begin at moves with each release that is recorded, and is one of this branch.
func TestPreviousIsNotStale(t *testing.T) {
	commit, missing, err := previous()
	if err != nil {
		t.Fatal(err)
	}
	if missing != "" {
		t.Skipf("NOT RUN: the previous build can't be had: %s", missing)
	}
	if _, err := git("merge-base", "--is-ancestor", commit, "HEAD"); err != nil {
		t.Errorf("the previous build %s is not below this one: %v", commit, err)
	}
	files, err := filepath.Glob(filepath.Join("..", "..", filepath.FromSlash(recordings)+"*"))
	if err != nil {
		t.Fatal(err)
	}
	var recorded []int
	for _, f := range files {
		n, err := strconv.Atoi(f[strings.LastIndexByte(f, '-')+1:])
		if err != nil {
			t.Fatal(err)
		}
		recorded = append(recorded, n)
	}
	if err := stale(recorded, func(n int) bool {
		_, err := git("cat-file", "-e", fmt.Sprint(commit, ":", recordings, n))
		return err == nil
	}); err != nil {
		t.Error(err)
	}
}

// TestStaleIsFound: a release that was recorded by hand, without PREVIOUS.
func TestStaleIsFound(t *testing.T) {
	for name, tc := range map[string]struct {
		recorded, held []int
		stale          bool
	}{
		"nothing is recorded":         {nil, nil, true},
		"the first release":           {[]int{1}, nil, false},
		"recorded on this commit":     {[]int{1, 2}, []int{1}, false},
		"moved on after it":           {[]int{1, 2}, []int{1, 2}, false},
		"left where release 1 was":    {[]int{1, 2}, nil, true},
		"left two behind":             {[]int{1, 2, 3}, []int{1}, true},
		"listed in the order of text": {[]int{1, 10, 2, 9}, []int{1, 2, 9}, false},
	} {
		t.Run(name, func(t *testing.T) {
			err := stale(tc.recorded, func(n int) bool { return slices.Contains(tc.held, n) })
			if (err != nil) != tc.stale {
				t.Error(err)
			}
		})
	}
}
