// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// maxReview bounds the file of a review, in bytes: a plan is made of a file of at most 256 KiB.
const maxReview = 8 << 20

// saveReview writes what a customer was shown into a new file.
func saveReview(path string, doc map[string]any) error {
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return fault.At("demarc.review", fault.Internal, err)
	}
	return create(path, append(b, '\n'), 0o600)
}

// readReview returns the digest of the plan that a saved review shows, and sets the release to that of the review. A release that was
// given must be the same.
func readReview(path string, release *string) (plan string, err error) {
	const op = "demarc.review"
	b, err := readBounded(path, maxReview)
	if err != nil {
		return "", err
	}
	var doc struct {
		Release string `json:"release"`
		Plan    string `json:"plan_digest"`
	}
	if err := json.Unmarshal(b, &doc); err != nil || fleet.Digest(doc.Plan).Check() != nil || fleet.Digest(doc.Release).Check() != nil {
		return "", fault.New(op, fault.Invalid, "%s is no review that demarc review --save wrote", path)
	}
	if *release != "" && *release != doc.Release {
		return "", usage("--release names another release than %s, which is of %s", path, doc.Release)
	}
	*release = doc.Release
	return doc.Plan, nil
}

// approveLine is the command that approves what review shows.
func approveLine(plan, release, saved string) string {
	switch {
	case saved != "":
		return "demarc approve --reviewed " + saved
	case release != "":
		return "demarc approve --release " + release + " --plan " + plan
	}
	return "demarc approve --plan " + plan
}
