// SPDX-License-Identifier: Apache-2.0

package customer

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
)

func reviewCommand(a *cli.App) *cobra.Command {
	var release, save string
	c := a.Local(&cobra.Command{
		Use:   "review",
		Short: "Show exactly what would run, and how it differs from what runs",
		Args:  cli.Exactly(0, "no arguments"),
		Example: "  demarc review\n" +
			"  demarc review --save review.json && demarc approve --reviewed review.json",
	},
		func(ctx context.Context, l localv1connect.LocalClient, _ []string) error {
			m, err := client.Do(ctx, l.Review, &localv1.ReviewRequest{Release: release})
			if err != nil {
				return err
			}
			doc := map[string]any{"release": m.GetRelease(), "version": m.GetVersion(), "plan_digest": m.GetPlanDigest(),
				"plan": json.RawMessage(m.GetPlan()), "diff": m.GetDiff(), "phases": m.GetPhase()}
			if save != "" {
				if err := saveReview(save, doc); err != nil {
					return err
				}
			}
			return a.Emit(doc, func(w io.Writer) {
				fmt.Fprintf(w, "release %s %s\nplan %s, needs %s\n", m.GetVersion(), m.GetRelease(), m.GetPlanDigest(), m.GetPhase())
				for _, d := range m.GetDiff() {
					fmt.Fprintf(w, "  %s\n", d)
				}
				if len(m.GetDiff()) == 0 {
					fmt.Fprintln(w, "  nothing changes")
				}
				fmt.Fprintln(w, "to approve exactly this: "+approveLine(m.GetPlanDigest(), release, save))
			})
		})
	c.Flags().StringVar(&release, "release", "", "digest of a release; left out, the newest on offer")
	c.Flags().StringVar(&save, "save", "", "a new file for what is shown, as JSON: demarc approve --reviewed takes it")
	return c
}

func approveCommand(a *cli.App) *cobra.Command {
	var release, plan, reviewed string
	var good *time.Duration
	var k keyFlags
	c := a.Local(&cobra.Command{
		Use:   "approve",
		Short: "Approve one plan of one release",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "approve signs for exactly the plan that review shows: give its digest with --plan, or the file of demarc review --save\n" +
			"with --reviewed, so that what you read is what you sign for.",
		Example: "  demarc review\n" +
			"  demarc approve --plan sha256:... --key globex.key\n" +
			"  demarc approve --reviewed review.json --key globex.key",
	},
		func(ctx context.Context, l localv1connect.LocalClient, _ []string) error {
			if (plan == "") == (reviewed == "") {
				return cli.Usage("say which plan you reviewed: --plan sha256:... (demarc review shows it), or --reviewed FILE (demarc review --save " +
					"FILE)")
			}
			if reviewed != "" {
				var err error
				if plan, err = readReview(reviewed, &release); err != nil {
					return err
				}
			}
			m, err := client.Do(ctx, l.Review, &localv1.ReviewRequest{Release: release})
			if err != nil {
				return err
			}
			if m.GetPlanDigest() != plan {
				return fault.New("demarc.approve", fault.Conflict,
					"the release compiles to plan %s now, not to the one that you reviewed: review again", m.GetPlanDigest())
			}
			signer, err := k.signer(a)
			if err != nil {
				return err
			}
			name, err := applianceName(ctx, l)
			if err != nil {
				return err
			}
			doc := operation.PlanApproval{Appliance: name, Release: fleet.Digest(m.GetRelease()), Plan: fleet.Digest(plan), At: time.Now().UTC(),
				Nonce: client.NewID()}
			doc.NotAfter = doc.At.Add(*good)
			for _, p := range strings.Split(m.GetPhase(), ",") {
				doc.Phases = append(doc.Phases, fleet.Phase(p))
			}
			if _, err := send(ctx, l, doc, signer, nil); err != nil {
				return err
			}
			return a.Say(map[string]any{"plan": plan, "version": m.GetVersion(), "until_unix": doc.NotAfter.Unix()},
				"plan %s of version %s is approved; the deploy must begin before %s",
				fleet.Digest(plan).Short(), m.GetVersion(), doc.NotAfter.Format(time.RFC3339))
		})
	c.Flags().StringVar(&release, "release", "", "digest of the release; left out, the newest on offer")
	c.Flags().StringVar(&plan, "plan", "", "digest of the plan that you reviewed")
	c.Flags().StringVar(&reviewed, "reviewed", "", "the file of demarc review --save, in place of --plan")
	good = cli.ConsentVar(c.Flags(), "good-for", cli.ApprovalLife, "within which the deploy must begin")
	k.add(c.Flags())
	return c
}

// maxReview bounds the file of a review, in bytes: a plan is made of a file of at most 256 KiB.
const maxReview = 8 << 20

// saveReview writes what a customer was shown into a new file.
func saveReview(path string, doc map[string]any) error {
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return fault.At("demarc.review", fault.Internal, err)
	}
	return cli.Create(path, append(b, '\n'), 0o600)
}

// readReview returns the digest of the plan that a saved review shows, and sets the release to that of the review. A release that is
// set already must be the same.
func readReview(path string, release *string) (plan string, err error) {
	const op = "demarc.review"
	b, err := cli.ReadFile(path, maxReview)
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
		return "", cli.Usage("--release names another release than %s, which is of %s", path, doc.Release)
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
