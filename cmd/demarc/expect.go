// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// flagOf gives the flag that a field of a registration is set with, by how a sentence about the field begins.
var flagOf = []struct{ begins, kind, flag string }{
	{"issuer", identity.KindKubernetes, "--kubernetes-issuer"},
	{"namespace name", identity.KindKubernetes, "--namespace"},
	{"namespace", "", "--namespace"},
	{"service account", identity.KindKubernetes, "--service-account"},
	{"service account", identity.KindGCP, "--gcp-service-account"},
	{"service_account", "", "--service-account or --gcp-service-account"},
	{"discovery", "", "--discovery"},
	{"jwks", "", "--jwks"},
	{"account", "", "--aws-account"},
	{"role_arn", "", "--aws-role-arn"},
	{"regions", "", "--aws-region"},
	{"project", "", "--gcp-project"},
	{"unique id", "", "--gcp-unique-id"},
	{"unique_id", "", "--gcp-unique-id"},
	{"zone", "", "--gcp-zone"},
	{"instance", "", "--gcp-instance"},
	{"issuer", "", "--kubernetes-issuer"},
	{"development name", "", "--dev-subject"},
	{"subject", "", "--dev-subject"},
}

// asFlags has a sentence about a registration name the flag that is wrong, in place of the field of the document.
func asFlags(sentence, kind string) string {
	switch {
	case strings.HasPrefix(sentence, "the role is of the account"):
		return "--aws-account and --aws-role-arn name different accounts"
	case strings.HasPrefix(sentence, "the keys are pinned"):
		return "--jwks pins the keys, --discovery has them fetched: give one of them"
	case kind == identity.KindDev && (strings.HasPrefix(sentence, "JWKS") || strings.HasPrefix(sentence, "the JWKS")):
		return "--dev-keys: " + sentence
	case strings.HasPrefix(sentence, "JWKS"), strings.HasPrefix(sentence, "the JWKS"):
		return "--jwks: " + sentence
	case strings.Contains(sentence, "is no region"), strings.HasPrefix(sentence, "region"):
		return "--aws-region: " + sentence
	}
	for _, f := range flagOf {
		if rest, ok := strings.CutPrefix(sentence, f.begins); ok && (f.kind == "" || f.kind == kind) {
			return f.flag + rest
		}
	}
	return sentence
}

// shown is what expect shows: the registration, and the keys of the cluster by their names.
type shown struct {
	Appliance string          `json:"appliance"`
	Expect    json.RawMessage `json:"expect"`
	Pinned    []shownKey      `json:"pinned,omitempty"`
	InUse     []shownKey      `json:"in_use,omitempty"`
	Reported  []shownKey      `json:"reported,omitempty"`
	Digest    string          `json:"reported_digest,omitempty"`
}

type shownKey struct {
	ID         string `json:"kid"`
	Thumbprint string `json:"thumbprint"`
}

func show(name string, m *controlv1.GetExpectResponse) (shown, error) {
	out := shown{Appliance: name, Expect: m.GetExpect(), Digest: m.GetDigest()}
	var e identity.Expect
	if err := json.Unmarshal(m.GetExpect(), &e); err != nil {
		return out, fault.At("demarc.expect", fault.Invalid, err)
	}
	for _, part := range []struct {
		jwks []byte
		to   *[]shownKey
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
			*part.to = append(*part.to, shownKey(n))
		}
	}
	return out, nil
}

func (s shown) print(w io.Writer) {
	var e map[string]any
	_ = json.Unmarshal(s.Expect, &e) // show has read it
	delete(e, "jwks")
	b, _ := json.Marshal(e)
	fmt.Fprintf(w, "appliance\t%s\nproves\t%s\n", s.Appliance, b)
	printKeys(w, "pinned", s.Pinned)
	printKeys(w, "in use", s.InUse)
	printKeys(w, "reported", s.Reported)
	if len(s.Reported) > 0 {
		fmt.Fprintf(w, "the reported keys prove nothing yet: compare them with what the customer reads in the cluster (kubectl get --raw /openid/v1/jwks), then\n  demarc appliance expect %s --confirm-keys %s\n", s.Appliance, s.Digest)
	}
}

func printKeys(w io.Writer, what string, keys []shownKey) {
	for _, k := range keys {
		fmt.Fprintf(w, "%s\t%s\tthumbprint %s\n", what, k.ID, k.Thumbprint)
	}
}

func (a *app) expect() *cobra.Command {
	var x expected
	var confirm string
	var forget bool
	given := 0 // flags of this command
	c := a.online(&cobra.Command{Use: "expect NAME", Short: "Show or replace the platform identity that an appliance must prove, and the keys of its cluster", Args: exactly(1, "the appliance's name"),
		Long: "Without flags, expect shows what is registered, and which keys of the appliance's cluster count.\n\n" +
			"With an identity it replaces what is registered: for an appliance whose cluster rotated its keys while it was away, that moved, or whose\n" +
			"service account or role was made anew. Its name, certificates and history stay; which account proved it before is forgotten, and so are keys\n" +
			"that it reported.\n\n" +
			"An appliance reports new keys of its cluster. They count where a key that counted before vouches for them. Others wait: --confirm-keys DIGEST\n" +
			"makes them count, --forget-keys goes back to those that are registered. Each change is in the vendor's log.\n\n" + expectHelp,
		Example: "  demarc appliance expect eu-1\n  demarc appliance expect eu-1 --confirm-keys sha256:9f2c...\n  demarc appliance expect eu-1 --kubernetes-issuer https://kubernetes.default.svc --namespace demarc --service-account appliance --jwks keys.json"},
		func(ctx context.Context, v *vendor, args []string) error {
			switch {
			case forget:
				return a.forgetKeys(ctx, v, args[0])
			case confirm != "":
				return a.confirmKeys(ctx, v, args[0], confirm)
			case given == 0:
				return a.showExpect(ctx, v, args[0])
			}
			id := draw()
			_, err := ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.SetExpectResponse, error) {
				return wire(c.SetExpect(ctx, connect.NewRequest(&controlv1.SetExpectRequest{RequestId: id, Name: args[0], Expect: x.document})))
			})
			if err != nil {
				return err
			}
			return a.say(map[string]string{"appliance": args[0]}, "appliance %s proves what is registered now when it enrols next", args[0])
		})
	x.flags(c)
	c.Flags().StringVar(&confirm, "confirm-keys", "", "digest of the reported keys that count from now on")
	c.Flags().BoolVar(&forget, "forget-keys", false, "go back to the keys that are registered")
	compose := c.PreRunE
	c.PreRunE = func(c *cobra.Command, args []string) error {
		c.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
			if f.Changed {
				given++
			}
		})
		if confirm == "" && !forget {
			if given == 0 {
				return nil
			}
			return compose(c, args)
		}
		if given > 1 {
			return usage("--confirm-keys and --forget-keys stand alone")
		}
		return nil
	}
	return c
}

func (a *app) showExpect(ctx context.Context, v *vendor, name string) error {
	m, err := askIssuerKeys(ctx, v, func(ctx context.Context, c controlv1connect.IssuerKeysClient) (*controlv1.GetExpectResponse, error) {
		return wire(c.GetExpect(ctx, connect.NewRequest(&controlv1.GetExpectRequest{Name: name})))
	})
	if err != nil {
		return err
	}
	s, err := show(name, m)
	if err != nil {
		return err
	}
	return a.emit(s, s.print)
}

func (a *app) confirmKeys(ctx context.Context, v *vendor, name, digest string) error {
	id := draw()
	_, err := askIssuerKeys(ctx, v, func(ctx context.Context, c controlv1connect.IssuerKeysClient) (*controlv1.ConfirmKeysResponse, error) {
		return wire(c.ConfirmKeys(ctx, connect.NewRequest(&controlv1.ConfirmKeysRequest{RequestId: id, Name: name, Digest: digest})))
	})
	if err != nil {
		return err
	}
	return a.say(map[string]string{"appliance": name, "confirmed": digest}, "appliance %s proves itself with the keys %s from now on", name, digest)
}

func (a *app) forgetKeys(ctx context.Context, v *vendor, name string) error {
	id := draw()
	_, err := askIssuerKeys(ctx, v, func(ctx context.Context, c controlv1connect.IssuerKeysClient) (*controlv1.ForgetKeysResponse, error) {
		return wire(c.ForgetKeys(ctx, connect.NewRequest(&controlv1.ForgetKeysRequest{RequestId: id, Name: name})))
	})
	if err != nil {
		return err
	}
	return a.say(map[string]string{"appliance": name}, "appliance %s proves itself with the keys that are registered", name)
}
