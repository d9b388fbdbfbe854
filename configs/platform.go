// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"fmt"
	"net/url"
	"strings"

	"github.com/demarc-dev/demarc/fault"
)

// Proof is how the appliance shows the platform that it runs on. Where a section is left out, it is found as the
// platform's own libraries find it.
type Proof struct {
	Kind       string           `yaml:"kind" need:"yes"`
	AWS        *AWSProof        `yaml:"aws,omitempty"`
	Kubernetes *KubernetesProof `yaml:"kubernetes,omitempty"`
	// Kubernetes, and needed for dev: run with the audience as its last argument; prints a token
	TokenCommand []string `yaml:"token_command,omitempty"`
}

// AWSProof says which STS is meant.
type AWSProof struct {
	Region string `yaml:"region,omitempty" is:"name"` // that of AWS_REGION, the shared file or the instance where absent
}

// KubernetesProof says how the appliance asks its API server for a token. All keys are those of a pod where absent.
type KubernetesProof struct {
	APIServer string `yaml:"api_server,omitempty" is:"url"`  // https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT
	CAFile    string `yaml:"ca_file,omitempty" is:"path"`    // that of the service account
	TokenFile string `yaml:"token_file,omitempty" is:"path"` // that of the service account: what the appliance asks with, not what it shows
}

func (p Proof) problems(bad badFunc) {
	switch p.Kind {
	case ProofAWS, ProofGCP, ProofKubernetes, "":
	case ProofDev:
		if len(p.TokenCommand) == 0 {
			bad("proof.token_command", "missing: [demarc, platform, dev, token, --dir, DIR, --name, NAME, --audience]")
		}
	default:
		bad("proof.kind", "%q: use %s, %s, %s or %s", fault.Clip(p.Kind), ProofAWS, ProofGCP, ProofKubernetes, ProofDev)
		return
	}
	if p.AWS != nil && p.Kind != ProofAWS {
		bad("proof.aws", "belongs to the kind %s only", ProofAWS)
	}
	if p.Kubernetes != nil && p.Kind != ProofKubernetes {
		bad("proof.kubernetes", "belongs to the kind %s only", ProofKubernetes)
	}
	if len(p.TokenCommand) > 0 && p.Kind != ProofKubernetes && p.Kind != ProofDev {
		bad("proof.token_command", "belongs to the kinds %s and %s only", ProofKubernetes, ProofDev)
	}
	if p.Kubernetes != nil && len(p.TokenCommand) > 0 {
		bad("proof", "name one of kubernetes and token_command")
	}
	if k := p.Kubernetes; k != nil && k.APIServer != "" && !strings.HasPrefix(k.APIServer, "https://") {
		bad("proof.kubernetes.api_server", "an https URL is needed: the appliance shows its token there")
	}
}

// Platforms is whom the control plane asks about proofs. AWS needs no entry: the hosts of STS are a fixed list.
type Platforms struct {
	GoogleKeys string    `yaml:"google_keys,omitempty" is:"url"` // where Google's keys are, if not at Google's own place
	Kubernetes Discovery `yaml:"kubernetes,omitempty"`
}

// Discovery lists the clusters whose keys may be fetched.
type Discovery struct {
	Issuers []Issuer `yaml:"issuers,omitempty"`
}

// Issuer is one cluster's --service-account-issuer.
type Issuer struct {
	URL         string `yaml:"url" is:"url" need:"yes"`     // exactly as it is in the tokens
	CAFile      string `yaml:"ca_file,omitempty" is:"path"` // the system's CAs where absent
	PrivateHost string `yaml:"private_host,omitempty"`      // the URL's host again, to allow that it has a private or loopback address
}

func (p Platforms) problems(bad badFunc) {
	if p.GoogleKeys != "" && !strings.HasPrefix(p.GoogleKeys, "https://") {
		bad("platforms.google_keys", "an https URL is needed")
	}
	for i, is := range p.Kubernetes.Issuers {
		key := fmt.Sprintf("platforms.kubernetes.issuers[%d]", i)
		u, err := url.Parse(is.URL)
		if err != nil || u.Scheme != "https" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
			bad(key+".url", "an https URL without user, query or fragment is needed")
		} else if is.PrivateHost != "" && is.PrivateHost != u.Hostname() {
			bad(key+".private_host", "%q is not the host of the url", fault.Clip(is.PrivateHost))
		}
	}
	once(bad, "platforms.kubernetes.issuers", p.Kubernetes.Issuers, "url", func(i Issuer) string { return i.URL })
}
