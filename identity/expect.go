// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"encoding/json"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// The closed set of platforms that can vouch for an appliance.
const (
	KindKubernetes = "kubernetes" // a service-account token of a cluster
	KindAWS        = "aws"        // a signed sts:GetCallerIdentity request
	KindGCP        = "gcp"        // an identity token of the metadata server
	KindDev        = "dev"        // a token of demarc platform dev, for a trust domain that was made for development
)

// Bounds of a proof.
const (
	MaxToken = 16 << 10
	MaxJWKS  = 64 << 10
	maxKeys  = 16
	skew     = 2 * time.Minute
)

// Expect is what the vendor registers before an appliance calls: which platform vouches for it, and as whom. A field
// belongs to one kind or is refused. Its JSON stands in the vendor's book: fields are added, never changed.
type Expect struct {
	Kind string `json:"kind"`

	// Kubernetes: the cluster's --service-account-issuer, and its public keys, pinned here; or, with Discovery, fetched
	// from the issuer, where the control plane's operator has listed it.
	Issuer    string          `json:"issuer,omitempty"`
	JWKS      json.RawMessage `json:"jwks,omitempty"`
	Discovery bool            `json:"discovery,omitempty"`
	Namespace string          `json:"namespace,omitempty"`

	// ServiceAccount is a name in the namespace (Kubernetes) or an email address (GCP).
	ServiceAccount string `json:"service_account,omitempty"`

	// AWS.
	Account string   `json:"account,omitempty"`  // 12 digits
	RoleARN string   `json:"role_arn,omitempty"` // arn:aws:iam::<account>:role/<path><name>
	Regions []string `json:"regions,omitempty"`  // of the STS endpoint; none: any of the role's partition

	// GCP.
	Project  string `json:"project,omitempty"`
	UniqueID string `json:"unique_id,omitempty"` // of the service account; "": any
	Zone     string `json:"zone,omitempty"`      // of the virtual machine; "": any
	Instance string `json:"instance,omitempty"`  // name of the virtual machine; "": any

	// Development: the name that the token is for; its key is pinned in JWKS.
	Subject string `json:"subject,omitempty"`
}

// Proven is what a platform vouched for.
type Proven struct {
	Kind    string
	Issuer  string
	Subject string
	UID     string // of the account or role: another one of the same name has another. "" where the platform told none
	Pod     string // Kubernetes; "" where the token is bound to none
	Expires time.Time
}

// Check tells whether a registration can ever be met.
func (e Expect) Check() error {
	const op = "identity.Expect"
	var foreign string
	fields := []struct {
		name, kinds string
		set         bool
	}{
		{"issuer", KindKubernetes, e.Issuer != ""},
		{"jwks", KindKubernetes + KindDev, len(e.JWKS) > 0},
		{"discovery", KindKubernetes, e.Discovery},
		{"namespace", KindKubernetes, e.Namespace != ""},
		{"service_account", KindKubernetes + KindGCP, e.ServiceAccount != ""},
		{"account", KindAWS, e.Account != ""},
		{"role_arn", KindAWS, e.RoleARN != ""},
		{"regions", KindAWS, len(e.Regions) > 0},
		{"project", KindGCP, e.Project != ""},
		{"unique_id", KindGCP, e.UniqueID != ""},
		{"zone", KindGCP, e.Zone != ""},
		{"instance", KindGCP, e.Instance != ""},
		{"subject", KindDev, e.Subject != ""},
	}
	for _, f := range fields {
		if f.set && !oneOf(f.kinds, e.Kind) {
			foreign = f.name
		}
	}
	switch {
	case e.Kind != KindKubernetes && e.Kind != KindAWS && e.Kind != KindGCP && e.Kind != KindDev:
		return fault.New(op, fault.Invalid, "proof of kind %q: use %s, %s, %s or %s", fault.Clip(e.Kind), KindAWS, KindGCP, KindKubernetes, KindDev)
	case foreign != "":
		return fault.New(op, fault.Invalid, "%s does not belong to a proof of kind %s: leave it out", foreign, e.Kind)
	}
	switch e.Kind {
	case KindAWS:
		_, err := e.role()
		return err
	case KindGCP:
		return e.checkGCP()
	case KindDev:
		return e.checkDev()
	}
	return e.checkKubernetes()
}

func oneOf(kinds, kind string) bool {
	switch kinds {
	case KindKubernetes + KindGCP:
		return kind == KindKubernetes || kind == KindGCP
	case KindKubernetes + KindDev:
		return kind == KindKubernetes || kind == KindDev
	}
	return kinds == kind
}

func (e Expect) checkKubernetes() error {
	const op = "identity.Expect"
	if e.Issuer == "" || len(e.Issuer) > 512 {
		return fault.New(op, fault.Invalid, "issuer: give the cluster's --service-account-issuer, in at most 512 bytes")
	}
	if e.Issuer == DevIssuer {
		return fault.New(op, fault.Invalid, "issuer %q is that of development tokens: no cluster has it", DevIssuer)
	}
	if err := fleet.CheckName("namespace", e.Namespace); err != nil {
		return err
	}
	if !subdomain(e.ServiceAccount) {
		return fault.New(op, fault.Invalid, "service account %q: use lower-case letters, digits, dots and hyphens", fault.Clip(e.ServiceAccount))
	}
	switch {
	case e.Discovery && len(e.JWKS) > 0:
		return fault.New(op, fault.Invalid, "the keys are pinned (jwks) or fetched (discovery): give one of them")
	case e.Discovery:
		return CheckIssuer(e.Issuer)
	}
	_, err := ParseKeys(e.JWKS)
	return err
}
