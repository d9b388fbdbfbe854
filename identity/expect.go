// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"encoding/json"
	"fmt"
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

// FieldError says which field of a registration is wrong, and how. [Expect.Check] returns it inside a fault.
type FieldError struct {
	Field string // as the document spells it, for instance "role_arn"
	Other string // a field that contradicts it, "" for none
	rest  string // of the sentence, after the fields
	err   error
}

// Error implements error.
func (e *FieldError) Error() string { return e.Sentence(func(field string) string { return field }) }

// Unwrap returns the cause, nil for none.
func (e *FieldError) Unwrap() error { return e.err }

// Sentence says what is wrong, with the names that the caller has for the fields.
func (e *FieldError) Sentence(name func(field string) string) string {
	s := name(e.Field)
	if e.Other != "" {
		s += " and " + name(e.Other)
	}
	return s + e.rest
}

// wrong makes the fault of a field; the sentence continues after the field's name.
func wrong(field string, because error, format string, args ...any) error {
	return atFields(&FieldError{Field: field, rest: fmt.Sprintf(format, args...), err: because})
}

// contradict makes the fault of two fields.
func contradict(field, other, format string, args ...any) error {
	return atFields(&FieldError{Field: field, Other: other, rest: fmt.Sprintf(format, args...)})
}

func atFields(e *FieldError) error {
	return fault.Because(e, "identity.Expect", fault.Invalid, "%s", e.Error())
}

// Check returns nil if a registration can ever be met, else a fault of kind Invalid; a [FieldError] in it says which field is wrong.
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
		return fault.New(op, fault.Invalid, "proof of kind %q: use %s, %s, %s or %s", fault.Clip(e.Kind), KindAWS, KindGCP, KindKubernetes,
			KindDev)
	case foreign != "":
		return wrong(foreign, nil, " does not belong to a proof of kind %s: leave it out", e.Kind)
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
	if e.Issuer == "" || len(e.Issuer) > 512 {
		return wrong("issuer", nil, ": give the cluster's --service-account-issuer, in at most 512 bytes")
	}
	if e.Issuer == DevIssuer {
		return wrong("issuer", nil, " %q is that of development tokens: no cluster has it", DevIssuer)
	}
	if err := fleet.CheckName("namespace", e.Namespace); err != nil {
		return wrong("namespace", err, ": %s", fault.Text(err))
	}
	if !subdomain(e.ServiceAccount) {
		return wrong("service_account", nil, " %q: use lower-case letters, digits, dots and hyphens", fault.Clip(e.ServiceAccount))
	}
	switch {
	case e.Discovery && len(e.JWKS) > 0:
		return contradict("jwks", "discovery", ": the first pins the keys, the second has them fetched; give one of them")
	case e.Discovery:
		return CheckIssuer(e.Issuer)
	}
	return e.checkJWKS()
}

func (e Expect) checkJWKS() error {
	if _, err := ParseKeys(e.JWKS); err != nil {
		return wrong("jwks", err, ": %s", fault.Text(err))
	}
	return nil
}
