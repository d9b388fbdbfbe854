// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// OIDC lets the vendor's operators in by an OpenID Connect issuer of the vendor.
type OIDC struct {
	Issuer      string        `yaml:"issuer" is:"url" need:"yes"` // exactly as it is in the tokens
	ClientID    string        `yaml:"client_id" need:"yes"`       // a public client, with loopback redirects
	CAFile      string        `yaml:"ca_file,omitempty" is:"path"`
	KeyHosts    []string      `yaml:"key_hosts,omitempty"`    // where its keys may be beside its own host
	Scopes      []string      `yaml:"scopes,omitempty"`       // beside openid; email where absent
	NameClaim   string        `yaml:"name_claim,omitempty"`   // what an operator is called after; email where absent
	Domains     []string      `yaml:"domains,omitempty"`      // of addresses; needed where name_claim is email
	GroupsClaim string        `yaml:"groups_claim,omitempty"` // groups where absent
	Roles       []GroupRole   `yaml:"roles" need:"yes"`       // who is in none of them is not let in
	Life        time.Duration `yaml:"life,omitempty"`         // of a certificate; 8h where absent
}

// GroupRole is the role of those who are in a group.
type GroupRole struct {
	Group string `yaml:"group" need:"yes"`
	Role  string `yaml:"role" need:"yes"` // viewer, deployer, operator or admin
}

// OperatorRoles lists the roles of operators, from the least to the most, as the file spells them.
func OperatorRoles() []string { return []string{"viewer", "deployer", "operator", "admin"} }

func (o *OIDC) problems(bad badFunc) {
	fill(&o.NameClaim, "email")
	fill(&o.GroupsClaim, "groups")
	if o.Life == 0 {
		o.Life = 8 * time.Hour
	}
	if len(o.Scopes) == 0 {
		o.Scopes = []string{"email"}
	}
	if u, err := url.Parse(o.Issuer); err != nil || u.Scheme != "https" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		bad("oidc.issuer", "an https URL without user, query or fragment is needed")
	}
	if o.Life < time.Minute || o.Life > 24*time.Hour {
		bad("oidc.life", "%s: use a minute to 24h", o.Life)
	}
	if o.NameClaim == "email" && len(o.Domains) == 0 {
		bad("oidc.domains", "missing: an issuer may vouch for addresses of anybody")
	}
	for i, r := range o.Roles {
		if !slices.Contains(OperatorRoles(), r.Role) {
			bad(fmt.Sprintf("oidc.roles[%d].role", i), "%q: use viewer, deployer, operator or admin", fault.Clip(r.Role))
		}
	}
	once(bad, "oidc.roles", o.Roles, "group", func(r GroupRole) string { return r.Group })
}
