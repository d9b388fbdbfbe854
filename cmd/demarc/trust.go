// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/smallfile"
)

// trust is an operator's certificate and the CAs by which the operator's command recognises the vendor's nodes: those of the bundle file.
// It is an [identity.Source]. When a node shows a certificate of a CA that is not known, or says that there is a newer bundle, the command
// asks that node for the signed bundle, verifies it with the key of the vendor's log, puts it in the place of the file, and goes on.
// Its methods may be called concurrently.
type trust struct {
	o    operator
	leaf *tls.Certificate

	mu     sync.Mutex
	pinned *seal.Key // of the vendor's log; nil until the first answer of a node that was recognised
	cas    [][]byte  // of the bundle file, DER
	pool   *x509.CertPool
	number uint64 // of the bundle; 0 if the file is not one that was verified here
	newest uint64 // that a node has spoken of
}

// openTrust reads the bundle file, and beside it the signed bundle that it is of, which alone tells its number.
func openTrust(o operator, leaf *tls.Certificate) (*trust, error) {
	b, err := readBounded(o.Bundle, identity.MaxBundle)
	if err != nil {
		return nil, err
	}
	cas, err := identity.ParseBundle(b, o.TrustDomain)
	if err != nil {
		return nil, fault.Because(err, "demarc.vendor", fault.Of(err), "%s: %s", o.Bundle, fault.Text(err))
	}
	t := &trust{o: o, leaf: leaf, pool: identity.Pool(cas)}
	for _, ca := range cas {
		t.cas = append(t.cas, ca.Raw)
	}
	switch key, err := readLogKey(o.LogKey); {
	case err == nil:
		t.pinned = &key
	case fault.Of(err) != fault.NotFound:
		return nil, err
	}
	if t.pinned != nil {
		if sealed, err := readBounded(signedFile(o.Bundle), 2*identity.MaxBundle); err == nil {
			if kept, err := identity.OpenKeptBundle(sealed, *t.pinned, o.TrustDomain); err == nil && sameCAs(kept.CAs, t.cas) {
				t.number = kept.Number
			}
		}
	}
	return t, nil
}

// signedFile is where the signed bundle is kept that a bundle file is of.
func signedFile(bundle string) string {
	return strings.TrimSuffix(bundle, filepath.Ext(bundle)) + ".signed"
}

func readLogKey(path string) (seal.Key, error) {
	b, err := readBounded(path, identity.MaxBundle)
	if err != nil {
		return seal.Key{}, err
	}
	key, err := seal.ParseKey(b)
	if err != nil {
		return seal.Key{}, fault.Because(err, "demarc.vendor", fault.Invalid, "log_key: %s: %s", path, fault.Text(err))
	}
	return key, nil
}

func sameCAs(a, b [][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}

// storeBundle puts a verified bundle in the place of a bundle file, each of the two files as a whole. If that is cut short between them,
// the bundle file is of another number than the signed one, its number is not known, and the command asks again.
func storeBundle(path string, sealed []byte, cas [][]byte) error {
	var file bytes.Buffer
	for _, ca := range cas {
		file.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca}))
	}
	if err := errors.Join(smallfile.Replace(signedFile(path), sealed), smallfile.Replace(path, file.Bytes())); err != nil {
		return fault.Because(err, "demarc.bundle", fault.Unavailable, "the vendor's newest CAs can't be written to %s", path)
	}
	return fault.At("demarc.bundle", fault.Unavailable, os.Chmod(path, 0o644)) // no secret, and others are told to copy it
}

// Leaf implements [identity.Source].
func (t *trust) Leaf() (*tls.Certificate, error) { return t.leaf, nil }

// Roots implements [identity.Source].
func (t *trust) Roots() *x509.CertPool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pool
}

// held is the number of the bundle.
func (t *trust) held() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.number
}

// heard takes what a node that was recognised says is the newest bundle.
func (t *trust) heard(says string) {
	number, err := strconv.ParseUint(says, 10, 64)
	if err != nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.newest = max(t.newest, number)
}

// behind reports whether a node spoke of a bundle that is not held.
func (t *trust) behind() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.newest > t.number
}

func (t *trust) logKey() *seal.Key {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pinned
}

// pin keeps the key of the vendor's log, as a node told it that was recognised.
func (t *trust) pin(pem []byte) error {
	key, err := seal.ParseKey(pem)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pinned = &key
	return create(t.o.LogKey, pem, 0o644)
}

// ask gets the signed bundle from whoever answers at a node's address, and takes it if it is no older than the one that is held. It
// reports whether it brought CAs that were not known, or took known ones away. The error says why they are not in the file, if they are
// not: for this command they count nevertheless.
func (t *trust) ask(ctx context.Context, node string) (news bool, err error) {
	pinned := t.logKey()
	if pinned == nil {
		return false, fault.New("demarc.bundle", fault.NotFound, "the key of the vendor's log is not known: %s", t.o.LogKey)
	}
	got, err := askBundle(ctx, t.o.TrustDomain, node, *pinned, t.held())
	if err != nil {
		return false, err
	}
	cas, err := identity.ParseDER(got.CAs, t.o.TrustDomain)
	if err != nil {
		return false, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if got.Number < t.number { // another one came meanwhile
		return false, nil
	}
	news = !sameCAs(got.CAs, t.cas)
	if !news && got.Number == t.number {
		return false, nil
	}
	t.cas, t.pool, t.number = got.CAs, identity.Pool(cas), got.Number
	return news, storeBundle(t.o.Bundle, got.sealed, got.CAs)
}

// answered is a signed bundle that was verified, and as it came.
type answered struct {
	identity.SignedBundle
	sealed []byte
}

// askBundle asks WHOEVER ANSWERS for the signed bundle. THIS CONNECTION IS NOT VERIFIED. That is safe as it is at the appliance, which does
// the same: nothing goes out on it but random bytes, and nothing that comes back is believed but a document that the pinned key signed over
// them, no older than the one that is held.
func askBundle(ctx context.Context, trustDomain, node string, pinned seal.Key, held uint64) (answered, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	nonce := make([]byte, identity.MaxBundleNonce)
	_, _ = rand.Read(nonce) // crypto/rand.Read never fails
	blind := strangerWay(&tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	defer blind.CloseIdleConnections()
	m, err := wire(boundaryv1connect.NewBootstrapClient(&http.Client{Transport: blind}, "https://"+node, connect.WithReadMaxBytes(4*identity.MaxBundle)).
		Bundle(ctx, connect.NewRequest(&boundaryv1.BundleRequest{Nonce: nonce})))
	if err != nil {
		return answered{}, err
	}
	b, err := identity.OpenBundle(m.GetSealed(), pinned, trustDomain, nonce, held)
	if err != nil {
		return answered{}, fault.Because(nodeError{err}, "demarc.bundle", fault.Of(err), "whoever answers is not the control plane of the invitation, or of the log key that is pinned here, or a proxy on the path opens TLS: %s", fault.Text(err))
	}
	return answered{b, m.GetSealed()}, nil
}

// foreign reports whether a node could not be recognised by the CAs that are held.
func foreign(err error) bool {
	var unknown x509.UnknownAuthorityError
	return errors.As(err, &unknown)
}

// tell is the way to a node that says which bundle is held and hears which is the newest.
type tell struct {
	v   *vendor
	way http.RoundTripper
}

// RoundTrip implements [http.RoundTripper].
func (t tell) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.v.trust == nil {
		return t.way.RoundTrip(r)
	}
	r = r.Clone(r.Context())
	r.Header.Set(api.BundleHeader, strconv.FormatUint(t.v.trust.held(), 10))
	res, err := t.way.RoundTrip(r)
	if err == nil {
		t.v.trust.heard(res.Header.Get(api.BundleHeader))
	}
	return res, err
}

// settleWait bounds what comes after a command whose answer is there already.
const settleWait = 10 * time.Second

// settle stores the newest bundle once a node has said that there is one, and acknowledges it. The command has its answer by then, and that
// counts: what goes wrong here is a word to the operator, and tried again with the next command.
func (v *vendor) settle(ctx context.Context) {
	if v.trust == nil || v.settled || v.trust.logKey() != nil && !v.trust.behind() {
		return
	}
	v.settled = true
	ctx, cancel := context.WithTimeout(ctx, settleWait)
	defer cancel()
	door := func() (*controlv1.GetDoorResponse, error) {
		return wire(v.operators[v.at].GetDoor(ctx, connect.NewRequest(&controlv1.GetDoorRequest{})))
	}
	err := func() error {
		if v.trust.logKey() == nil {
			m, err := door()
			if err != nil {
				return err
			}
			if err := v.trust.pin(m.GetLogKey()); err != nil {
				return err
			}
		}
		if !v.trust.behind() {
			return nil
		}
		if _, err := v.trust.ask(ctx, v.Nodes[v.at]); err != nil {
			return err
		}
		_, err := door() // the header says that it is stored
		return err
	}()
	if err != nil && v.warn != nil {
		v.warn("the vendor's CAs changed, and the bundle of this operator's file is not the newest yet: %s", fault.Text(err))
	}
}

// recognise asks a node that could not be recognised for the signed bundle, and reports whether it may be tried again.
func (v *vendor) recognise(ctx context.Context, err error) bool {
	if v.trust == nil || !foreign(err) {
		return false
	}
	news, err := v.trust.ask(ctx, v.Nodes[v.at])
	if err != nil && v.warn != nil && v.trust.logKey() != nil {
		v.warn("node %s: %s", v.Nodes[v.at], fault.Text(err))
	}
	return news
}
