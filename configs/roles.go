// SPDX-License-Identifier: Apache-2.0

package configs

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// The closed set of roles.
const (
	RoleControl    = "control-plane"
	RoleAppliance  = "appliance"
	RoleManagement = "management-plane"
)

// Kinds of transport, of proof, of runtime and of secrets.
const (
	HTTPS       = "https"
	PrivateLink = "privatelink"
	Tailscale   = "tailscale"

	ProofAWS        = "aws"
	ProofGCP        = "gcp"
	ProofKubernetes = "kubernetes"
	ProofDev        = "dev" // demarc platform dev, for a trust domain that was made for development
	RuntimeProcess  = "process"
	SecretsFiles    = "files"
)

// defaults is the one place of all defaults. What is absent here has none. nil for an unknown role.
func defaults(role string) Config {
	switch role {
	case RoleControl:
		return &Control{
			Version: Version, Role: role, Dir: "/var/lib/demarc",
			Listen:  "0.0.0.0:7443",
			Raft:    Raft{Listen: "0.0.0.0:7444"},
			Metrics: Metrics{Listen: "127.0.0.1:7480"},
			Leaf:    Leaf{Life: 30 * 24 * time.Hour, Backdate: 12 * time.Hour},
			Voter:   true,
		}
	case RoleAppliance:
		return &Appliance{
			Version: Version, Role: role, Dir: "/var/lib/demarc", Socket: "/run/demarc/appliance.sock",
			Runtime: Runtime{Kind: RuntimeProcess},
			Secrets: Secrets{Kind: SecretsFiles, Dir: "/etc/demarc/secrets"},
			Ingress: Ingress{Host: "0.0.0.0"}, // where a posture may open doors; it opens none
		}
	case RoleManagement:
		return &Management{
			Version: Version, Role: role, Dir: "/var/lib/demarc", Socket: "/run/demarc/management.sock",
			Listen:  "0.0.0.0:7453",
			Metrics: Metrics{Listen: "127.0.0.1:7481"},
		}
	}
	return nil
}

// Control configures one node of a vendor's control plane.
type Control struct {
	Version       string          `yaml:"version"`
	Role          string          `yaml:"role"`
	Name          string          `yaml:"name" is:"name" need:"yes"` // of this node
	TrustDomain   string          `yaml:"trust_domain" is:"domain" need:"yes"`
	Dir           string          `yaml:"dir" is:"path" need:"yes"`
	Listen        string          `yaml:"listen" is:"listen" need:"yes"`      // for appliances and operators
	Advertise     string          `yaml:"advertise,omitempty" is:"addr"`      // where they reach it; that of cluster where absent
	Raft          Raft            `yaml:"raft"`                               //
	Cluster       []Member        `yaml:"cluster" need:"yes"`                 // the first configuration, the same on each node
	Join          bool            `yaml:"join"`                               // this node was added later: it begins no cluster
	Voter         bool            `yaml:"voter"`                              // false: it never votes, and holds channels of appliances
	KEKFile       string          `yaml:"kek_file" is:"path" need:"yes"`      // 32 bytes that seal the CA's key
	Metrics       Metrics         `yaml:"metrics"`                            //
	Management    *ManagementLink `yaml:"management,omitempty"`               // absent: nobody is told
	Artifacts     string          `yaml:"artifacts" is:"path"`                // <dir>/artifacts where absent
	Certificate   Certificate     `yaml:"certificate"`                        //
	Genesis       string          `yaml:"genesis,omitempty" is:"path"`        // what the first start of the cluster begins with
	Tailnet       *Tailnet        `yaml:"tailnet,omitempty"`                  // absent: no door on a tailnet
	TailnetSecret string          `yaml:"tailnet_secret,omitempty" is:"name"` // of the book: its credential in place of a file
	InnerTLS      *InnerDoor      `yaml:"inner_tls,omitempty"`                // absent: no door for appliances behind inspection
	OIDC          *OIDC           `yaml:"oidc,omitempty"`                     // absent: operators come by invitation only
	Leaf          Leaf            `yaml:"leaf"`                               // the certificates that it issues
	Platforms     Platforms       `yaml:"platforms,omitempty"`                // what is asked about the proofs of appliances
}

// InnerDoor takes appliances whose network opens TLS: it has a web certificate that the proxy of such a network trusts.
type InnerDoor struct {
	Listen   string `yaml:"listen" is:"listen" need:"yes"`
	CertFile string `yaml:"cert_file" is:"path" need:"yes"` // read again when it changes
	KeyFile  string `yaml:"key_file" is:"path" need:"yes"`
}

// Raft is where the nodes of a control plane reach each other.
type Raft struct {
	Listen    string `yaml:"listen" is:"listen" need:"yes"`
	Advertise string `yaml:"advertise,omitempty" is:"addr"` // that of cluster where absent
}

// Member is one voter of the first configuration.
type Member struct {
	Name string `yaml:"name" is:"name" need:"yes"`
	Raft string `yaml:"raft" is:"addr" need:"yes"`
	API  string `yaml:"api" is:"addr" need:"yes"`
}

// Metrics is where Prometheus and health checks ask; empty for nowhere.
type Metrics struct {
	Listen string `yaml:"listen,omitempty" is:"listen"`
}

// ManagementLink is the management plane that is told about this control plane.
type ManagementLink struct {
	URL    string `yaml:"url" is:"url" need:"yes"`
	CAFile string `yaml:"ca_file" is:"path" need:"yes"`
	Name   string `yaml:"name" is:"name" need:"yes"` // of this control plane there
}

// Certificate is the first certificate of a node, from files.
type Certificate struct {
	File   string `yaml:"file" is:"path" need:"yes"`
	Key    string `yaml:"key" is:"path" need:"yes"`
	Bundle string `yaml:"bundle" is:"path" need:"yes"`
}

// Leaf is the life of issued certificates.
type Leaf struct {
	Life     time.Duration `yaml:"life"`
	Backdate time.Duration `yaml:"backdate"`
}

// Tailnet is a node of its own on a tailnet. Of auth_key_file, oauth_client_file and workload_identity it names exactly one.
type Tailnet struct {
	ControlURL      string            `yaml:"control_url,omitempty" is:"url"` // absent: Tailscale's own
	AuthKeyFile     string            `yaml:"auth_key_file,omitempty" is:"path"`
	OAuthClientFile string            `yaml:"oauth_client_file,omitempty" is:"path"` // the client's secret
	Workload        *WorkloadIdentity `yaml:"workload_identity,omitempty"`
	Tags            []string          `yaml:"tags,omitempty"` // tag:NAME each; needed but with an auth key
	Hostname        string            `yaml:"hostname" is:"name" need:"yes"`
	Dir             string            `yaml:"dir,omitempty" is:"path"` // <dir>/<key of the section> where absent
}

// WorkloadIdentity is the platform's own identity, federated with the tailnet. Of audience and id_token_file it names one.
type WorkloadIdentity struct {
	ClientID    string `yaml:"client_id" need:"yes"`
	Audience    string `yaml:"audience,omitempty"` // the cloud is asked for a token with it
	IDTokenFile string `yaml:"id_token_file,omitempty" is:"path"`
}

func (t *Tailnet) problems(bad badFunc, key string) { t.problemsBut(bad, key, "") }

// problemsBut is problems where a secret of the vendor's book, by its name, may stand for the files.
func (t *Tailnet) problemsBut(bad badFunc, key, secret string) {
	var ways []string
	for _, w := range []struct {
		key string
		is  bool
	}{{"auth_key_file", t.AuthKeyFile != ""}, {"oauth_client_file", t.OAuthClientFile != ""}, {"tailnet_secret", secret != ""},
		{"workload_identity", t.Workload != nil}} {
		if w.is {
			ways = append(ways, w.key)
		}
	}
	switch {
	case len(ways) == 0:
		bad(key, "name one of auth_key_file, oauth_client_file and workload_identity")
	case len(ways) > 1:
		bad(key, "%s: name one of them only", strings.Join(ways, " and "))
	case t.AuthKeyFile == "" && secret == "" && len(t.Tags) == 0:
		bad(key+".tags", "missing: %s makes keys for tagged nodes only", ways[0])
	}
	if w := t.Workload; w != nil && (w.Audience == "") == (w.IDTokenFile == "") {
		bad(key+".workload_identity", "name one of audience and id_token_file")
	}
	for i, tag := range t.Tags {
		if name, ok := strings.CutPrefix(tag, "tag:"); !ok || wrong("name", name) != "" {
			bad(fmt.Sprintf("%s.tags[%d]", key, i), "%q: use tag: and a name of lower-case letters, digits and hyphens", fault.Clip(tag))
		}
	}
}

// Self is this node's own entry in the cluster.
func (c *Control) Self() Member {
	i := slices.IndexFunc(c.Cluster, func(m Member) bool { return m.Name == c.Name })
	if i < 0 {
		return Member{}
	}
	return c.Cluster[i]
}

func (c *Control) problems() (out []problem) {
	bad := func(key, format string, args ...any) { out = append(out, problem{key, fmt.Sprintf(format, args...)}) }
	if !c.Voter && !c.Join {
		bad("voter", "false, and this node is one of the first, which vote: join: true goes with it")
	}
	if n := len(c.Cluster); !c.Join && n > 0 && n != 1 && n != 3 && n != 5 {
		bad("cluster", "%d nodes: a cluster has 1, 3 or 5", n)
	}
	once(bad, "cluster", c.Cluster, "name", func(m Member) string { return m.Name })
	once(bad, "cluster", c.Cluster, "raft", func(m Member) string { return m.Raft })
	once(bad, "cluster", c.Cluster, "api", func(m Member) string { return m.API })
	if self := c.Self(); len(c.Cluster) > 0 && self == (Member{}) {
		bad("cluster", "this node, %q, is not among the nodes", c.Name)
	} else {
		fill(&c.Advertise, self.API)
		fill(&c.Raft.Advertise, self.Raft)
		if c.Raft.Advertise != self.Raft {
			bad("raft.advertise", "%s, and the cluster names %s for this node", c.Raft.Advertise, self.Raft)
		}
	}
	listens := []string{"listen", c.Listen, "raft.listen", c.Raft.Listen, "metrics.listen", c.Metrics.Listen}
	if c.InnerTLS != nil {
		listens = append(listens, "inner_tls.listen", c.InnerTLS.Listen)
	}
	doors(bad, listens...)
	if c.Leaf.Life < time.Minute || c.Leaf.Life > 366*24*time.Hour {
		bad("leaf.life", "%s: use a minute to a year", c.Leaf.Life)
	}
	if c.Leaf.Backdate < 0 || c.Leaf.Backdate > 48*time.Hour {
		bad("leaf.backdate", "%s: use 0s to 48h", c.Leaf.Backdate)
	}
	c.Platforms.problems(bad)
	if c.OIDC != nil {
		c.OIDC.problems(bad)
	}
	fill(&c.Artifacts, c.Dir+"/artifacts")
	if c.Tailnet != nil {
		fill(&c.Tailnet.Dir, c.Dir+"/tailnet")
		c.Tailnet.problemsBut(bad, "tailnet", c.TailnetSecret)
	}
	return out
}

// Effective implements Config.
func (c *Control) Effective() ([]byte, error) { return effective(c) }

// Management configures the management plane.
type Management struct {
	Version       string         `yaml:"version"`
	Role          string         `yaml:"role"`
	Name          string         `yaml:"name" is:"name" need:"yes"`
	Dir           string         `yaml:"dir" is:"path" need:"yes"`
	Listen        string         `yaml:"listen" is:"listen" need:"yes"` // for control planes
	Certificate   Certificate    `yaml:"certificate"`
	ControlPlanes []ControlPlane `yaml:"control_planes" need:"yes"`
	Socket        string         `yaml:"socket" is:"path" need:"yes"` // for the operator of this host
	Metrics       Metrics        `yaml:"metrics"`
}

// ControlPlane is one that may report.
type ControlPlane struct {
	Name        string `yaml:"name" is:"name" need:"yes"`
	TrustDomain string `yaml:"trust_domain" is:"domain" need:"yes"`
	LogKeyFile  string `yaml:"log_key_file" is:"path" need:"yes"` // PEM; it signs the CAs by which its nodes are recognised
}

func (c *Management) problems() (out []problem) {
	bad := func(key, format string, args ...any) { out = append(out, problem{key, fmt.Sprintf(format, args...)}) }
	once(bad, "control_planes", c.ControlPlanes, "name", func(p ControlPlane) string { return p.Name })
	once(bad, "control_planes", c.ControlPlanes, "trust_domain", func(p ControlPlane) string { return p.TrustDomain })
	doors(bad, "listen", c.Listen, "metrics.listen", c.Metrics.Listen)
	socket(bad, c.Socket)
	return out
}

// Effective implements Config.
func (c *Management) Effective() ([]byte, error) { return effective(c) }

type badFunc func(key, format string, args ...any)

// once tells of entries of a list that share what must be their own.
func once[T any](bad badFunc, key string, list []T, field string, of func(T) string) {
	first := map[string]int{}
	for i, e := range list {
		v := of(e)
		if j, twice := first[v]; twice && v != "" {
			bad(fmt.Sprintf("%s[%d].%s", key, i, field), "%q is that of entry %d too", fault.Clip(v), j)
			continue
		}
		first[v] = i
	}
}

// doors tells of two listeners on one address; port 0 is whatever is free.
func doors(bad badFunc, pairs ...string) {
	at := map[string]string{}
	for i := 0; i+1 < len(pairs); i += 2 {
		key, addr := pairs[i], pairs[i+1]
		if other, taken := at[addr]; taken && addr != "" && addr[max(0, len(addr)-2):] != ":0" {
			bad(key, "%s is that of %s too", addr, other)
		}
		at[addr] = key
	}
}

func socket(bad badFunc, path string) {
	if why := wrong("socket", path); why != "" {
		bad("socket", "%s", why)
	}
}

func fill(to *string, from string) {
	if *to == "" {
		*to = from
	}
}
