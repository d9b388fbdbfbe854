// SPDX-License-Identifier: Apache-2.0

package vendor

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/workload/artifact"
)

func releaseCommand(a *cli.App) *cobra.Command {
	var compose string
	var to []string
	c := a.Online(&cobra.Command{
		Use:   "publish",
		Short: "Pack, upload, sign and offer a release",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "publish reads a Compose file with x-demarc, packs the folders that it names, uploads what the control plane does not\n" +
			"have, signs the release with the operator's signing key and offers it, once a majority of the voting nodes has its\n" +
			"artifacts on disk. It starts nothing: each customer decides.",
		Example: "  demarc release publish --compose app/compose.yaml --appliance eu-1",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			rel, packed, err := packRelease(compose)
			if err != nil {
				return err
			}
			defer packed.remove()
			key, err := v.ReleaseSigner()
			if err != nil {
				return err
			}
			sealed, err := seal.Seal(rel, key)
			if err != nil {
				return err
			}
			if err := registered(ctx, v, to); err != nil { // before anything is uploaded
				return err
			}
			for _, name := range slices.Sorted(maps.Keys(rel.Artifacts)) { // to one node: the others fetch it from there
				if err := publishArtifact(ctx, a, v, name, packed.path(rel.Artifacts[name]), rel.Artifacts[name]); err != nil {
					return err
				}
			}
			m, err := client.Call(ctx, v, client.Node.PublishRelease,
				&controlv1.PublishReleaseRequest{RequestId: client.NewID(), Release: sealed, Appliances: to})
			if err != nil {
				return err
			}
			return a.Say(m, "%s %s is published as %s and offered to %d appliances", rel.App, rel.Version, fleet.Digest(m.GetDigest()).Short(),
				len(m.GetAppliances()))
		})
	c.Flags().StringVar(&compose, "compose", "compose.yaml", "the Compose file")
	c.Flags().StringArrayVar(&to, "appliance", nil, "to whom it is offered; left out, to every appliance")
	return cli.Group("release", "Releases of the vendor's application", c)
}

// registered refuses names of which no appliance is registered.
func registered(ctx context.Context, v *client.Client, names []string) error {
	if len(names) == 0 {
		return nil
	}
	all, err := appliances(ctx, v)
	if err != nil {
		return err
	}
	for _, name := range names {
		if _, err := find(all, name); err != nil {
			return err
		}
	}
	return nil
}

// archives is a folder with packed artifacts.
type archives struct{ dir string }

func (p archives) remove() { _ = os.RemoveAll(p.dir) }

// packRelease reads a Compose file and packs what it names.
func packRelease(compose string) (manifest.Release, archives, error) {
	const op = "demarc.pack"
	text, err := os.ReadFile(compose)
	if err != nil {
		return manifest.Release{}, archives{}, cli.Usage("--compose: %v", err)
	}
	spec, err := manifest.ParseCompose(text)
	if err != nil {
		return manifest.Release{}, archives{}, err
	}
	dir, err := os.MkdirTemp("", "demarc-release-")
	if err != nil {
		return manifest.Release{}, archives{}, fault.At(op, fault.Unavailable, err)
	}
	p := archives{dir}
	rel := manifest.Release{App: spec.App, Version: spec.Version, Compose: string(text), Artifacts: map[string]fleet.Digest{},
		Templates: map[string]string{}}
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

func (p archives) pack(dir string) (fleet.Digest, error) {
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

func (p archives) path(d fleet.Digest) string {
	return filepath.Join(p.dir, string(d)[len("sha256:"):])
}
