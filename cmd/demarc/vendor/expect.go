// SPDX-License-Identifier: Apache-2.0

package vendor

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// flags are the flags that set the fields of a registration.
var flags = map[string]string{
	"issuer":          "--kubernetes-issuer",
	"namespace":       "--namespace",
	"service_account": "--service-account or --gcp-service-account",
	"discovery":       "--discovery",
	"jwks":            "--jwks",
	"account":         "--aws-account",
	"role_arn":        "--aws-role-arn",
	"regions":         "--aws-region",
	"project":         "--gcp-project",
	"unique_id":       "--gcp-unique-id",
	"zone":            "--gcp-zone",
	"instance":        "--gcp-instance",
	"subject":         "--dev-subject",
}

// flagsOf are the flags of one kind that differ.
var flagsOf = map[string]map[string]string{
	identity.KindKubernetes: {"service_account": "--service-account"},
	identity.KindGCP:        {"service_account": "--gcp-service-account"},
	identity.KindDev:        {"jwks": "--dev-keys"},
}

// flagError names the flags that are wrong, in place of the fields of the registration.
func flagError(err error, kind string) error {
	f, ok := errors.AsType[*identity.FieldError](err)
	if !ok {
		return cli.Usage("%s", fault.Text(err))
	}
	return cli.Usage("%s", f.Sentence(func(field string) string {
		return cmp.Or(flagsOf[kind][field], flags[field], field)
	}))
}

// registration is what expect prints: the registration, and the keys of the cluster by their names.
type registration struct {
	Appliance string          `json:"appliance"`
	Expect    json.RawMessage `json:"expect"`
	Pinned    []namedKey      `json:"pinned,omitempty"`
	InUse     []namedKey      `json:"in_use,omitempty"`
	Reported  []namedKey      `json:"reported,omitempty"`
	Digest    string          `json:"reported_digest,omitempty"`
}

type namedKey struct {
	ID         string `json:"kid"`
	Thumbprint string `json:"thumbprint"`
}

// describe reads a registration as it is printed.
func describe(name string, m *controlv1.GetExpectResponse) (registration, error) {
	out := registration{Appliance: name, Expect: m.GetExpect(), Digest: m.GetDigest()}
	var e identity.Expect
	if err := json.Unmarshal(m.GetExpect(), &e); err != nil {
		return out, fault.At("demarc.expect", fault.Invalid, err)
	}
	for _, part := range []struct {
		jwks []byte
		to   *[]namedKey
	}{{e.JWKS, &out.Pinned}, {m.GetInUse(), &out.InUse}, {m.GetReported(), &out.Reported}} {
		if len(part.jwks) == 0 {
			continue
		}
		keys, err := identity.ParseKeys(part.jwks)
		if err != nil {
			return out, err
		}
		names, err := keys.Names()
		if err != nil {
			return out, err
		}
		for _, n := range names {
			*part.to = append(*part.to, namedKey(n))
		}
	}
	return out, nil
}

func (s registration) print(w io.Writer) {
	var e map[string]any
	_ = json.Unmarshal(s.Expect, &e) // describe has read it
	delete(e, "jwks")
	b, _ := json.Marshal(e)
	fmt.Fprintf(w, "appliance\t%s\nproves\t%s\n", s.Appliance, b)
	printKeys(w, "pinned", s.Pinned)
	printKeys(w, "in use", s.InUse)
	printKeys(w, "reported", s.Reported)
	if len(s.Reported) > 0 {
		fmt.Fprintf(w, "the reported keys prove nothing yet: compare them with what the customer reads in the cluster (kubectl get --raw "+
			"/openid/v1/jwks), then\n  demarc appliance expect %s --confirm-keys %s\n", s.Appliance, s.Digest)
	}
}

func printKeys(w io.Writer, what string, keys []namedKey) {
	for _, k := range keys {
		fmt.Fprintf(w, "%s\t%s\tthumbprint %s\n", what, k.ID, k.Thumbprint)
	}
}

func expectCommand(a *cli.App) *cobra.Command {
	var x expectFlags
	var confirm string
	var forget bool
	count := 0 // of the flags that are set
	c := a.Online(&cobra.Command{
		Use:   "expect NAME",
		Short: "Show or replace the platform identity that an appliance must prove, and the keys of its cluster",
		Args: cli.Exactly(1,
			"the appliance's name"),
		Long: "Without flags, expect shows what is registered, and which keys of the appliance's cluster count.\n\n" +
			"With an identity it replaces what is registered: for an appliance whose cluster rotated its keys while it was away,\n" +
			"that moved, or whose service account or role was made anew. Its name, certificates and history stay; which account\n" +
			"proved it before is forgotten, and so are keys that it reported.\n\n" +
			"An appliance reports new keys of its cluster. They count if a key that counted before vouches for them. Others wait:\n" +
			"--confirm-keys DIGEST makes them count, --forget-keys goes back to those that are registered. Each change is in the\n" +
			"vendor's log.\n\n" +
			expectHelp,
		Example: "  demarc appliance expect eu-1\n" +
			"  demarc appliance expect eu-1 --confirm-keys sha256:9f2c...\n" +
			"  demarc appliance expect eu-1 --kubernetes-issuer https://kubernetes.default.svc --namespace demarc --service-account appliance " +
			"--jwks keys.json",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			switch {
			case forget:
				return forgetKeys(ctx, a, v, args[0])
			case confirm != "":
				return confirmKeys(ctx, a, v, args[0], confirm)
			case count == 0:
				return showExpect(ctx, a, v, args[0])
			}
			_, err := client.Call(ctx, v, client.Node.SetExpect,
				&controlv1.SetExpectRequest{RequestId: client.NewID(), Name: args[0], Expect: x.document})
			if err != nil {
				return err
			}
			return a.Say(map[string]string{"appliance": args[0]}, "appliance %s proves what is registered now when it enrols next", args[0])
		})
	x.flags(c)
	c.Flags().StringVar(&confirm, "confirm-keys", "", "digest of the reported keys that count from now on")
	c.Flags().BoolVar(&forget, "forget-keys", false, "go back to the keys that are registered")
	compose := c.PreRunE
	c.PreRunE = func(c *cobra.Command, args []string) error {
		c.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
			if f.Changed {
				count++
			}
		})
		if confirm == "" && !forget {
			if count == 0 {
				return nil
			}
			return compose(c, args)
		}
		if count > 1 {
			return cli.Usage("--confirm-keys and --forget-keys take no other flag")
		}
		return nil
	}
	return c
}

func showExpect(ctx context.Context, a *cli.App, v *client.Client, name string) error {
	m, err := client.Call(ctx, v, client.Node.GetExpect, &controlv1.GetExpectRequest{Name: name})
	if err != nil {
		return err
	}
	s, err := describe(name, m)
	if err != nil {
		return err
	}
	return a.Emit(s, s.print)
}

func confirmKeys(ctx context.Context, a *cli.App, v *client.Client, name, digest string) error {
	_, err := client.Call(ctx, v, client.Node.ConfirmKeys,
		&controlv1.ConfirmKeysRequest{RequestId: client.NewID(), Name: name, Digest: digest})
	if err != nil {
		return err
	}
	return a.Say(map[string]string{"appliance": name, "confirmed": digest}, "appliance %s proves itself with the keys %s from now on", name,
		digest)
}

func forgetKeys(ctx context.Context, a *cli.App, v *client.Client, name string) error {
	_, err := client.Call(ctx, v, client.Node.ForgetKeys, &controlv1.ForgetKeysRequest{RequestId: client.NewID(), Name: name})
	if err != nil {
		return err
	}
	return a.Say(map[string]string{"appliance": name}, "appliance %s proves itself with the keys that are registered", name)
}
