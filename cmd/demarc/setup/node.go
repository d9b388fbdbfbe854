// SPDX-License-Identifier: Apache-2.0

package setup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
)

type addOptions struct {
	dir, addr, kek string
	nonVoter       bool
}

// AddCommand is demarc control-plane add.
func AddCommand(a *cli.App) *cobra.Command {
	var in addOptions
	c := a.Online(&cobra.Command{
		Use:   "add NAME",
		Short: "Add a node: its identity, its file, and its place in the cluster as a non-voter",
		Args:  cli.Exactly(1, "the node's name"),
		Long: "add makes the folder NAME inside --dir, with a certificate and a file for demarcd, and adds the node as a non-voter.\n" +
			"Start demarcd with that file: it catches up. Then promote it, or let it take the place of another one with replace. A\n" +
			"name that was removed is never used again.",
		Example: "  demarc control-plane add cp-4 --dir acme --addr 10.0.0.4:7444,cp-4.acme.example:7443\n" +
			"  demarcd run -c acme/cp-4/node.yaml\n" +
			"  demarc control-plane promote cp-4\n\n" +
			"  demarc control-plane add edge-1 --dir acme --addr 10.0.1.1:7444,edge-1.acme.example:7443 --non-voter",
	},
		func(ctx context.Context, v *client.Client, args []string) error { return add(ctx, a, v, args[0], in) })
	f := c.Flags()
	f.StringVar(&in.dir, "dir", "", "the folder that init made, with the kek; the node's own folder is made inside")
	f.StringVar(&in.addr, "addr", "", "RAFT_HOST:PORT,API_HOST:PORT[,METRICS_HOST:PORT]")
	f.StringVar(&in.kek, "kek-file", "", "the key-encryption key, if it is not DIR/kek")
	f.BoolVar(&in.nonVoter, "non-voter", false, "it never votes: it holds channels of appliances and forwards changes to the leader")
	return c
}

func add(ctx context.Context, a *cli.App, v *client.Client, name string, in addOptions) error {
	const op = "demarc.add"
	if in.dir == "" || in.addr == "" {
		return cli.Usage("give --dir and --addr")
	}
	spec := initOptions{nodes: []string{name + "=" + in.addr}}
	nodes, err := spec.specs()
	if err != nil {
		return err
	}
	n, f := nodes[0], cli.Folder(in.dir)
	if in.kek == "" {
		in.kek = f.Path("kek")
	}
	if _, err := os.Stat(in.kek); err != nil {
		return fault.Because(err, op, fault.NotFound, "the key-encryption key is not there: %s (see --kek-file)", in.kek)
	}
	if err := cli.Absent(f.Path(name)); err != nil {
		return err
	}
	key, csr, err := client.NewKey()
	if err != nil {
		return err
	}
	m, err := client.Call(ctx, v, client.Node.AddMember, &controlv1.AddMemberRequest{
		RequestId: client.NewID(), Name: n.name, RaftAddress: n.raft, ApiAddress: n.api, NonVoter: in.nonVoter, Csr: csr,
	})
	if err != nil {
		return err
	}
	pemKey, err := client.KeyPEM(key)
	if err != nil {
		return err
	}
	file, err := joinFile(v.TrustDomain, f.Path(name), in, n, m.GetMembers())
	if err != nil {
		return err
	}
	err = errors.Join(
		f.Write(client.CertificatesPEM(m.GetCertificate()), 0o644, name, "cert.pem"), f.Write(pemKey, 0o600, name, "cert.key"),
		f.Write(client.CertificatesPEM(m.GetBundle()...), 0o644, name, "bundle.pem"), f.Write(file, 0o644, name, "node.yaml"))
	if err != nil {
		return err
	}
	doc := map[string]any{"node": name, "file": f.Path(name, "node.yaml"), "role": "non-voter"}
	return a.Emit(doc, func(w io.Writer) {
		yaml := f.Path(name, "node.yaml")
		fmt.Fprintf(w, "node %s is added as a non-voter; start it, with the kek beside its folder as %s says:\n  demarcd run -c %s\n", name,
			yaml, yaml)
		if !in.nonVoter {
			fmt.Fprintf(w, "then:\n  demarc control-plane promote %s\n", name)
		}
		fmt.Fprintf(w, "operators reach it at %s: add that to nodes of their files\n", n.api)
	})
}

// joinFile is the file of a node that joins.
func joinFile(domain, dir string, in addOptions, n nodeSpec, members []*controlv1.ClusterMember) ([]byte, error) {
	kek, err := filepath.Abs(in.kek)
	if err != nil {
		return nil, fault.At("demarc.add", fault.Internal, err)
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fault.At("demarc.add", fault.Internal, err)
	}
	if rel, err := filepath.Rel(abs, kek); err == nil {
		kek = rel
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "version: %s\nrole: %s\nname: %s\ntrust_domain: %s\ndir: data\nlisten: %q\nraft: {listen: %q}\njoin: true\nvoter: %v\n"+
		"cluster:\n",
		configs.Version, configs.RoleControl, n.name, domain, listenAddress(n.api), listenAddress(n.raft), !in.nonVoter)
	fmt.Fprintf(&b, "  - {name: %s, raft: %q, api: %q}\n", n.name, n.raft, n.api)
	for _, m := range members {
		if m.GetRole() != "" && m.GetName() != n.name && m.GetApiAddress() != "" {
			fmt.Fprintf(&b, "  - {name: %s, raft: %q, api: %q}\n", m.GetName(), m.GetRaftAddress(), m.GetApiAddress())
		}
	}
	fmt.Fprintf(&b, "kek_file: %q\ncertificate: {file: cert.pem, key: cert.key, bundle: bundle.pem}\nmetrics: {listen: %q}\n", kek, n.metrics)
	_, err = configs.Parse(filepath.Join(dir, "node.yaml"), b.Bytes(), nil)
	return b.Bytes(), err
}

// CertifyCommand is demarc control-plane certify.
func CertifyCommand(a *cli.App) *cobra.Command {
	var in addOptions
	var reason string
	c := a.Online(&cobra.Command{
		Use:   "certify NAME",
		Short: "Give a node whose disk is lost, or whose certificate ran out or was stolen, another one under its name",
		Args: cli.Exactly(1,
			"the node's name"),
		Long: "certify writes another certificate, its key and the newest CAs into the folder NAME inside --dir, and a file for\n" +
			"demarcd if there is none (then --addr says where the node is). All certificates that the node had before are\n" +
			"refused from then on, and open connections that showed them end. A node whose disk is lost begins with an empty one:\n" +
			"demote it before it is started, and promote it after, since it does not know how it voted.",
		Example: "  demarc control-plane demote cp-3\n" +
			"  demarc control-plane certify cp-3 --dir acme --addr 10.0.0.3:7444,cp-3.acme.example:7443 --reason \"disk is lost\"\n" +
			"  demarcd run -c acme/cp-3/node.yaml\n" +
			"  demarc control-plane promote cp-3",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			return certify(ctx, a, v, args[0], in, reason)
		})
	f := c.Flags()
	f.StringVar(&in.dir, "dir", "", "the folder that init made, with the kek; the node's own folder is inside")
	f.StringVar(&in.addr, "addr", "", "RAFT_HOST:PORT,API_HOST:PORT[,METRICS_HOST:PORT], if the folder has no node.yaml")
	f.StringVar(&in.kek, "kek-file", "", "the key-encryption key, if it is not DIR/kek and the folder has no node.yaml")
	f.BoolVar(&in.nonVoter, "non-voter", false, "the file that is written says that it never votes")
	f.StringVar(&reason, "reason", "", "for the record")
	return c
}

func certify(ctx context.Context, a *cli.App, v *client.Client, name string, in addOptions, reason string) error {
	if in.dir == "" {
		return cli.Usage("give --dir")
	}
	f := cli.Folder(in.dir)
	file := f.Path(name, "node.yaml")
	_, err := os.Lstat(file)
	missing := errors.Is(err, fs.ErrNotExist)
	var n nodeSpec
	if missing { // what could go wrong with the file does before the old certificates are made worthless
		if in.addr == "" {
			return cli.Usage("%s is not there: give --addr, and it is written", file)
		}
		nodes, err := (&initOptions{nodes: []string{name + "=" + in.addr}}).specs()
		if err != nil {
			return err
		}
		if n = nodes[0]; in.kek == "" {
			in.kek = f.Path("kek")
		}
		if _, err := joinFile(v.TrustDomain, f.Path(name), in, n, nil); err != nil {
			return err
		}
	}
	key, csr, err := client.NewKey()
	if err != nil {
		return err
	}
	pemKey, err := client.KeyPEM(key)
	if err != nil {
		return err
	}
	m, err := client.Call(ctx, v, client.Node.CertifyMember,
		&controlv1.CertifyMemberRequest{RequestId: client.NewID(), Name: name, Csr: csr, Reason: reason})
	if err != nil {
		return err
	}
	if missing {
		text, err := joinFile(v.TrustDomain, f.Path(name), in, n, m.GetMembers())
		if err != nil {
			return err
		}
		if err := f.Write(text, 0o644, name, "node.yaml"); err != nil {
			return err
		}
	}
	err = client.ReplaceFiles(map[string][]byte{
		f.Path(name, "cert.pem"): client.CertificatesPEM(m.GetCertificate()), f.Path(name, "cert.key"): pemKey,
		f.Path(name, "bundle.pem"): client.CertificatesPEM(m.GetBundle()...),
	})
	if err != nil {
		return err
	}
	return a.Emit(map[string]any{"node": name, "file": file, "written": missing}, func(w io.Writer) {
		fmt.Fprintf(w, "node %s has another certificate in %s; what it had before is refused\n"+
			"the newest CAs are in bundle.pem beside it: the node's file names its bundle as certificate.bundle\n  demarcd run -c %s\n",
			name, f.Path(name), file)
	})
}
