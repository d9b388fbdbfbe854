// SPDX-License-Identifier: Apache-2.0

package estate

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strconv"

	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
)

// Context is operator.yaml: whom an operator calls, and with which keys. Relative paths are relative to its folder.
type Context struct {
	TrustDomain  string   `yaml:"trust_domain"`
	Nodes        []string `yaml:"nodes"`
	Cert         string   `yaml:"cert"`
	Key          string   `yaml:"key"`
	Bundle       string   `yaml:"bundle"`
	SigningKey   string   `yaml:"signing_key"`   // of releases and requests
	RecipientKey string   `yaml:"recipient_key"` // age: opens the output that customers release
	Releases     string   `yaml:"releases"`      // folder where published releases are kept
}

// nodeFile is what demarcd.yaml says: the keys that have no default, in the order of the annotated example.
type nodeFile struct {
	Version     string                  `yaml:"version"`
	Role        string                  `yaml:"role"`
	Name        string                  `yaml:"name"`
	TrustDomain string                  `yaml:"trust_domain"`
	Dir         string                  `yaml:"dir"`
	Listen      string                  `yaml:"listen"`
	Raft        map[string]string       `yaml:"raft"`
	Cluster     []configs.Member        `yaml:"cluster"`
	KEKFile     string                  `yaml:"kek_file"`
	Certificate configs.Certificate     `yaml:"certificate"`
	Genesis     string                  `yaml:"genesis"`
	Metrics     configs.Metrics         `yaml:"metrics"`
	Management  *configs.ManagementLink `yaml:"management,omitempty"`
}

// nodeConfig writes demarcd.yaml, and reads it as the daemon will.
func (m *maker) nodeConfig(n Node) ([]byte, error) {
	f := nodeFile{Version: configs.Version, Role: configs.RoleControl, Name: n.Name, TrustDomain: m.TrustDomain, Dir: "data",
		Listen: bind(n.API), Raft: map[string]string{"listen": bind(n.Raft)}, KEKFile: "kek", Genesis: "genesis.json",
		Certificate: configs.Certificate{File: "node.crt", Key: "node.key", Bundle: "bundle.pem"}, Metrics: configs.Metrics{Listen: n.Metrics}}
	for _, c := range m.Nodes {
		f.Cluster = append(f.Cluster, configs.Member{Name: c.Name, Raft: c.Raft, API: c.API})
	}
	if m.Management != "" {
		f.Management = &configs.ManagementLink{URL: m.Management, CAFile: "management.pem", Name: m.ManagementName}
	}
	b, err := document(fmt.Sprintf("# Node %s of the control plane of %s. All that it needs is in this folder; data is made by the first start.\n", n.Name, m.TrustDomain), f)
	if err != nil {
		return nil, err
	}
	if _, err := configs.Parse("nodes/"+n.Name+"/demarcd.yaml", b, nil); err != nil {
		return nil, fault.At("estate.nodeConfig", "", err)
	}
	return b, nil
}

func (m *maker) operatorConfig() ([]byte, error) {
	c := Context{TrustDomain: m.TrustDomain, Cert: "operator.crt", Key: "operator.key", Bundle: "bundle.pem",
		SigningKey: "signing.key", RecipientKey: "recipient.key", Releases: "releases"}
	for _, n := range m.Nodes {
		c.Nodes = append(c.Nodes, n.API)
	}
	return document(fmt.Sprintf("# Operator %s of %s: demarc --context FILE, or DEMARC_CONTEXT.\n", m.Operator, m.TrustDomain), c)
}

func document(head string, v any) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(head)
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(v); err != nil {
		return nil, fault.At("estate.document", fault.Internal, err)
	}
	return b.Bytes(), nil
}

// bind is where a node listens so that others reach it at addr: there, where it is an address, else on every one.
func bind(addr string) string {
	host, port, err := hostPort(addr)
	if err != nil {
		return addr
	}
	if _, err := netip.ParseAddr(host); err != nil && host != "localhost" {
		host = "0.0.0.0"
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}
