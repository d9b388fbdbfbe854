// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"slices"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/smallfile"
)

// CredentialsFile is the name of the file, in a node's directory, that stores the node's credentials.
const CredentialsFile = "credentials.json"

const (
	credentialsVersion = "demarc-node-credentials/1"
	credentialsName    = "node-credentials" // of the sealed part
	maxCredentials     = 1 << 20            // bytes
)

// credentials is what a node authenticates with while its book is behind. At start a node has only its snapshot; it learns the commit
// index from a leader, and no leader accepts a certificate of a retired CA. They are one file beside the log, replaced atomically: a
// power loss leaves the old or the new one.
//
// The private keys are sealed once with each key-encryption key that the node has. A node records that it has a key-encryption key only
// after they are sealed with it, so that after a rotation it can open the file with either key.
type credentials struct {
	Version     string        `json:"version"`
	TrustDomain string        `json:"trust_domain"`
	KEK         string        `json:"kek,omitempty"`   // that seals the keys of the book; see [book.State]
	Epoch       uint64        `json:"epoch,omitempty"` // number of the book's epoch; a later epoch has a higher one
	Bundle      []byte        `json:"bundle"`          // the CAs: an [identity.SignedBundle]
	Leaf        []byte        `json:"leaf,omitempty"`
	Peers       []book.Member `json:"peers,omitempty"` // addresses of the other nodes
	Keys        []book.Secret `json:"keys"`            // privateKeys, by the name of the key-encryption key
}

// privateKeys is the sealed part of credentials.
type privateKeys struct {
	Log   []byte                  `json:"log"` // seed of the key of the vendor's log
	Nonce []byte                  `json:"nonce"`
	CAs   map[fleet.Digest][]byte `json:"cas"` // PKCS #8, by the CA's id
	Leaf  []byte                  `json:"leaf,omitempty"`
}

// savedCredentials is credentials whose signatures and keys were verified.
type savedCredentials struct {
	credentials
	bundle identity.SignedBundle
	keys   privateKeys
	leaf   *tls.Certificate // nil: none yet
	issuer fleet.Digest     // of leaf
}

// OpenCredentials reads credentials with any of the given keys. It returns fault.Denied if none of them opens it, and fault.Invalid if it
// is damaged or its signature by the vendor's log key does not verify.
func OpenCredentials(b []byte, trustDomain string, held []KEK) (*savedCredentials, error) {
	const op = "controlplane.openCredentials"
	o := &savedCredentials{}
	if err := seal.StrictJSON(b, &o.credentials); err != nil || o.Version != credentialsVersion || len(b) > maxCredentials {
		return nil, fault.Because(err, op, fault.Invalid, "they are damaged")
	}
	if trustDomain != "" && o.TrustDomain != trustDomain {
		return nil, fault.New(op, fault.Conflict, "they are of the trust domain %q, and not of %q", fault.Clip(o.TrustDomain), trustDomain)
	}
	var plain []byte
	for _, one := range o.Keys {
		i := slices.IndexFunc(held, func(k KEK) bool { return k.ID == one.Name })
		if i < 0 || plain != nil {
			continue
		}
		var err error
		if plain, err = identity.OpenSecret(credentialsName, one.Sealed, held[i].Key); err != nil {
			return nil, fault.Because(err, op, fault.Invalid, "key %s does not open what it sealed: they were altered", one.Name)
		}
	}
	if plain == nil {
		return nil, fault.New(op, fault.Denied, "they are sealed with key %s, which this node does not hold", book.JoinNames(o.sealedWith()))
	}
	if err := seal.StrictJSON(plain, &o.keys); err != nil || len(o.keys.Log) != ed25519.SeedSize {
		return nil, fault.Because(err, op, fault.Invalid, "what they seal is damaged")
	}
	log, err := seal.KeyOf(o.logKey().Public())
	if err != nil {
		return nil, err
	}
	if o.bundle, err = identity.OpenKeptBundle(o.Bundle, log, o.TrustDomain); err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the vendor's log key did not sign the bundle in them: %s", fault.Text(err))
	}
	if len(o.Leaf) > 0 {
		if err := o.openLeaf(); err != nil {
			return nil, err
		}
	}
	return o, nil
}

func (o *savedCredentials) sealedWith() []string {
	var out []string
	for _, one := range o.Keys {
		out = append(out, fault.Clip(one.Name))
	}
	return out
}

func (o *savedCredentials) logKey() ed25519.PrivateKey { return ed25519.NewKeyFromSeed(o.keys.Log) }

// openLeaf reads the certificate, which must be of this key and of a CA of the bundle.
func (o *savedCredentials) openLeaf() error {
	const op = "controlplane.openCredentials"
	cert, err := x509.ParseCertificate(o.Leaf)
	if err != nil {
		return fault.Because(err, op, fault.Invalid, "the certificate in them is damaged")
	}
	key, err := signerOf(o.keys.Leaf, cert)
	if err != nil {
		return err
	}
	for _, der := range o.bundle.CAs {
		if ca, err := x509.ParseCertificate(der); err == nil && cert.CheckSignatureFrom(ca) == nil {
			o.leaf, o.issuer = &tls.Certificate{Certificate: [][]byte{o.Leaf}, PrivateKey: key, Leaf: cert}, fleet.DigestOf(der)
		}
	}
	return nil // of a CA that is no longer trusted: it is not used, and another one is issued
}

// signerOf reads the private key of a certificate.
func signerOf(pkcs8 []byte, cert *x509.Certificate) (crypto.Signer, error) {
	const op = "controlplane.openCredentials"
	any, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "a private key in them is damaged")
	}
	key, ok := any.(crypto.Signer)
	if !ok {
		return nil, fault.New(op, fault.Invalid, "a private key in them signs nothing")
	}
	a, err := x509.MarshalPKIXPublicKey(key.Public())
	if b, err2 := x509.MarshalPKIXPublicKey(cert.PublicKey); err != nil || err2 != nil || !bytes.Equal(a, b) {
		return nil, fault.Because(errors.Join(err, err2), op, fault.Invalid, "a private key in them is not that of its certificate")
	}
	return key, nil
}

// caSet is the CAs that this node uses, and which of them is active.
type caSet struct {
	domain string
	number uint64 // of the bundle; 0: the book has not begun
	cas    [][]byte
	issuer fleet.Digest
	of     any // what it is read from: comparable
	open   func(fleet.Digest) (*identity.Authority, error)
}

func (o *savedCredentials) cas() caSet {
	return caSet{o.TrustDomain, o.bundle.Number, o.bundle.CAs, o.bundle.Issuer, o, func(id fleet.Digest) (*identity.Authority, error) {
		i := slices.IndexFunc(o.bundle.CAs, func(der []byte) bool { return fleet.DigestOf(der) == id })
		if i < 0 || o.keys.CAs[id] == nil {
			return nil, fault.New("controlplane.Source", fault.NotFound,
				"the others issue from CA %s, whose key this node does not hold: make this node anew, see the runbook", id.Short())
		}
		cert, err := x509.ParseCertificate(o.bundle.CAs[i])
		if err != nil {
			return nil, fault.At("controlplane.Source", fault.Invalid, err)
		}
		key, err := signerOf(o.keys.CAs[id], cert)
		return &identity.Authority{Cert: cert, Key: key}, err
	}}
}

// casOf returns the CAs of a state of the book.
func (s *Store) casOf(st book.State) caSet {
	set := caSet{domain: st.TrustDomain, number: st.Bundle()}
	for _, slot := range st.Slots {
		if slot.Stage == identity.Prepared || slot.Stage == identity.Active || slot.Stage == identity.Tainted {
			set.cas = append(set.cas, slot.CertDER)
		}
	}
	if slot, err := identity.Issuer(st.Slots); err == nil {
		set.issuer, set.of = slot.ID(), &st.Slots[0]
	}
	set.open = func(id fleet.Digest) (*identity.Authority, error) {
		slot, err := st.CA("controlplane.Source", id)
		if err != nil {
			return nil, err
		}
		k, err := s.keyring.Get(st.KEK)
		if err != nil {
			return nil, err
		}
		return identity.OpenAuthority(slot.CertDER, slot.SealedKey, k.Key)
	}
	return set
}

// savedIfNewer returns the saved credentials if they take precedence over the book, else nil: until the book is known to be the newest,
// unless its bundle is newer than theirs.
func (s *Store) savedIfNewer(st book.State) *savedCredentials {
	if k := s.saved.Load(); k != nil && !s.current.Load() && k.bundle.Number >= st.Bundle() {
		return k
	}
	return nil
}

// SaveAt makes the source save its credentials in a file, and use those that are there already while the book is behind them. Call it
// before the source is used.
func (f *Source) SaveAt(path string) error {
	const op = "controlplane.KeepAt"
	f.mu.Lock()
	defer f.mu.Unlock()
	f.path = path
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the credentials that this node kept can't be read: %s", path)
	}
	o, err := OpenCredentials(b, "", f.store.keyring.all())
	switch {
	case fault.Of(err) == fault.Denied: // an old copy of a disk, or another kek_file: the newest book shows which of the two
		f.store.log.Warn("the credentials that this node kept do not open: it begins with the certificate of its file", "file", path, "err", err)
		return nil
	case err != nil:
		return fault.Because(err, op, fault.Invalid,
			"%s: %s: remove it, and the node begins with the certificate and the bundle of its file", path, fault.Text(err))
	}
	f.store.saved.Store(o)
	if o.leaf != nil && !f.first.Leaf.NotBefore.After(o.leaf.Leaf.NotBefore) { // a newer file takes precedence
		f.leaf, f.issuer, f.from = o.leaf, o.issuer, identity.RenewFrom(o.leaf.Leaf, f.store.Backdate)
	}
	return nil
}

// save writes the credentials to disk if they changed. The caller holds mu.
func (f *Source) save() error {
	s := f.store
	st, had := s.replica.View(), s.saved.Load()
	set := f.cas()
	if !s.current.Load() && (had == nil || set.of != any(had)) || set.number == 0 {
		return nil // the book is not known to be the newest yet
	}
	next := credentials{Version: credentialsVersion, TrustDomain: set.domain, KEK: st.KEK, Epoch: st.Epoch().Number}
	if s.current.Load() {
		next.Peers = s.replica.Roster()
	} else {
		next.KEK, next.Epoch, next.Peers = had.KEK, had.Epoch, had.Peers
	}
	if f.leaf != nil {
		next.Leaf = f.leaf.Leaf.Raw
	}
	if had != nil && !f.dirty && had.bundle.Number == set.number && slices.EqualFunc(had.bundle.CAs, set.cas, bytes.Equal) &&
		had.bundle.Issuer == set.issuer && had.KEK == next.KEK && had.Epoch == next.Epoch &&
		bytes.Equal(had.Leaf, next.Leaf) && slices.Equal(had.Peers, next.Peers) && slices.Equal(had.sealedWith(), s.keyring.IDs()) {
		return nil
	}
	return f.write(next, set, nil)
}

// write seals and signs credentials and replaces the file. Without a signed bundle it is made of the CAs of set. The caller holds mu.
func (f *Source) write(c credentials, set caSet, signed []byte) error {
	const op = "controlplane.keep"
	s := f.store
	log, nonce, err := s.Secrets()
	if err != nil {
		return err
	}
	keys := privateKeys{Log: log.Seed(), Nonce: nonce, CAs: map[fleet.Digest][]byte{}}
	for _, der := range set.cas {
		id := fleet.DigestOf(der)
		ca, err := set.open(id)
		if err != nil {
			return err
		}
		if keys.CAs[id], err = x509.MarshalPKCS8PrivateKey(ca.Key); err != nil {
			return fault.At(op, fault.Internal, err)
		}
	}
	if c.Leaf != nil {
		if keys.Leaf, err = x509.MarshalPKCS8PrivateKey(f.leaf.PrivateKey); err != nil {
			return fault.At(op, fault.Internal, err)
		}
	}
	if c.Bundle = signed; signed == nil {
		if c.Bundle, err = identity.SealCAs(set.domain, set.number, set.cas, set.issuer, s.replica.Now(), nil, log); err != nil {
			return err
		}
	}
	plain, err := seal.JSON(keys)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	held := s.keyring.all()
	c.Keys = nil
	for _, k := range held {
		sealed, err := identity.SealSecret(credentialsName, plain, k.Key, rand.Reader)
		if err != nil {
			return err
		}
		c.Keys = append(c.Keys, book.Secret{Name: k.ID, Sealed: sealed})
	}
	b, err := json.Marshal(c)
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	o, err := OpenCredentials(b, set.domain, held) // as the next start does
	if err != nil {
		return err
	}
	s.saved.Store(o)
	if f.path == "" {
		return nil
	}
	err = smallfile.Replace(f.path, b)
	f.dirty = err != nil
	return fault.At(op, fault.Unavailable, err)
}

// Save writes the credentials to disk if they changed.
func (f *Source) Save() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.save()
}
