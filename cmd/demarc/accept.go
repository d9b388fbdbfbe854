// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

func (a *app) acceptInvitation() *cobra.Command {
	var out string
	c := &cobra.Command{Use: "accept INVITATION --out FILE.yaml", Short: "Become an operator by an invitation", Args: exactly(1, "the invitation's file, or - for standard input"),
		Long: "accept draws your keys here, proves to the control plane that you hold the invitation, and writes your operator's file with the\ncertificate, " +
			"readable by you only. No key leaves this machine, and neither does the invitation's secret. The control plane is recognized by\nthe key that the invitation names. An accept that was cut short goes on when it is run again.",
		Example: "  demarc operator accept ben.invitation --out ~/demarc/ben.yaml"}
	c.Flags().StringVar(&out, "out", "", "the operator's file to write; the others go beside it")
	c.RunE = func(c *cobra.Command, args []string) error {
		if out == "" {
			return usage("name the operator's file with --out FILE.yaml")
		}
		i, err := a.readInvitation(args[0])
		if err != nil {
			return err
		}
		ctx, cancel := a.bounded(c)
		defer cancel()
		d, err := newDesk(out)
		if err != nil {
			return err
		}
		got, err := d.accept(ctx, i)
		if err != nil {
			return err
		}
		return a.emit(d.accepted(i.Name, got), func(w io.Writer) {
			fmt.Fprintf(w, "you are operator %s with the role %s until %s\n  export DEMARC_CONTEXT=%s\n  demarc status\n", i.Name, got.role, got.leaf.NotAfter.UTC().Format(time.DateOnly), out)
			d.forCustomers(w, i.Name, got)
		})
	}
	return c
}

func (a *app) readInvitation(from string) (identity.Invitation, error) {
	var b []byte
	var err error
	if from == "-" {
		b, err = io.ReadAll(io.LimitReader(a.in, identity.MaxInvitation+1))
	} else {
		b, err = readBounded(from, identity.MaxInvitation)
	}
	if err != nil {
		return identity.Invitation{}, fault.Because(err, "demarc.invitation", fault.NotFound, "the invitation can't be read: name its file, or - for standard input")
	}
	return identity.ParseInvitation(b)
}

// accepted is the document of what an operator became.
func (d desk) accepted(name string, got granted) map[string]any {
	return map[string]any{"operator": name, "role": got.role, "operator_file": d.file, "release_key": d.path("signing.pub"), "request_key": d.path("request.pub"), "until_unix": got.leaf.NotAfter.Unix()}
}

// forCustomers says which public keys a customer's file must name before what this operator signs is taken there.
func (d desk) forCustomers(w io.Writer, name string, got granted) {
	release, request := "", ""
	if fleet.Rank(got.role).Covers(fleet.Deployer) {
		release = d.path("signing.pub")
	}
	if fleet.Rank(got.role).Covers(fleet.Operate) {
		request = d.path("request.pub")
	}
	if release != "" || request != "" {
		fmt.Fprint(w, "what you sign is taken by customers whose file names your public keys:\n"+vendorKeys(release, name, request))
	}
}

// desk is where a new operator's files are written: FILE.yaml, and FILE.* beside it.
type desk struct{ file string }

func newDesk(file string) (desk, error) {
	if _, err := os.Lstat(file); err == nil {
		return desk{}, fault.New("demarc.accept", fault.Conflict, "%s is there already: nothing is overwritten", file)
	}
	return desk{file}, nil
}

func (d desk) path(what string) string {
	return strings.TrimSuffix(d.file, filepath.Ext(d.file)) + "." + what
}

// key is the private key of the certificate: the one of an accept that was cut short, or a new one, on disk before anybody
// is asked.
func (d desk) key() (crypto.Signer, error) {
	const op = "demarc.accept"
	path := d.path("key")
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fault.At(op, fault.Internal, err)
		}
		b, err := keyPEM(key)
		if err != nil {
			return nil, err
		}
		return key, create(path, b, 0o600)
	}
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "%s can't be read", path)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fault.New(op, fault.Conflict, "%s is there already and holds no key: nothing is overwritten", path)
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if ec, ok := k.(*ecdsa.PrivateKey); err == nil && ok {
		return ec, nil
	}
	return nil, fault.Because(err, op, fault.Conflict, "%s is there already and holds another kind of key: nothing is overwritten", path)
}

// granted is what the control plane gave.
type granted struct {
	leaf *x509.Certificate
	role string
	held answered // the CAs
}

func (d desk) accept(ctx context.Context, i identity.Invitation) (granted, error) {
	invite, err := identity.InviteKey(i.Secret)
	if err != nil {
		return granted{}, err
	}
	key, err := d.key()
	if err != nil {
		return granted{}, err
	}
	csr, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return granted{}, err
	}
	var held answered
	req := &controlv1.AcceptInvitationRequest{Name: i.Name, Csr: csr, Verifier: invite.Public().(ed25519.PublicKey), Proof: identity.SignInvite(invite, i.TrustDomain, i.Name, csr)}
	m, err := asStranger(ctx, i.TrustDomain, i.Nodes, []byte(i.LogKey), func(ctx context.Context, c stranger) (*controlv1.AcceptInvitationResponse, error) {
		held, req.BundleHeld = c.held, c.held.Number
		return wire(c.AcceptInvitation(ctx, connect.NewRequest(req)))
	})
	if err != nil {
		if fault.Of(err) == fault.Denied || fault.Of(err) == fault.Expired || fault.Of(err) == fault.Invalid {
			_ = os.Remove(d.path("key")) // it got no certificate and never will
		}
		return granted{}, err
	}
	got, err := checkGranted(m.GetCertificate(), held, m.GetRole(), key, i.TrustDomain, i.Name)
	if err != nil {
		return granted{}, err
	}
	return got, d.write(operator{TrustDomain: i.TrustDomain, Name: i.Name, Nodes: i.Nodes}, got, []byte(i.LogKey))
}

// checkGranted reads what a control plane answered: a certificate of this key and this name.
func checkGranted(cert []byte, held answered, role string, key crypto.Signer, trustDomain, name string) (granted, error) {
	const op = "demarc.accept"
	leaf, err := x509.ParseCertificate(cert)
	if err != nil {
		return granted{}, fault.Because(err, op, fault.Invalid, "the control plane answered with no certificate")
	}
	if pub, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(key.Public()) {
		return granted{}, fault.New(op, fault.Invalid, "the certificate is not of the key that asked for it")
	}
	if want := string(fleet.PrincipalOf(trustDomain, fleet.Operator, name)); len(leaf.URIs) != 1 || leaf.URIs[0].String() != want {
		return granted{}, fault.New(op, fault.Invalid, "the certificate is not that of %s", want)
	}
	return granted{leaf, role, held}, nil
}

// write writes the files but for the key, which is there; the operator's file comes last.
func (d desk) write(o operator, got granted, logKey []byte) error {
	own, err := drawKeys()
	if err != nil {
		return err
	}
	base := filepath.Base(d.path(""))
	o.Certificate, o.Key, o.Bundle, o.LogKey, o.SigningKey, o.RequestKey, o.RecipientKey = base+"cert.pem", base+"key", base+"bundle.pem", base+"log.pub", base+"signing.key", base+"request.key", base+"recipient.key"
	file, err := yaml.Marshal(o)
	if err != nil {
		return fault.At("demarc.accept", fault.Internal, err)
	}
	if err := storeBundle(d.path("bundle.pem"), got.held.sealed, got.held.CAs); err != nil {
		return err
	}
	for _, f := range append(own.files(), keyFile{what: "log.pub", b: logKey}, keyFile{what: "cert.pem", b: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: got.leaf.Raw})}) {
		if err := replace(map[string][]byte{d.path(f.what): f.b}); err != nil { // of an accept that was cut short here
			return err
		}
	}
	return create(d.file, file, 0o600)
}

// stranger is what a node answers to somebody who has no certificate, and the CAs that prove it.
type stranger struct {
	held answered
	controlv1connect.OperatorBootstrapClient
	boundaryv1connect.BootstrapClient
}

// asStranger asks one node after another as somebody who has no certificate. It first gets the CAs, signed with the key that
// is pinned, over a connection that proves nothing; what counts is asked over one that those CAs prove.
func asStranger[Res any](ctx context.Context, trustDomain string, nodes []string, logKey []byte, do func(ctx context.Context, c stranger) (Res, error)) (Res, error) {
	var none Res
	pinned, err := seal.ParseKey(logKey)
	if err != nil {
		return none, err
	}
	began := time.Now()
	var last error
	sure := false // last is the answer of a node that was reached
	for round := 1; ; round++ {
		hope := false
		for _, node := range nodes {
			res, err := strangerAt(ctx, trustDomain, node, pinned, do)
			var one nodeError
			if err == nil || !passing(err) && !errors.As(err, &one) {
				return res, err
			}
			if last == nil || !passing(err) || !sure {
				sure = !passing(err)
				last = fault.Because(err, "demarc.ask", fault.Of(err), "node %s: %s", node, fault.Text(err))
			}
			hope = hope || passing(err)
		}
		if !hope || sure && round >= sureRounds || !pause(ctx, round) {
			return none, giveUp(last, time.Since(began))
		}
	}
}

func strangerAt[Res any](ctx context.Context, trustDomain, node string, pinned seal.Key, do func(ctx context.Context, c stranger) (Res, error)) (Res, error) {
	var none Res
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	bundle, err := askBundle(ctx, trustDomain, node, pinned, 0)
	if err != nil {
		return none, err
	}
	cas, err := identity.ParseDER(bundle.CAs, trustDomain)
	if err != nil {
		return none, err
	}
	way := strangerWay(identity.Client(identity.Fixed(nil, identity.Pool(cas)), identity.WantNode(trustDomain), "h2"))
	defer way.CloseIdleConnections()
	client, at := &http.Client{Transport: api.Sent(way)}, "https://"+node
	opts := []connect.ClientOption{connect.WithReadMaxBytes(4 * identity.MaxBundle), api.Doubt()}
	return do(ctx, stranger{bundle, controlv1connect.NewOperatorBootstrapClient(client, at, opts...), boundaryv1connect.NewBootstrapClient(client, at, opts...)})
}

func strangerWay(conf *tls.Config) *http.Transport {
	t := &http.Transport{TLSClientConfig: conf, TLSHandshakeTimeout: 5 * time.Second, DialContext: (&net.Dialer{Timeout: 3 * time.Second}).DialContext, Protocols: new(http.Protocols)}
	t.Protocols.SetHTTP2(true)
	return t
}
