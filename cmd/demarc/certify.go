// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

func (a *app) certifyNode() *cobra.Command {
	var in addOptions
	var reason string
	c := a.online(&cobra.Command{Use: "certify NAME", Short: "Give a node whose disk is lost, or whose certificate ran out or was stolen, another one under its name", Args: exactly(1, "the node's name"),
		Long: "certify writes another certificate, its key and the newest CAs into the folder NAME inside --dir, and a file for demarcd where there\n" +
			"is none (then --addr says where the node is). All certificates that the node had before are refused from then on, and open connections\nthat showed them end. " +
			"A node whose disk is lost begins with an empty one: demote it before it is started, and promote it after, since it\ndoes not know how it voted.",
		Example: "  demarc control-plane demote cp-3\n  demarc control-plane certify cp-3 --dir acme --addr 10.0.0.3:7444,cp-3.acme.example:7443 --reason \"disk is lost\"\n  demarcd run -c acme/cp-3/node.yaml\n  demarc control-plane promote cp-3"},
		func(ctx context.Context, v *vendor, args []string) error {
			return a.certify(ctx, v, args[0], in, reason)
		})
	f := c.Flags()
	f.StringVar(&in.dir, "dir", "", "the folder that init made, with the kek; the node's own folder is inside")
	f.StringVar(&in.addr, "addr", "", "RAFT_HOST:PORT,API_HOST:PORT[,METRICS_HOST:PORT], where the folder has no node.yaml")
	f.StringVar(&in.kek, "kek-file", "", "the key-encryption key, where it is not DIR/kek and the folder has no node.yaml")
	f.BoolVar(&in.nonVoter, "non-voter", false, "the file that is written says that it never votes")
	f.StringVar(&reason, "reason", "", "for the record")
	return c
}

func (a *app) certify(ctx context.Context, v *vendor, name string, in addOptions, reason string) error {
	const op = "demarc.certify"
	if in.dir == "" {
		return usage("give --dir")
	}
	f := folder{in.dir}
	file := f.path(name, "node.yaml")
	_, err := os.Lstat(file)
	anew := errors.Is(err, fs.ErrNotExist)
	var n nodeSpec
	if anew { // what could go wrong with the file does before the old certificates are made worthless
		if in.addr == "" {
			return usage("%s is not there: give --addr, and it is written", file)
		}
		nodes, err := (&initOptions{nodes: []string{name + "=" + in.addr}}).specs()
		if err != nil {
			return err
		}
		if n = nodes[0]; in.kek == "" {
			in.kek = f.path("kek")
		}
		if _, err := joinFile(v.TrustDomain, f.path(name), in, n, nil); err != nil {
			return err
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	csr, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return err
	}
	pemKey, err := keyPEM(key)
	if err != nil {
		return err
	}
	m, err := askCluster(ctx, v, controlv1connect.ClusterClient.CertifyMember, &controlv1.CertifyMemberRequest{RequestId: draw(), Name: name, Csr: csr, Reason: reason})
	if err != nil {
		return err
	}
	var bundle bytes.Buffer
	for _, der := range m.GetBundle() {
		if err := pem.Encode(&bundle, &pem.Block{Type: "CERTIFICATE", Bytes: der}); err != nil {
			return fault.At(op, fault.Internal, err)
		}
	}
	if anew {
		text, err := joinFile(v.TrustDomain, f.path(name), in, n, m.GetMembers())
		if err != nil {
			return err
		}
		if err := f.write(text, 0o644, name, "node.yaml"); err != nil {
			return err
		}
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.GetCertificate()})
	if err := replace(map[string][]byte{f.path(name, "cert.pem"): cert, f.path(name, "cert.key"): pemKey, f.path(name, "bundle.pem"): bundle.Bytes()}); err != nil {
		return err
	}
	return a.emit(map[string]any{"node": name, "file": file, "written": anew}, func(w io.Writer) {
		fmt.Fprintf(w, "node %s has another certificate in %s; what it had before is refused\nthe newest CAs are in bundle.pem beside it: the node's file names its bundle as certificate.bundle\n  demarcd run -c %s\n", name, f.path(name), file)
	})
}
