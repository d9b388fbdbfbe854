// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	managementv1 "github.com/demarc-dev/demarc/api/management/v1"
	"github.com/demarc-dev/demarc/api/management/v1/managementv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// online makes a command that speaks to the control plane.
func (a *app) online(c *cobra.Command, do func(ctx context.Context, v *vendor, args []string) error) *cobra.Command {
	c.RunE = func(c *cobra.Command, args []string) error {
		v, err := a.vendor()
		if err != nil {
			return err
		}
		defer v.close()
		return do(c.Context(), v, args)
	}
	return c
}

func (a *app) status() *cobra.Command {
	return a.online(&cobra.Command{Use: "status", Short: "Show the control plane's nodes, leader and audit log", Args: exactly(0, "no arguments"), Example: "  demarc status --context operator.yaml"},
		func(ctx context.Context, v *vendor, _ []string) error {
			m, err := ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.StatusResponse, error) {
				return wire(c.Status(ctx, connect.NewRequest(&controlv1.StatusRequest{})))
			})
			if err != nil {
				return err
			}
			return a.emit(m, func(w io.Writer) {
				fmt.Fprintf(w, "trust domain\t%s%s\nasked\t%s\nleader\t%s\naudit log\t%d entries, root %.16s\n", m.GetTrustDomain(), forDevelopment(m.GetDevelopment()), m.GetNode(), m.GetLeader(), m.GetAuditSize(), m.GetAuditRoot())
				if e := m.GetEpoch(); e != nil {
					fmt.Fprintf(w, "epoch\t%d (%s at %s)\tkept %d entries of the log\t%d appliances have not come back since\n", e.GetNumber(), e.GetCause(),
						time.Unix(e.GetBegunUnix(), 0).UTC().Format(time.RFC3339), e.GetLogKept(), e.GetUnmet())
				}
				for _, n := range m.GetMembers() {
					fmt.Fprintf(w, "node\t%s\traft %s\tapi %s\n", n.GetName(), n.GetRaftAddress(), n.GetApiAddress())
				}
			})
		})
}

// forDevelopment marks a trust domain that takes development identities.
func forDevelopment(is bool) string {
	if is {
		return " (for development)"
	}
	return ""
}

func (a *app) customer() *cobra.Command {
	add := a.online(&cobra.Command{Use: "add NAME", Short: "Register a customer", Args: exactly(1, "the customer's name"), Example: "  demarc customer add globex"},
		func(ctx context.Context, v *vendor, args []string) error {
			id := draw()
			_, err := ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.RegisterCustomerResponse, error) {
				return wire(c.RegisterCustomer(ctx, connect.NewRequest(&controlv1.RegisterCustomerRequest{RequestId: id, Name: args[0]})))
			})
			if err != nil {
				return err
			}
			return a.say(map[string]string{"customer": args[0]}, "customer %s is registered", args[0])
		})
	return group("customer", "The vendor's customers", add)
}

func (a *app) appliance() *cobra.Command {
	var reason string
	add, expect := a.register(), a.expect()

	list := a.online(&cobra.Command{Use: "list", Short: "List appliances and what runs on them", Args: exactly(0, "no arguments")},
		func(ctx context.Context, v *vendor, _ []string) error {
			all, err := v.appliances(ctx)
			if err != nil {
				return err
			}
			return a.emit(all, func(w io.Writer) {
				fmt.Fprintln(w, "APPLIANCE\tCUSTOMER\tPLATFORM\tSTATUS\tONLINE\tROUTE\tVERSION\tSTATE\tPOSTURE\tWHY")
				for _, x := range all {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%v\t%s\t%s\t%s\t%s\t%s\n", x.GetName(), x.GetCustomer(), x.GetPlatform(), x.GetStatus(), x.GetOnline(), x.GetRoute(),
						x.GetVersion(), x.GetState(), x.GetPosture(), standing(x))
				}
			})
		})
	show := a.online(&cobra.Command{Use: "show NAME", Short: "Show one appliance: its deployment, health, and which secrets are present", Args: exactly(1, "the appliance's name")},
		func(ctx context.Context, v *vendor, args []string) error {
			x, err := v.appliance(ctx, args[0])
			if err != nil {
				return err
			}
			return a.emit(x, func(w io.Writer) {
				fmt.Fprintf(w, "appliance\t%s of %s, %s\nplatform\t%s\n", x.GetName(), x.GetCustomer(), x.GetStatus(), x.GetPlatform())
				fmt.Fprintf(w, "channel\tonline %v, at node %s by %s\n", x.GetOnline(), x.GetNode(), x.GetRoute())
				fmt.Fprintf(w, "deployment\t%s %s\t%s\n", x.GetVersion(), x.GetState(), sentenceOf(x.GetWhy()))
				if x.GetReason() != "" {
					fmt.Fprintf(w, "banned\t%s\n", x.GetReason())
				}
				if o := x.GetOffer(); o != nil {
					fmt.Fprintf(w, "waits\trelease %s: %s\n", fleet.Digest(o.GetRelease()).Short(), sentenceOf(o.GetWhy()))
				}
				fmt.Fprintf(w, "posture\t%s\n", x.GetPosture())
				for _, r := range x.GetRoads() {
					says, do := mesh.Reason(r.GetReason()).Sentence()
					fmt.Fprintf(w, "road\t%s\tdoes not work (%s): %s; at the customer: %s\n", r.GetKind(), r.GetReason(), says, do)
				}
				for _, s := range x.GetServices() {
					fmt.Fprintf(w, "service\t%s\thealthy %v, restarts %d\t%s\n", s.GetName(), s.GetHealthy(), s.GetRestarts(), sentenceOf(s.GetWhy()))
				}
				for _, s := range x.GetSecrets() {
					fmt.Fprintf(w, "secret\t%s\tpresent %v\n", s.GetName(), s.GetPresent())
				}
			})
		})
	ban := a.online(&cobra.Command{Use: "ban NAME", Short: "Make every certificate of an appliance worthless, and close its channel", Args: exactly(1, "the appliance's name")},
		func(ctx context.Context, v *vendor, args []string) error {
			id := draw()
			_, err := ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.BanApplianceResponse, error) {
				return wire(c.BanAppliance(ctx, connect.NewRequest(&controlv1.BanApplianceRequest{RequestId: id, Name: args[0], Reason: reason})))
			})
			if err != nil {
				return err
			}
			return a.say(map[string]string{"banned": args[0]}, "appliance %s is banned", args[0])
		})
	ban.Flags().StringVar(&reason, "reason", "", "for the record")
	return group("appliance", "The appliances at the vendor's customers", add, expect, list, show, ban)
}

func (v *vendor) appliances(ctx context.Context) ([]*controlv1.Appliance, error) {
	m, err := ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.ListAppliancesResponse, error) {
		return wire(c.ListAppliances(ctx, connect.NewRequest(&controlv1.ListAppliancesRequest{})))
	})
	return m.GetAppliances(), err
}

func (v *vendor) appliance(ctx context.Context, name string) (*controlv1.Appliance, error) {
	all, err := v.appliances(ctx)
	if err != nil {
		return nil, err
	}
	for _, x := range all {
		if x.GetName() == name {
			return x, nil
		}
	}
	return nil, fault.New("demarc.appliance", fault.NotFound, "no appliance %q is registered: demarc appliance list", name)
}

func (a *app) release() *cobra.Command {
	var compose string
	var to []string
	c := a.online(&cobra.Command{Use: "publish", Short: "Pack, upload, sign and offer a release", Args: exactly(0, "no arguments"),
		Long:    "publish reads a Compose file with x-demarc, packs the folders that it names, uploads what the control plane does not have, signs the release\nwith the operator's signing key and offers it, once a majority of the voting nodes has its artifacts on disk. It starts nothing: each customer decides.",
		Example: "  demarc release publish --compose app/compose.yaml --appliance eu-1"},
		func(ctx context.Context, v *vendor, _ []string) error {
			rel, packed, err := packRelease(compose)
			if err != nil {
				return err
			}
			defer packed.remove()
			key, err := signer("signing_key", v.SigningKey)
			if err != nil {
				return err
			}
			sealed, err := seal.Seal(rel, key)
			if err != nil {
				return err
			}
			for _, name := range slices.Sorted(maps.Keys(rel.Artifacts)) { // to one node: the others fetch it from there
				if err := a.place(ctx, v, name, packed.path(rel.Artifacts[name]), rel.Artifacts[name]); err != nil {
					return err
				}
			}
			id := draw()
			m, err := ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.PublishReleaseResponse, error) {
				return wire(c.PublishRelease(ctx, connect.NewRequest(&controlv1.PublishReleaseRequest{RequestId: id, Release: sealed, Appliances: to})))
			})
			if err != nil {
				return err
			}
			return a.say(m, "%s %s is published as %s and offered to %d appliances", rel.App, rel.Version, fleet.Digest(m.GetDigest()).Short(), len(m.GetAppliances()))
		})
	c.Flags().StringVar(&compose, "compose", "compose.yaml", "the Compose file")
	c.Flags().StringArrayVar(&to, "appliance", nil, "to whom it is offered; left out, to every appliance")
	return group("release", "Releases of the vendor's application", c)
}

// packs is a folder with packed artifacts.
type packs struct{ dir string }

func (p packs) remove() { _ = os.RemoveAll(p.dir) }

// packRelease reads a Compose file and packs what it names.
func packRelease(compose string) (manifest.Release, packs, error) {
	const op = "demarc.pack"
	text, err := os.ReadFile(compose)
	if err != nil {
		return manifest.Release{}, packs{}, usage("--compose: %v", err)
	}
	spec, err := manifest.ParseCompose(text)
	if err != nil {
		return manifest.Release{}, packs{}, err
	}
	dir, err := os.MkdirTemp("", "demarc-release-")
	if err != nil {
		return manifest.Release{}, packs{}, fault.At(op, fault.Unavailable, err)
	}
	p := packs{dir}
	rel := manifest.Release{App: spec.App, Version: spec.Version, Compose: string(text), Artifacts: map[string]fleet.Digest{}, Templates: map[string]string{}}
	beside := filepath.Dir(compose)
	folders := map[string]string{}
	for _, s := range spec.Services {
		folders[s.Name] = filepath.Join(beside, s.ArtifactDir)
		for _, program := range s.Programs {
			if err := artifact.CheckProgram(folders[s.Name], program); err != nil {
				p.remove()
				return rel, p, fault.Because(err, op, fault.Invalid, "service %s, artifact %s: %s", s.Name, s.ArtifactDir, fault.Text(err))
			}
		}
		d, err := p.pack(filepath.Join(beside, s.ArtifactDir))
		if err != nil {
			p.remove()
			return rel, p, err
		}
		rel.Artifacts[s.Name] = d
	}
	for _, file := range spec.Operations {
		b, err := os.ReadFile(filepath.Join(beside, file))
		if err == nil {
			var t operation.Template
			if t, err = operation.ParseTemplate(b); err == nil && t.Name != manifest.TemplateName(file) {
				err = fault.New(op, fault.Invalid, "%s holds the template %q: the file is called after its template", file, t.Name)
			}
			if err == nil {
				err = checkTemplate(file, t, folders)
			}
		}
		if err != nil {
			p.remove()
			return rel, p, err
		}
		rel.Templates[manifest.TemplateName(file)] = string(b)
	}
	return rel, p, nil
}

// checkTemplate refuses a template whose service or program the release does not have: it could only fail at the customer's.
func checkTemplate(file string, t operation.Template, folders map[string]string) error {
	const op = "demarc.pack"
	if t.Kind != operation.KindExec {
		return nil
	}
	dir, ok := folders[t.Service]
	if !ok {
		return fault.New(op, fault.Invalid, "%s runs in service %q, and the release has no such service", file, t.Service)
	}
	if err := artifact.CheckProgram(dir, t.Run[0]); err != nil {
		return fault.Because(err, op, fault.Invalid, "%s: %s", file, fault.Text(err))
	}
	return nil
}

func (p packs) pack(dir string) (fleet.Digest, error) {
	const op = "demarc.pack"
	f, err := os.CreateTemp(p.dir, "a")
	if err != nil {
		return "", fault.At(op, fault.Unavailable, err)
	}
	defer f.Close()
	d, err := artifact.Pack(dir, f)
	if err != nil {
		return "", err
	}
	return d, fault.At(op, fault.Unavailable, os.Rename(f.Name(), p.path(d)))
}

func (p packs) path(d fleet.Digest) string { return filepath.Join(p.dir, string(d)[len("sha256:"):]) }

func (a *app) evidence() *cobra.Command {
	var file string
	c := a.online(&cobra.Command{Use: "export", Short: "Export the vendor's log with its countersignatures", Args: exactly(0, "no arguments"), Example: "  demarc evidence export --out vendor.json"},
		func(ctx context.Context, v *vendor, _ []string) error {
			return a.save(file, func(restart func() io.Writer) error {
				return v.bulk(ctx, func(ctx context.Context, c controlv1connect.ControlClient, alive func()) error {
					s, err := c.ExportEvidence(ctx, connect.NewRequest(&controlv1.ExportEvidenceRequest{}))
					if err != nil {
						return explain(err)
					}
					return receive(s, restart(), alive)
				})
			})
		})
	c.Flags().StringVar(&file, "out", "", "the file to write")
	return group("evidence", "The vendor's evidence", c)
}

func (a *app) management() *cobra.Command {
	list := &cobra.Command{Use: "list", Short: "List the control planes that this management plane hears of", Args: exactly(0, "no arguments"), Example: "  demarc management list --socket management.sock"}
	list.RunE = func(c *cobra.Command, _ []string) error {
		if a.socket == "" {
			return usage("name the management plane's socket with --socket PATH")
		}
		ctx, cancel := a.bounded(c)
		defer cancel()
		m, err := wire(managementv1connect.NewOverviewClient(a.unix(), "http://management").List(ctx, connect.NewRequest(&managementv1.ListRequest{})))
		if err != nil {
			return err
		}
		return a.emit(m, func(w io.Writer) {
			fmt.Fprintln(w, "CONTROL PLANE\tHEALTH\tNODES\tAPPLIANCES\tONLINE\tCAS\tBUILD")
			for _, p := range m.GetControlPlanes() {
				l := p.GetLast()
				if l == nil {
					fmt.Fprintf(w, "%s\tnever heard\n", p.GetName())
					continue
				}
				fmt.Fprintf(w, "%s\t%s\t%d of %d\t%d\t%d\tbundle %d\t%s\n", p.GetName(), l.GetHealth(), l.GetNodesReachable(), l.GetNodesVoting(),
					l.GetAppliancesRegistered()+l.GetAppliancesEnrolled(), l.GetAppliancesOnline(), p.GetBundle(), l.GetBuild())
			}
		})
	}
	return group("management", "The management plane, for its operator", list)
}
