// SPDX-License-Identifier: Apache-2.0

package vendor

import (
	"bytes"
	"context"
	"encoding/json"
	"os"

	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/identity"
)

const expectHelp = `Flags, or the file of --expect, say which identity of its platform the appliance proves when it enrols; no secret is
handed over:

  AWS         --aws-account 123456789012 --aws-role-arn arn:aws:iam::123456789012:role/appliance [--aws-region eu-central-1]
  GCP         --gcp-project acme-prod --gcp-service-account appliance@acme-prod.iam.gserviceaccount.com
  Kubernetes  --kubernetes-issuer URL --namespace demarc --service-account appliance, and the cluster's keys: --jwks FILE
              (kubectl get --raw /openid/v1/jwks) pins them, --discovery lets the control plane fetch them if its file lists the issuer
  A laptop    --dev-keys FILE --dev-subject NAME (demarc platform dev), in a trust domain that was made with --development`

// expectFlags are the flags that say what an appliance must prove.
type expectFlags struct {
	file, jwks string
	devKeys    string
	e          identity.Expect
	document   []byte // the registration, checked before a call
}

func (x *expectFlags) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&x.file, "expect", "", "file with the platform identity, in place of the flags below")
	f.StringVar(&x.e.Account, "aws-account", "", "12 digits")
	f.StringVar(&x.e.RoleARN, "aws-role-arn", "", "the role of the appliance")
	f.StringArrayVar(&x.e.Regions, "aws-region", nil, "a region whose STS may vouch; left out, any of the role's partition")
	f.StringVar(&x.e.Project, "gcp-project", "", "the project's ID")
	gcp := ""
	f.StringVar(&gcp, "gcp-service-account", "", "email address of the service account of the virtual machine")
	f.StringVar(&x.e.UniqueID, "gcp-unique-id", "", "unique id of the service account; left out, that of the first proof")
	f.StringVar(&x.e.Zone, "gcp-zone", "", "left out, any")
	f.StringVar(&x.e.Instance, "gcp-instance", "", "name of the virtual machine; left out, any")
	f.StringVar(&x.e.Issuer, "kubernetes-issuer", "", "the cluster's --service-account-issuer")
	f.StringVar(&x.e.Namespace, "namespace", "", "of the appliance in its cluster")
	f.StringVar(&x.e.ServiceAccount, "service-account", "", "of the appliance in its cluster")
	f.StringVar(&x.jwks, "jwks", "", "file with the cluster's public keys, which are pinned")
	f.BoolVar(&x.e.Discovery, "discovery", false, "fetch the cluster's keys from the issuer, if the control plane lists it")
	f.StringVar(&x.devKeys, "dev-keys", "", "file with the public key that demarc platform dev init wrote")
	f.StringVar(&x.e.Subject, "dev-subject", "", "the --name of demarc platform dev token")
	c.PreRunE = func(*cobra.Command, []string) error {
		if gcp != "" && x.e.ServiceAccount != "" {
			return cli.Usage("--service-account is of Kubernetes, --gcp-service-account of GCP: give one of them")
		}
		if gcp != "" {
			x.e.ServiceAccount = gcp
		}
		var err error
		x.document, err = x.compose()
		return err
	}
}

// compose makes the registration of the flags.
func (x *expectFlags) compose() ([]byte, error) {
	e := x.e
	if x.file != "" {
		e.Regions = nil
		if b, err := json.Marshal(e); err != nil || string(b) != `{"kind":""}` || len(x.e.Regions) > 0 || x.jwks != "" || x.devKeys != "" {
			return nil, cli.Usage("--expect says all that is registered: leave the other flags out")
		}
		b, err := os.ReadFile(x.file)
		if err != nil {
			return nil, cli.Usage("--expect: %v", err)
		}
		return bytes.TrimSpace(b), nil
	}
	switch {
	case e.Account != "" || e.RoleARN != "":
		e.Kind = identity.KindAWS
	case e.Project != "":
		e.Kind = identity.KindGCP
	case e.Issuer != "":
		e.Kind = identity.KindKubernetes
	case x.devKeys != "" || e.Subject != "":
		e.Kind = identity.KindDev
	default:
		return nil, cli.Usage("say what the appliance proves: --aws-role-arn, --gcp-project, --kubernetes-issuer, --dev-keys or --expect FILE")
	}
	if x.devKeys != "" && (x.jwks != "" || e.Kind != identity.KindDev) {
		return nil, cli.Usage("--dev-keys is of a laptop: leave the flags of platforms out")
	}
	if x.devKeys != "" {
		b, err := os.ReadFile(x.devKeys)
		if err != nil {
			return nil, cli.Usage("--dev-keys: %v", err)
		}
		e.JWKS = bytes.TrimSpace(b)
	}
	if x.jwks != "" {
		b, err := os.ReadFile(x.jwks)
		if err != nil {
			return nil, cli.Usage("--jwks: %v", err)
		}
		e.JWKS = bytes.TrimSpace(b)
	}
	if e.Kind == identity.KindKubernetes && x.jwks == "" && !e.Discovery {
		return nil, cli.Usage("say where the cluster's keys come from: --jwks FILE or --discovery")
	}
	if e.Kind == identity.KindDev && (x.devKeys == "" || e.Subject == "") {
		return nil, cli.Usage("a development identity needs --dev-keys FILE and --dev-subject NAME")
	}
	if err := e.Check(); err != nil {
		return nil, flagError(err, e.Kind)
	}
	return json.Marshal(e)
}

func registerCommand(a *cli.App) *cobra.Command {
	var customer string
	var x expectFlags
	c := a.Online(&cobra.Command{
		Use:     "register NAME",
		Aliases: []string{"add"},
		Short:   "Register an appliance and the platform identity that it must prove",
		Args:    cli.Exactly(1, "the appliance's name"),
		Long:    expectHelp,
		Example: "  demarc appliance register eu-1 --customer globex --aws-account 123456789012 --aws-role-arn " +
			"arn:aws:iam::123456789012:role/appliance",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			_, err := client.Call(ctx, v, client.Node.RegisterAppliance,
				&controlv1.RegisterApplianceRequest{RequestId: client.NewID(), Name: args[0], Customer: customer, Expect: x.document})
			if err != nil {
				return err
			}
			return a.Say(map[string]string{"appliance": args[0], "customer": customer}, "appliance %s of %s is registered: it may enrol", args[0],
				customer)
		})
	c.Flags().StringVar(&customer, "customer", "", "whose it is")
	x.flags(c)
	check := c.PreRunE
	c.PreRunE = func(c *cobra.Command, args []string) error {
		if customer == "" {
			return cli.Usage("say whose appliance it is with --customer NAME")
		}
		return check(c, args)
	}
	return c
}
