// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/cmd/demarc/internal/estate"
	"github.com/demarc-dev/demarc/cmd/demarc/internal/keyfile"
)

type initDoc struct {
	Dir         string   `json:"dir"`
	TrustDomain string   `json:"trust_domain"`
	Nodes       []string `json:"nodes"`   // configuration of each
	Context     string   `json:"context"` // of the operator
	Bundle      string   `json:"bundle"`
	ReleaseKey  string   `json:"release_key"`
}

func (a *app) controlPlane() *cobra.Command {
	return group("control-plane", "Begin a control plane (offline)", "", a.controlPlaneInit())
}

func (a *app) controlPlaneInit() *cobra.Command {
	var o estate.Options
	var dir, ca string
	var nodes []string
	c := &cobra.Command{
		Use:   "init --dir DIR --trust-domain NAME --node NAME=RAFT_ADDR,API_ADDR ...",
		Short: "Make the trust domain: its CA, its nodes, its first operator",
		Long: `Makes the folder DIR with all that a control plane begins with. Nothing is sent anywhere, and nothing is overwritten.

  nodes/NAME       one folder for each machine: demarcd.yaml, certificate, and the key (kek) that seals the CA's
  operators/NAME   for the person: certificate, signing key, and operator.yaml for DEMARC_CONTEXT
  bundle.pem       for appliances: whom they recognise the vendor by
  release-key.pem  for appliances: who may sign releases

Keep a copy of one kek offline: without it the CA's key is lost. Remove the folders from here once they are where
they belong.`,
		Example: `  demarc control-plane init --dir estate --trust-domain acme.example \
    --node cp-1=10.0.0.1:7444,cp-1.acme.example:7443 \
    --node cp-2=10.0.0.2:7444,cp-2.acme.example:7443 \
    --node cp-3=10.0.0.3:7444,cp-3.acme.example:7443`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) (err error) {
			for _, s := range nodes {
				n, err := estate.ParseNode(s)
				if err != nil {
					return usage("%s", sentence(err))
				}
				o.Nodes = append(o.Nodes, n)
			}
			if (o.Management == "") != (ca == "") {
				return usage("--management and --management-ca go together")
			}
			if ca != "" {
				if o.ManagementCA, err = keyfile.Read(ca); err != nil {
					return err
				}
			}
			o.Now = a.now()
			files, err := estate.Make(o)
			if err != nil {
				return err
			}
			if err := estate.Write(dir, files); err != nil {
				return err
			}
			return a.printInit(dir, o)
		},
	}
	f := c.Flags()
	f.StringVar(&dir, "dir", "", "folder to make")
	f.StringVar(&o.TrustDomain, "trust-domain", "", "the vendor's name in every certificate, a DNS name")
	f.StringArrayVar(&nodes, "node", nil, "NAME=RAFT_ADDR,API_ADDR[,METRICS_ADDR]; 1, 3 or 5 times")
	f.StringVar(&o.Operator, "operator", "admin", "name of the first operator")
	f.StringVar(&o.Management, "management", "", "URL of the management plane that is told about health")
	f.StringVar(&ca, "management-ca", "", "file with the CA of the management plane")
	f.StringVar(&o.ManagementName, "management-name", "", "name of this control plane there (first label of the trust domain)")
	f.DurationVar(&o.CertificateTTL, "certificate-life", 365*24*time.Hour, "life of the nodes' and the operator's certificates")
	require(c, "dir", "trust-domain", "node")
	return c
}

func (a *app) printInit(dir string, o estate.Options) error {
	doc := initDoc{Dir: dir, TrustDomain: o.TrustDomain, Bundle: filepath.Join(dir, "bundle.pem"), ReleaseKey: filepath.Join(dir, "release-key.pem"),
		Context: filepath.Join(dir, "operators", o.Operator, "operator.yaml")}
	for _, n := range o.Nodes {
		doc.Nodes = append(doc.Nodes, filepath.Join(dir, "nodes", n.Name, "demarcd.yaml"))
	}
	return a.print(doc, func(w io.Writer) {
		fmt.Fprintf(w, "The trust domain %s is made. Start each node on its machine:\n", o.TrustDomain)
		for _, n := range doc.Nodes {
			fmt.Fprintf(w, "  demarcd -c %s\n", n)
		}
		fmt.Fprintf(w, "then, as %s:\n  export DEMARC_CONTEXT=%s\n  demarc status\n", o.Operator, doc.Context)
		fmt.Fprintf(w, "For appliances: %s and %s.\n", doc.Bundle, doc.ReleaseKey)
	})
}

// require marks flags without which the command means nothing.
func require(c *cobra.Command, flags ...string) {
	run := c.RunE
	c.RunE = func(c *cobra.Command, args []string) error {
		for _, f := range flags {
			if !c.Flags().Changed(f) {
				return usage("--%s is needed; see %s --help", f, c.CommandPath())
			}
		}
		return run(c, args)
	}
}
