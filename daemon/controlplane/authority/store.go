// SPDX-License-Identifier: Apache-2.0

// Package authority holds the sealed keys of the control plane: the certificate authorities, the key of the audit log, and the secrets
// that the vendor supplied. It signs certificates and bundles with them, and makes and renews this node's own certificate.
package authority

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// logKey derives the signing key of the vendor's log for a new book: every node with the key-encryption key can derive it. The book then
// stores it as a separate secret.
func logKey(kek []byte) (ed25519.PrivateKey, error) {
	const op = "controlplane.logKey"
	if len(kek) != 32 {
		return nil, fault.New(op, fault.Invalid, "the key that seals the CA must have 32 bytes, this one has %d", len(kek))
	}
	seed, err := hkdf.Key(sha256.New, kek, nil, "demarc-log-key/1", ed25519.SeedSize)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// Store holds the key-encryption keys of this node, and opens what is sealed with them in the book. Its methods may be called concurrently.
type Store struct {
	Config
	replica *book.Replica
	log     *slog.Logger

	keyring     Keyring
	secretCache secretCache
	signed      signedBundleCache
	saved       atomic.Pointer[savedCredentials] // the credentials on this node's disk; nil if none
	current     atomic.Bool                      // the book was found to be the newest, and the leader was not lost since
	source      atomic.Pointer[Source]
}

// Config configures a store.
type Config struct {
	Replica  *book.Replica
	KEK      []byte // 32 bytes; opens the CA keys. See [Store.TendKeys] for another one
	LeafLife time.Duration
	Backdate time.Duration                                                     // of certificates, from their issue
	Dial     func(ctx context.Context, network, addr string) (net.Conn, error) // to another node's API, for [Source.CatchUp]; nil: TCP
	// Snapshot makes sure that what this node starts from has the entries of its log up to an index; nil: it starts from nothing.
	Snapshot func(ctx context.Context, index uint64) error
	Log      *slog.Logger
}

// NewStore makes a store.
func NewStore(c Config) (*Store, error) {
	key, err := NewKEK(c.KEK)
	if err != nil {
		return nil, err
	}
	s := &Store{Config: c, replica: c.Replica, log: c.Log}
	s.keyring.set(key)
	return s, nil
}

// Service answers the calls of operators about authorities, keys and secrets.
type Service struct {
	store   *Store
	replica *book.Replica
	log     *slog.Logger

	controlv1connect.UnimplementedKeyServiceHandler
}

// NewService makes a service.
func NewService(s *Store) *Service { return &Service{store: s, replica: s.replica, log: s.log} }

// Keyring is the key-encryption keys of this node: the one of kek_file, and the next one during a rotation.
type Keyring struct {
	mu   sync.Mutex
	keys []KEK // that of kek_file first
}

// KEK is a key-encryption key and its name.
type KEK struct {
	ID  string
	Key []byte
}

// NewKEK names a key-encryption key.
func NewKEK(key []byte) (KEK, error) {
	id, err := identity.KEKID(key)
	return KEK{id, key}, err
}

func (r *Keyring) set(keys ...KEK) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keys = keys
}

// IDs lists the names of the keys.
func (r *Keyring) IDs() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for _, k := range r.keys {
		out = append(out, k.ID)
	}
	return out
}

func (r *Keyring) all() []KEK {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.keys)
}

// Get returns a key by name; that of kek_file if the book names none yet. Without such a key it returns fault.Unavailable.
func (r *Keyring) Get(id string) (KEK, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range r.keys {
		if id == "" || k.ID == id {
			return k, nil
		}
	}
	return KEK{}, fault.New("controlplane.kek", fault.Unavailable,
		"this node does not hold key %s, which seals the keys of the book: kek_file is another one", id)
}

// secretCache caches the opened secrets of the newest state.
type secretCache struct {
	mu    sync.Mutex
	of    book.Version // of the sealed ones
	ready bool
	log   ed25519.PrivateKey
	nonce []byte
}

// Secrets opens the vendor's own secrets. They are derived if the book has none yet: it is new, or of an older build.
func (s *Store) Secrets() (log ed25519.PrivateKey, nonce []byte, err error) {
	st := s.replica.View()
	if k := s.savedIfNewer(st); k != nil {
		return k.logKey(), k.keys.Nonce, nil
	}
	of := st.SecretsVersion()
	v := &s.secretCache
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ready && v.of == of {
		return v.log, v.nonce, nil
	}
	k, err := s.keyring.Get(st.KEK)
	if err != nil {
		return nil, nil, err
	}
	var seed []byte
	if len(st.Secrets) == 0 {
		if log, err = logKey(k.Key); err != nil {
			return nil, nil, err
		}
		if nonce, err = nonceKey(k.Key); err != nil {
			return nil, nil, err
		}
	} else {
		if seed, err = openSecret(st, book.SecretLogKey, ed25519.SeedSize, k.Key); err != nil {
			return nil, nil, err
		}
		if nonce, err = openSecret(st, book.SecretNonceKey, 32, k.Key); err != nil {
			return nil, nil, err
		}
		log = ed25519.NewKeyFromSeed(seed)
	}
	v.of, v.ready, v.log, v.nonce = of, true, log, nonce
	return log, nonce, nil
}

func openSecret(st book.State, name string, size int, key []byte) ([]byte, error) {
	for _, one := range st.Secrets {
		if one.Name != name {
			continue
		}
		b, err := identity.OpenSecret(name, one.Sealed, key)
		if err == nil && len(b) != size {
			err = fault.New("controlplane.secret", fault.Internal, "the secret %q has %d bytes, want %d", name, len(b), size)
		}
		return b, err
	}
	return nil, fault.New("controlplane.secret", fault.NotFound, "the book has no secret %q", name)
}

// LogSigner is the key that signs the checkpoints of the vendor's log.
func (s *Store) LogSigner() (ed25519.PrivateKey, error) {
	log, _, err := s.Secrets()
	return log, err
}

// nonceKey derives the key of nonces, as older builds did: every node with the key-encryption key can derive it.
func nonceKey(kek []byte) ([]byte, error) {
	b, err := hkdf.Key(sha256.New, kek, nil, "demarc-nonce-key/1", 32)
	return b, fault.At("controlplane.nonceKey", fault.Internal, err)
}

// CheckKEK returns nil if this node has the key that seals the keys of the book, and it opens them.
func (s *Store) CheckKEK() error {
	st := s.replica.View()
	k, err := s.keyring.Get(st.KEK)
	if err != nil {
		return err
	}
	slot, err := identity.Issuer(st.Slots)
	if err != nil {
		return err
	}
	_, err = identity.OpenAuthority(slot.CertDER, slot.SealedKey, k.Key)
	return err
}

// seedSecrets puts the secrets into a book that has none.
func (s *Store) seedSecrets(ctx context.Context) error {
	if err := s.CheckKEK(); err != nil { // another key would derive other secrets
		return err
	}
	k, err := s.keyring.Get("")
	if err != nil {
		return err
	}
	log, nonce, err := s.Secrets()
	if err != nil {
		return err
	}
	c := book.KeepSecrets{KEK: k.ID}
	for _, one := range []struct {
		name string
		b    []byte
	}{{book.SecretLogKey, log.Seed()}, {book.SecretNonceKey, nonce}} {
		sealed, err := identity.SealSecret(one.name, one.b, k.Key, rand.Reader)
		if err != nil {
			return err
		}
		c.Secrets = append(c.Secrets, book.Secret{Name: one.name, Sealed: sealed})
	}
	_, err = book.Submit(ctx, s.replica, s.replica.Self(), "", c)
	return err
}

// KEKFiles is where a node's key-encryption keys are.
type KEKFiles struct{ Current string }

// Next is where the next key is put while it is rotated.
func (f KEKFiles) Next() string { return f.Current + ".next" }

// Read reads the keys: the current one first, then the next one if there is one.
func (f KEKFiles) Read() ([]KEK, error) {
	const op = "controlplane.kek"
	var keys []KEK
	for _, path := range []string{f.Current, f.Next()} {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) && path != f.Current {
			continue
		}
		if err != nil {
			return nil, fault.Because(err, op, fault.Invalid, "kek_file can't be read: %s", path)
		}
		k, err := NewKEK(b)
		if err != nil {
			return nil, fault.Because(err, op, fault.Invalid, "%s: %s", path, fault.Text(err))
		}
		if len(keys) == 0 || keys[0].ID != k.ID {
			keys = append(keys, k)
		}
	}
	return keys, nil
}

// ReadKeys loads the keys of the files. Call it before the store is used.
func (s *Store) ReadKeys(f KEKFiles) error {
	keys, err := f.Read()
	if err == nil {
		s.keyring.set(keys...)
	}
	return err
}

// sync writes the files through to the disk, as far as the file system allows: the program that created them may not have.
func (f KEKFiles) sync() {
	for _, path := range []string{f.Current, f.Next(), filepath.Dir(f.Current)} {
		if h, err := os.Open(path); err == nil {
			_ = h.Sync() // some file systems for secrets have no sync, and need none
			_ = h.Close()
		}
	}
}

// promoteNext replaces a key that no longer seals anything by the next one.
func (f KEKFiles) promoteNext(next KEK) error {
	const op = "controlplane.kek"
	if b, err := os.ReadFile(f.Next()); err != nil || !bytes.Equal(b, next.Key) {
		return fault.Because(err, op, fault.Conflict, "%s is not the key that it was", f.Next())
	}
	f.sync()
	if err := os.Rename(f.Next(), f.Current); err != nil {
		return fault.Because(err, op, fault.Unavailable, "%s can't take the place of %s: do it by hand", f.Next(), f.Current)
	}
	f.sync()
	return nil
}

// kekEvery is how often the files of the key-encryption keys are checked.
const kekEvery = 2 * time.Second

// TendKeys keeps the keys of this node, and what the book knows of them, in step with the files, until ctx ends: it puts the secrets into
// a book that has none, records which keys this node has, and drops the old one after a rotation.
func (s *Store) TendKeys(ctx context.Context, f KEKFiles) error {
	tick := time.NewTicker(kekEvery)
	defer tick.Stop()
	var said string
	for {
		changed := s.replica.Changed()
		was := s.replica.View().KEKVersion()
		if err := s.tendKeys(ctx, f); err != nil && ctx.Err() == nil {
			if text := err.Error(); text != said { // once, and not in each round
				s.log.Warn("the keys of this node are not in step", "err", err)
				said = text
			}
			changed = nil // changes of the book do not repair a local failure
		}
		for news := false; !news; {
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
				news = true
			case <-changed: // the files are read if the keys in the book changed, and not at each change
				changed = s.replica.Changed()
				news = s.replica.View().KEKVersion() != was
			}
		}
	}
}

func (s *Store) tendKeys(ctx context.Context, f KEKFiles) error {
	keys, err := f.Read()
	if err != nil {
		return err
	}
	s.keyring.set(keys...)
	if s.replica.View().TrustDomain == "" || !s.upToDate(ctx) {
		return nil // the next round checks again
	}
	st := s.replica.View()
	at := s.replica.Book.Index() // of the state or later
	if st.KEK == "" {
		return s.seedSecrets(ctx)
	}
	source := s.source.Load()
	if source != nil { // sealed with each key, before the book records that this node has it
		if err := source.Save(); err != nil {
			return err
		}
	}
	ids := s.keyring.IDs()
	if len(ids) == 2 && ids[1] == st.KEK {
		ids = ids[1:]
	}
	had := st.Holds(s.replica.Node)
	if slices.Equal(had, ids) && len(keys) == len(ids) {
		return nil
	}
	f.sync()
	if loses := func(id string) bool { return !slices.Contains(ids, id) }; slices.ContainsFunc(had, loses) || len(keys) > len(ids) {
		if err := s.releaseKEK(ctx, f, keys, at, source); err != nil {
			return err
		}
	}
	_, err = book.Submit(ctx, s.replica, s.replica.Self(), "", book.HoldsKEK{Node: s.replica.Node, IDs: ids})
	return err
}

// releaseKEK drops a key that sealed nothing after the log entry at. From then on the key may be destroyed, so everything that this node
// starts from, also the snapshot of its log, is sealed with the one in use first.
func (s *Store) releaseKEK(ctx context.Context, f KEKFiles, keys []KEK, at uint64, source *Source) error {
	in := keys[len(keys)-1]
	if s.Snapshot != nil {
		if err := s.Snapshot(ctx, at); err != nil {
			return fault.Because(err, "controlplane.kek", "",
				"the key that sealed the keys before is kept until a snapshot is taken: %s", fault.Text(err))
		}
	}
	if len(keys) == 2 {
		if err := f.promoteNext(in); err != nil {
			return err
		}
		s.log.Info("the key that sealed the keys before was dropped", "key", keys[0].ID, "now", in.ID)
		s.keyring.set(in)
	}
	if source != nil {
		return source.Save() // with that key alone
	}
	return nil
}

// upToDate reports whether this node's book is the newest; it contacts the leader if that is not known yet.
func (s *Store) upToDate(ctx context.Context) bool {
	if !s.current.Load() && s.replica.Read(ctx) == nil {
		s.current.Store(true)
	}
	return s.current.Load()
}

// KEKNames lists the names of this node's key-encryption keys.
func (s *Store) KEKNames() []string { return s.keyring.IDs() }
