// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"regexp"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/demarc-dev/demarc/fault"
)

// GoogleIssuer is the only issuer of identity tokens of Google Cloud's metadata server.
const GoogleIssuer = "https://accounts.google.com"

var (
	gcpProject  = regexp.MustCompile(`^([a-z0-9.-]{1,63}:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$`)
	gcpAccount  = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}@[a-z0-9][a-z0-9.-]{1,120}\.gserviceaccount\.com$`)
	gcpUniqueID = regexp.MustCompile(`^[0-9]{6,32}$`)
	gcpName     = regexp.MustCompile(`^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$`)
)

func (e Expect) checkGCP() error {
	switch {
	case !gcpProject.MatchString(e.Project):
		return wrong("project", nil, " %q: give the project's ID (not its name or number)", fault.Clip(e.Project))
	case !gcpAccount.MatchString(e.ServiceAccount):
		return wrong("service_account", nil, " %q: give its email address, NAME@PROJECT.iam.gserviceaccount.com",
			fault.Clip(e.ServiceAccount))
	case e.UniqueID != "" && !gcpUniqueID.MatchString(e.UniqueID):
		return wrong("unique_id", nil, " %q: it has digits only", fault.Clip(e.UniqueID))
	case e.Zone != "" && !gcpName.MatchString(e.Zone):
		return wrong("zone", nil, " %q: write it as europe-west3-a", fault.Clip(e.Zone))
	case e.Instance != "" && !gcpName.MatchString(e.Instance):
		return wrong("instance", nil, " %q: use the virtual machine's name", fault.Clip(e.Instance))
	}
	return nil
}

// googleClaims are those of an identity token with format=full.
type googleClaims struct {
	Issuer   string       `json:"iss"`
	Subject  string       `json:"sub"`
	Audience jwt.Audience `json:"aud"`
	times
	Email    string `json:"email"`
	Verified bool   `json:"email_verified"`
	Google   struct {
		Engine struct {
			Project  string `json:"project_id"`
			Zone     string `json:"zone"`
			Instance string `json:"instance_name"`
		} `json:"compute_engine"`
	} `json:"google"`
}

func (e Expect) verifyGCP(keys Keys, token, audience string, now time.Time) (Proven, error) {
	const op = "identity.Verify"
	var c googleClaims
	if err := keys.open(token, "", &c); err != nil {
		return Proven{}, err
	}
	vm := c.Google.Engine
	switch {
	case c.Issuer != GoogleIssuer:
		return Proven{}, fault.New(op, fault.Denied, "the token was issued by %q, and Google is %q", fault.Clip(c.Issuer), GoogleIssuer)
	case len(c.Audience) != 1 || c.Audience[0] != audience:
		return Proven{}, wrongAudience()
	case c.Email == "" || c.Email != e.ServiceAccount:
		return Proven{}, fault.New(op, fault.Denied, "the token is that of %q, and %q is registered", fault.Clip(c.Email), e.ServiceAccount)
	case !c.Verified:
		return Proven{}, fault.New(op, fault.Denied, "Google does not vouch for the email address in the token")
	case c.Subject == "" || len(c.Subject) > maxUID:
		return Proven{}, fault.New(op, fault.Denied, "the token names no service account by its unique id")
	case e.UniqueID != "" && c.Subject != e.UniqueID:
		return Proven{}, fault.New(op, fault.Denied, "the token is that of an account with the unique id %q, and %s is registered: it was "+
			"deleted and made anew, or it is another", fault.Clip(c.Subject), e.UniqueID)
	case vm.Project == "":
		return Proven{}, fault.New(op, fault.Denied, "the token names no project: it must be that of a virtual machine's metadata server, with "+
			"format=full")
	case vm.Project != e.Project:
		return Proven{}, fault.New(op, fault.Denied, "the token is of the project %q, and %q is registered", fault.Clip(vm.Project), e.Project)
	case e.Zone != "" && vm.Zone != e.Zone:
		return Proven{}, fault.New(op, fault.Denied, "the token is of the zone %q, and %q is registered", fault.Clip(vm.Zone), e.Zone)
	case e.Instance != "" && vm.Instance != e.Instance:
		return Proven{}, fault.New(op, fault.Denied, "the token is of the machine %q, and %q is registered", fault.Clip(vm.Instance), e.Instance)
	}
	till, err := c.times.check(now, "an identity token of the metadata server does")
	if err != nil {
		return Proven{}, err
	}
	return Proven{Kind: e.Kind, Issuer: c.Issuer, Subject: c.Email, UID: c.Subject, Expires: till}, nil
}
