// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/smallfile"
)

// trust is an operator's certificate and the CAs by which the client recognises the vendor's nodes: those of the bundle file.
// It is an [identity.Source]. When a node shows a certificate of a CA that is not known, or announces a newer bundle, the client fetches
// the signed bundle from that node, verifies it with the key of the vendor's log, replaces the file, and continues.
// Its methods may be called concurrently.
type trust struct {
	o    Operator
	leaf *tls.Certificate

	mu        sync.Mutex
	logKey    *seal.Key // of the vendor; nil until the first answer of a node that was recognised
	cas       [][]byte  // of the bundle file, DER
	pool      *x509.CertPool
	number    uint64 // of the bundle; 0 if the file is not one that was verified here
	announced uint64 // the newest bundle that a node has spoken of
}

// openTrust reads the bundle file, and beside it the signed bundle that it is of, which alone has its number.
func openTrust(o Operator, leaf *tls.Certificate) (*trust, error) {
	const op = "client.openTrust"
	b, err := read(o.Bundle, identity.MaxBundle)
	if err != nil {
		return nil, err
	}
	cas, err := identity.ParseBundle(b, o.TrustDomain)
	if err != nil {
		return nil, fault.Because(err, op, fault.Of(err), "%s: %s", o.Bundle, fault.Text(err))
	}
	t := &trust{o: o, leaf: leaf, pool: identity.Pool(cas)}
	for _, ca := range cas {
		t.cas = append(t.cas, ca.Raw)
	}
	switch key, err := readLogKey(o.LogKey); {
	case err == nil:
		t.logKey = &key
	case fault.Of(err) != fault.NotFound:
		return nil, err
	}
	if t.logKey != nil {
		if sealed, err := read(signedFile(o.Bundle), 2*identity.MaxBundle); err == nil {
			if stored, err := identity.OpenKeptBundle(sealed, *t.logKey, o.TrustDomain); err == nil && sameCAs(stored.CAs, t.cas) {
				t.number = stored.Number
			}
		}
	}
	return t, nil
}

// signedFile is where the signed bundle is stored that a bundle file is of.
func signedFile(bundle string) string {
	return strings.TrimSuffix(bundle, filepath.Ext(bundle)) + ".signed"
}

func readLogKey(path string) (seal.Key, error) {
	b, err := read(path, identity.MaxBundle)
	if err != nil {
		return seal.Key{}, err
	}
	key, err := seal.ParseKey(b)
	if err != nil {
		return seal.Key{}, fault.Because(err, "client.readLogKey", fault.Invalid, "log_key: %s: %s", path, fault.Text(err))
	}
	return key, nil
}

func sameCAs(a, b [][]byte) bool {
	return slices.EqualFunc(a, b, func(x, y []byte) bool { return slices.Equal(x, y) })
}

// Leaf implements [identity.Source].
func (t *trust) Leaf() (*tls.Certificate, error) { return t.leaf, nil }

// Roots implements [identity.Source].
func (t *trust) Roots() *x509.CertPool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pool
}

// stored is the number of the bundle that is stored.
func (t *trust) stored() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.number
}

// announce takes a node's word for the newest bundle. What is no number is ignored.
func (t *trust) announce(text string) {
	number, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.announced = max(t.announced, number)
}

// behind reports whether a node announced a bundle that is not stored.
func (t *trust) behind() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.announced > t.number
}

// pinned is the key of the vendor's log, nil if it is not known yet.
func (t *trust) pinned() *seal.Key {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.logKey
}

// pin stores the key of the vendor's log, as a node sent it that was recognised.
func (t *trust) pin(pem []byte) error {
	key, err := seal.ParseKey(pem)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.logKey = &key
	if err := smallfile.Create(t.o.LogKey, pem, 0o644); err != nil {
		return fault.Because(err, "client.pin", fault.Unavailable, "the key of the vendor's log can't be written to %s", t.o.LogKey)
	}
	return nil
}

// fetch gets the signed bundle from whoever answers at a node's address, and stores it if it is no older than the one that is stored. It
// reports whether it brought CAs that were not known, or took known ones away. The error says why they are not in the file, if they are
// not: for this client they count nevertheless.
func (t *trust) fetch(ctx context.Context, node string) (changed bool, err error) {
	pinned := t.pinned()
	if pinned == nil {
		return false, fault.New("client.fetch", fault.NotFound, "the key of the vendor's log is not known: %s", t.o.LogKey)
	}
	got, err := FetchBundle(ctx, t.o.TrustDomain, node, *pinned, t.stored())
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
	changed = !sameCAs(got.CAs, t.cas)
	if !changed && got.Number == t.number {
		return false, nil
	}
	t.cas, t.pool, t.number = got.CAs, identity.Pool(cas), got.Number
	return changed, got.Store(t.o.Bundle)
}

// announcing sends with each request which bundle is stored, and takes from each answer which is the newest.
type announcing struct {
	c    *Client
	next http.RoundTripper
}

// RoundTrip implements [http.RoundTripper].
func (a announcing) RoundTrip(r *http.Request) (*http.Response, error) {
	if a.c.trust == nil {
		return a.next.RoundTrip(r)
	}
	r = r.Clone(r.Context())
	r.Header.Set(api.BundleHeader, strconv.FormatUint(a.c.trust.stored(), 10))
	res, err := a.next.RoundTrip(r)
	if err == nil {
		a.c.trust.announce(res.Header.Get(api.BundleHeader))
	}
	return res, err
}

// refreshTimeout bounds what comes after a call that has its answer already.
const refreshTimeout = 10 * time.Second

// Announced makes the client fetch the newest bundle, because there is one with this number: the node that answered may not have it yet.
func (c *Client) Announced(ctx context.Context, number uint64) {
	if c.trust != nil {
		c.trust.announce(strconv.FormatUint(number, 10))
		c.refresh(ctx)
	}
}

// refresh stores the newest bundle once a node has announced one, and acknowledges it. The call has its answer by then, and that counts:
// what goes wrong here is a warning, and tried again with the next client.
func (c *Client) refresh(ctx context.Context) {
	if c.trust == nil || c.refreshed || c.trust.pinned() != nil && !c.trust.behind() {
		return
	}
	c.refreshed = true
	ctx, cancel := context.WithTimeout(ctx, refreshTimeout)
	defer cancel()
	n := c.nodes[c.at]
	err := func() error {
		if c.trust.pinned() == nil {
			m, err := Do(ctx, n.GetDoor, &controlv1.GetDoorRequest{})
			if err != nil {
				return err
			}
			if err := c.trust.pin(m.GetLogKey()); err != nil {
				return err
			}
		}
		if !c.trust.behind() {
			return nil
		}
		if _, err := c.trust.fetch(ctx, n.address); err != nil {
			return err
		}
		_, err := Do(ctx, n.GetDoor, &controlv1.GetDoorRequest{}) // its header acknowledges the bundle
		return err
	}()
	if err != nil {
		c.warning("the vendor's CAs changed, and the bundle of this operator's file is not the newest yet: %s", fault.Text(err))
	}
}

// recognise fetches the signed bundle from a node that could not be recognised, and reports whether it may be tried again.
func (c *Client) recognise(ctx context.Context, n Node, err error) bool {
	if _, unknown := errors.AsType[x509.UnknownAuthorityError](err); c.trust == nil || !unknown {
		return false
	}
	changed, err := c.trust.fetch(ctx, n.address)
	if err != nil && c.trust.pinned() != nil {
		c.warning("node %s: %s", n.address, fault.Text(err))
	}
	return changed
}

func (c *Client) warning(format string, args ...any) {
	if c.warn != nil {
		c.warn(format, args...)
	}
}
