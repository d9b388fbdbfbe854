// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/daemon/appliance"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/grant"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// own makes a command that speaks to the customer's own appliance.
func (a *app) own(c *cobra.Command, do func(ctx context.Context, l localv1connect.LocalClient, args []string) error) *cobra.Command {
	c.RunE = func(c *cobra.Command, args []string) error {
		l, err := a.applianceClient()
		if err != nil {
			return err
		}
		ctx, cancel := a.bounded(c)
		defer cancel()
		return do(ctx, l, args)
	}
	return c
}

// local holds everything that a customer says to the appliance.
func (a *app) local() *cobra.Command {
	g := group("local", "The customer's own appliance: everything that the vendor can't call", a.localStatus(), a.pin(), a.log(), a.localEvidence())
	g.AddCommand(a.customersVerbs()...)
	return g
}

// customersVerbs are short forms that stand at the top too.
func (a *app) customersVerbs() []*cobra.Command {
	return []*cobra.Command{a.review(), a.approve(), a.grant(), a.revoke(), a.access(), a.posture(), a.transport()}
}

func (a *app) localStatus() *cobra.Command {
	return a.own(&cobra.Command{Use: "status", Short: "Show the appliance: channel, application, secrets, pinned keys, log", Args: exactly(0, "no arguments")},
		func(ctx context.Context, l localv1connect.LocalClient, _ []string) error {
			m, err := wire(l.Status(ctx, connect.NewRequest(&localv1.StatusRequest{})))
			if err != nil {
				return err
			}
			return a.emit(m, func(w io.Writer) {
				fmt.Fprintf(w, "appliance\t%s of %s, vendor %s\n", m.GetAppliance(), m.GetCustomer(), m.GetTrustDomain())
				if m.GetBookFailed() != "" {
					fmt.Fprintf(w, "BOOK\tsince %s %s\n", time.Unix(m.GetBookFailedUnix(), 0).UTC().Format(time.RFC3339), m.GetBookFailed())
				}
				fmt.Fprintf(w, "channel\tconnected %v, node %s by %s (of %s)\n", m.GetConnected(), m.GetNode(), m.GetRoute(), strings.Join(m.GetRoutes(), ", "))
				for _, r := range m.GetWays() {
					road(w, "road", r)
				}
				road(w, "door", m.GetDoor())
				fmt.Fprintf(w, "clock\t%s\n", clock(m.GetClock()))
				bookTime(w, m.GetBookTime())
				fmt.Fprintf(w, "application\t%s %s\t%s\n", m.GetVersion(), m.GetState(), m.GetReason())
				waiting(w, m)
				for _, s := range m.GetServices() {
					fmt.Fprintf(w, "service\t%s\thealthy %v, restarts %d, pid %d\t%s\n", s.GetName(), s.GetHealthy(), s.GetRestarts(), s.GetPid(), s.GetReason())
				}
				for _, s := range m.GetSecrets() {
					fmt.Fprintf(w, "secret\t%s\tpresent %v\t%s\n", s.GetName(), s.GetPresent(), s.GetProblem())
				}
				for _, k := range m.GetPinned() {
					fmt.Fprintf(w, "pinned\t%s\n", k)
				}
				vendorEpoch(w, m.GetVendorEpoch())
				fmt.Fprintf(w, "audit log\t%d entries, root %.16s\n", m.GetAuditSize(), m.GetAuditRoot())
			})
		})
}

// vendorEpoch says that the vendor's book was set back, and what it lost.
func vendorEpoch(w io.Writer, e *localv1.VendorEpoch) {
	if e.GetMetUnix() > 0 {
		fmt.Fprintf(w, "vendor's book\tepoch %d (%s)\tmet %s\n", e.GetNumber(), e.GetCause(), time.Unix(e.GetMetUnix(), 0).UTC().Format(time.RFC3339))
	}
	for _, l := range e.GetLost() {
		fmt.Fprintf(w, "\tsince then\t%s\n", l)
	}
	if r := e.GetRefused(); r != "" {
		fmt.Fprintf(w, "vendor's book\tan epoch was refused\t%s\n", r)
	}
}

// appliance asks the appliance for its name: documents are bound to it.
func applianceName(ctx context.Context, l localv1connect.LocalClient) (fleet.ApplianceID, error) {
	m, err := wire(l.Status(ctx, connect.NewRequest(&localv1.StatusRequest{})))
	return fleet.ApplianceID(m.GetAppliance()), err
}

func (a *app) pin() *cobra.Command {
	var recipient, endorse string
	var k keyFlags
	c := a.own(&cobra.Command{Use: "pin FILE.pub", Short: "Pin a key of the customer on the appliance", Args: exactly(1, "the file of a public key"),
		Long:    "The first key is pinned by whoever may open the appliance's socket. Each later one needs the signature of a pinned one (--endorse-with).",
		Example: "  demarc local pin globex.key.pub --recipient-file globex.key.recipient"},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			pem, err := readBounded(args[0], 64<<10)
			if err != nil {
				return err
			}
			if seal.LooksReadable(pem) {
				return fault.New("demarc.pin", fault.Denied, "%s is a private key that anyone can read: pin the .pub file, and keep the key encrypted", args[0])
			}
			req := &localv1.PinRequest{RequestId: draw(), PublicKey: pem}
			if recipient != "" {
				b, err := readBounded(recipient, 1<<10)
				if err != nil {
					return err
				}
				req.Recipient = strings.TrimSpace(string(b))
			}
			if endorse != "" {
				if req.Endorsement, err = a.endorse(ctx, l, pem, endorse, k); err != nil {
					return err
				}
			}
			m, err := wire(l.Pin(ctx, connect.NewRequest(req)))
			if err != nil {
				return err
			}
			return a.say(m, "key %s is pinned", m.GetKeyId())
		})
	c.Flags().StringVar(&recipient, "recipient-file", "", "whom output is encrypted to")
	c.Flags().StringVar(&endorse, "endorse-with", "", "a key that is pinned already")
	k.addPassphrase(c.Flags())
	return c
}

func (a *app) endorse(ctx context.Context, l localv1connect.LocalClient, pem []byte, with string, k keyFlags) ([]byte, error) {
	k.file = with
	signer, err := k.signer(a)
	if err != nil {
		return nil, err
	}
	next, err := seal.ParseKey(pem)
	if err != nil {
		return nil, err
	}
	name, err := applianceName(ctx, l)
	if err != nil {
		return nil, err
	}
	return seal.Seal(appliance.Endorse{Appliance: name, Key: next.ID}, signer)
}

// send signs a document and submits it.
func send[T interface {
	seal.Body
	Check() error
}](ctx context.Context, l localv1connect.LocalClient, doc T, by crypto.Signer, output []byte) (*localv1.SubmitResponse, error) {
	if err := doc.Check(); err != nil {
		return nil, err
	}
	sealed, err := seal.Seal(doc, by)
	if err != nil {
		return nil, err
	}
	return wire(l.Submit(ctx, connect.NewRequest(&localv1.SubmitRequest{RequestId: draw(), Document: sealed, Output: output})))
}

func (a *app) review() *cobra.Command {
	var release, save string
	c := a.own(&cobra.Command{Use: "review", Short: "Show exactly what would run, and how it differs from what runs", Args: exactly(0, "no arguments"),
		Example: "  demarc review\n  demarc review --save review.json && demarc approve --reviewed review.json"},
		func(ctx context.Context, l localv1connect.LocalClient, _ []string) error {
			m, err := wire(l.Review(ctx, connect.NewRequest(&localv1.ReviewRequest{Release: release})))
			if err != nil {
				return err
			}
			doc := map[string]any{"release": m.GetRelease(), "version": m.GetVersion(), "plan_digest": m.GetPlanDigest(), "plan": json.RawMessage(m.GetPlan()), "diff": m.GetDiff(), "phases": m.GetPhase()}
			if save != "" {
				if err := saveReview(save, doc); err != nil {
					return err
				}
			}
			return a.emit(doc, func(w io.Writer) {
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

func (a *app) approve() *cobra.Command {
	var release, plan, reviewed string
	var good *time.Duration
	var k keyFlags
	c := a.own(&cobra.Command{Use: "approve", Short: "Approve one plan of one release", Args: exactly(0, "no arguments"),
		Long: "approve signs for exactly the plan that review shows: give its digest with --plan, or the file of\n" +
			"demarc review --save with --reviewed, so that what you read is what you sign for.",
		Example: "  demarc review\n  demarc approve --plan sha256:... --key globex.key\n  demarc approve --reviewed review.json --key globex.key"},
		func(ctx context.Context, l localv1connect.LocalClient, _ []string) error {
			if (plan == "") == (reviewed == "") {
				return usage("say which plan you reviewed: --plan sha256:... (demarc review shows it), or --reviewed FILE (demarc review --save FILE)")
			}
			if reviewed != "" {
				var err error
				if plan, err = readReview(reviewed, &release); err != nil {
					return err
				}
			}
			m, err := wire(l.Review(ctx, connect.NewRequest(&localv1.ReviewRequest{Release: release})))
			if err != nil {
				return err
			}
			if m.GetPlanDigest() != plan {
				return fault.New("demarc.approve", fault.Conflict, "the release compiles to plan %s now, not to the one that you reviewed: review again", m.GetPlanDigest())
			}
			signer, err := k.signer(a)
			if err != nil {
				return err
			}
			name, err := applianceName(ctx, l)
			if err != nil {
				return err
			}
			doc := operation.PlanApproval{Appliance: name, Release: fleet.Digest(m.GetRelease()), Plan: fleet.Digest(plan), At: time.Now().UTC(), Nonce: draw()}
			doc.NotAfter = doc.At.Add(*good)
			for _, p := range strings.Split(m.GetPhase(), ",") {
				doc.Phases = append(doc.Phases, fleet.Phase(p))
			}
			if _, err := send(ctx, l, doc, signer, nil); err != nil {
				return err
			}
			return a.say(map[string]any{"plan": plan, "version": m.GetVersion(), "until_unix": doc.NotAfter.Unix()}, "plan %s of version %s is approved; the deploy must begin before %s",
				fleet.Digest(plan).Short(), m.GetVersion(), doc.NotAfter.Format(time.RFC3339))
		})
	c.Flags().StringVar(&release, "release", "", "digest of the release; left out, the newest on offer")
	c.Flags().StringVar(&plan, "plan", "", "digest of the plan that you reviewed")
	c.Flags().StringVar(&reviewed, "reviewed", "", "the file of demarc review --save, in place of --plan")
	good = consentVar(c.Flags(), "good-for", approvalLife, "within which the deploy must begin")
	k.add(c.Flags())
	return c
}

func (a *app) grant() *cobra.Command {
	var life *time.Duration
	var uses *int
	var ops, services []string
	var k keyFlags
	var c *cobra.Command
	c = a.own(&cobra.Command{Use: "grant PHASE", Short: "Allow the vendor the acts of a phase", Args: exactly(1, "a phase"), ValidArgs: phaseNames(),
		Long: "The phases are " + strings.Join(phaseNames(), ", ") + ". Each stands alone: none includes another.\n\n" +
			"A grant ends: after --for, or when it is revoked. The one exception is observe, which is on by default: granted without\n--for and --uses it is on again until it is revoked.",
		Example: "  demarc grant deploy --for 720h --key globex.key\n  demarc grant operate.read --uses 1 --operation state --key globex.key"},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			signer, err := k.signer(a)
			if err != nil {
				return err
			}
			name, err := applianceName(ctx, l)
			if err != nil {
				return err
			}
			now := time.Now().UTC()
			g := grant.Grant{Appliance: name, Phase: fleet.Phase(args[0]), Scope: grant.Scope{Operations: ops, Services: services}, From: now.Add(-time.Minute), Uses: grant.Count(*uses), Nonce: draw()}
			until := "it is revoked"
			if g.Phase != fleet.Observe || g.Uses > 0 || c.Flags().Changed("for") {
				g.Until = now.Add(*life)
				until = g.Until.Format(time.RFC3339)
			}
			m, err := send(ctx, l, g, signer, nil)
			if err != nil {
				return err
			}
			return a.say(m, "%s is granted until %s; take it back with: demarc revoke %s", args[0], until, args[0])
		})
	life = consentVar(c.Flags(), "for", grantLife, "how long")
	uses = countVar(c.Flags(), "uses", grant.MaxCount, "how many times; left out, any number")
	c.Flags().StringArrayVar(&ops, "operation", nil, "this operation only")
	c.Flags().StringArrayVar(&services, "service", nil, "this service only")
	k.add(c.Flags())
	return c
}

func phaseNames() []string {
	var out []string
	for _, p := range fleet.Phases() {
		out = append(out, string(p))
	}
	return out
}

func (a *app) revoke() *cobra.Command {
	var all bool
	var receipt string
	var k keyFlags
	c := a.own(&cobra.Command{Use: "revoke [PHASE | GRANT]", Short: "Take consent back, at once", ValidArgs: phaseNames(),
		Long:    "revoke answers when the last act is refused and what ran under it is ended, and tells how long that took.",
		Example: "  demarc revoke operate.read --key globex.key\n  demarc revoke --all --key globex.key"},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			if all == (len(args) == 1) || len(args) > 1 {
				return usage("name one phase or grant, or --all")
			}
			signer, err := k.signer(a)
			if err != nil {
				return err
			}
			name, err := applianceName(ctx, l)
			if err != nil {
				return err
			}
			r := grant.Revoke{Appliance: name, All: all, At: time.Now().UTC(), Nonce: draw()}
			if !all {
				if slices.Contains(phaseNames(), args[0]) {
					r.Phase = fleet.Phase(args[0])
				} else {
					r.Grant = args[0]
				}
			}
			m, err := send(ctx, l, r, signer, nil)
			if err != nil {
				return err
			}
			if receipt != "" {
				if err := create(receipt, m.GetReceipt(), 0o600); err != nil {
					return err
				}
			}
			return a.say(m, "revoked: the last act was refused after %.3f ms", float64(m.GetTookMicros())/1000)
		})
	c.Flags().BoolVar(&all, "all", false, "everything")
	c.Flags().StringVar(&receipt, "receipt", "", "file for the appliance's signed receipt")
	k.add(c.Flags())
	return c
}

func (a *app) access() *cobra.Command {
	show := func(phase string) func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
		return func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			if len(args) == 1 {
				phase = args[0]
			}
			m, err := wire(l.Access(ctx, connect.NewRequest(&localv1.AccessRequest{Phase: phase})))
			if err != nil {
				return err
			}
			return a.emit(m, func(w io.Writer) {
				bookTime(w, m.GetBookTime())
				fmt.Fprintln(w, "PHASE\tALLOWED\tUNTIL\tUSES\tWHY")
				for _, x := range m.GetAccess() {
					until, uses := "-", "-"
					if x.GetAllowed() {
						until, uses = end(x.GetUntilUnix()), times(x.GetUsesLeft())
					}
					fmt.Fprintf(w, "%s\t%v\t%s\t%s\t%s\n", x.GetPhase(), x.GetAllowed(), until, uses, x.GetWhy())
					for _, r := range x.GetReach() {
						scope := grant.Scope{Operations: r.GetOperations(), Services: r.GetServices()}
						from := ""
						if r.GetFromUnix() > time.Now().Unix() {
							from = "from " + end(r.GetFromUnix())
						}
						fmt.Fprintf(w, "\t%s\t%s\t%s\t%s\n", from, end(r.GetUntilUnix()), times(r.GetUsesLeft()), scope)
					}
					if phase != "" {
						for _, by := range x.GetBy() {
							fmt.Fprintf(w, "\t\t\t\tby %s\n", by)
						}
					}
				}
			})
		}
	}
	c := a.own(&cobra.Command{Use: "access", Short: "Show what the vendor can do right now, why, and until when", Args: exactly(0, "no arguments")}, show(""))
	c.AddCommand(a.own(&cobra.Command{Use: "explain PHASE", Short: "Name the grants and denies that decide a phase", Args: exactly(1, "a phase"), ValidArgs: phaseNames()}, show("")))
	return c
}

// end spells a time, or that there is none.
func end(unix int64) string {
	if unix == 0 {
		return "revoked"
	}
	return time.Unix(unix, 0).UTC().Format(time.RFC3339)
}

// times spells a number of uses.
func times(n int64) string {
	if n < 0 {
		return "any"
	}
	return strconv.FormatInt(n, 10)
}

func (a *app) posture() *cobra.Command {
	var allow []string
	show := a.own(&cobra.Command{Use: "show", Short: "Show which doors for end users stand open, and why others are shut", Args: exactly(0, "no arguments")},
		func(ctx context.Context, l localv1connect.LocalClient, _ []string) error {
			m, err := wire(l.GetPosture(ctx, connect.NewRequest(&localv1.GetPostureRequest{})))
			if err != nil {
				return err
			}
			return a.emit(m, func(w io.Writer) {
				fmt.Fprintf(w, "posture\t%s %s\n", m.GetExposure(), strings.Join(m.GetAllow(), " "))
				for _, d := range m.GetDoors() {
					fmt.Fprintf(w, "door\t%s\ton %s at %s\tfrom %s\ttls %s\tto %s\n", d.GetName(), d.GetSide(), d.GetAddress(), strings.Join(d.GetFrom(), " "), d.GetTls(), d.GetTo())
				}
				for _, s := range m.GetShut() {
					fmt.Fprintf(w, "shut\t%s\t%s\n", s.GetPort(), s.GetWhy())
				}
			})
		})
	set := a.own(&cobra.Command{Use: "set EXPOSURE", Short: "Open and shut doors: closed, private, allowlist or public", Args: exactly(1, "closed, private, allowlist or public"),
		ValidArgs: []string{"closed", "private", "allowlist", "public"}, Example: "  demarc posture set allowlist --allow 192.0.2.0/24"},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			m, err := wire(l.SetPosture(ctx, connect.NewRequest(&localv1.SetPostureRequest{RequestId: draw(), Exposure: args[0], Allow: allow})))
			if err != nil {
				return err
			}
			return a.say(m, "posture is %s", args[0])
		})
	set.Flags().StringArrayVar(&allow, "allow", nil, "network that may come in, for allowlist")
	return group("posture", "Who of the application's end users may come in", show, set)
}

func (a *app) transport() *cobra.Command {
	use := a.own(&cobra.Command{Use: "use NAME", Short: "Move the channel to another transport of the appliance's file", Args: exactly(1, "the transport's name"), Example: "  demarc transport use tailscale"},
		func(ctx context.Context, l localv1connect.LocalClient, args []string) error {
			m, err := wire(l.SetTransport(ctx, connect.NewRequest(&localv1.SetTransportRequest{RequestId: draw(), Kind: args[0]})))
			if err != nil {
				return err
			}
			return a.say(m, "the channel runs over %s", m.GetKind())
		})
	return group("transport", "How the appliance reaches the control plane", use)
}
