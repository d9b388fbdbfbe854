// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
)

// MaxSecrets bounds the secrets of a book, those of the control plane itself included.
const MaxSecrets = 64

// Given says who gave a secret, and when. Nothing in it is made of the value.
type Given struct {
	At time.Time       `json:"at"`
	By fleet.Principal `json:"by"`
}

// PutSecret puts a secret that the vendor gave into the book, sealed, or another value in its place.
type PutSecret struct {
	KEK    string `json:"kek"` // that sealed it
	Name   string `json:"name"`
	Sealed []byte `json:"sealed"`
}

// Kind names the change in the log.
func (PutSecret) Kind() string { return "secrets.put/1" }

// Private keeps what is sealed out of the audit log, which outsiders read. Its digest is there, with who and when.
func (PutSecret) Private() bool { return true }

// Apply refuses what is sealed with another key than the book's, and the names of the control plane's own secrets.
func (c PutSecret) Apply(s *State, m ledger.Meta) (Nothing, error) {
	const op = "secrets.put"
	if err := ownSecret(op, c.Name); err != nil {
		return Nothing{}, err
	}
	if c.KEK == "" || c.KEK != s.KEK {
		return Nothing{}, fault.New(op, fault.Unavailable, "the key that seals the secrets was replaced meanwhile: try again")
	}
	i, is := slices.BinarySearchFunc(s.Secrets, c.Name, func(one Secret, name string) int { return strings.Compare(one.Name, name) })
	secrets := slices.Clone(s.Secrets)
	if is {
		secrets[i].Sealed = c.Sealed
	} else if secrets = slices.Insert(secrets, i, Secret{c.Name, c.Sealed}); len(secrets) > MaxSecrets {
		return Nothing{}, fault.New(op, fault.Conflict, "the book holds %d secrets, as many as it may: forget one first", len(s.Secrets))
	}
	if err := checkSecrets(op, secrets); err != nil {
		return Nothing{}, err
	}
	s.Secrets, s.given = secrets, s.given.Set(c.Name, Given{m.At, m.By})
	return Nothing{}, nil
}

// ForgetSecret takes a secret that the vendor gave out of the book. Old entries of the log, snapshots and backups keep it, sealed.
type ForgetSecret struct {
	Name string `json:"name"`
}

// Kind names the change in the log.
func (ForgetSecret) Kind() string { return "secrets.forget/1" }

// Apply refuses the control plane's own secrets.
func (c ForgetSecret) Apply(s *State, _ ledger.Meta) (Nothing, error) {
	const op = "secrets.forget"
	if err := ownSecret(op, c.Name); err != nil {
		return Nothing{}, err
	}
	if _, ok := s.given.Get(c.Name); !ok {
		return Nothing{}, noSecret(op, c.Name)
	}
	s.Secrets = slices.DeleteFunc(slices.Clone(s.Secrets), func(one Secret) bool { return one.Name == c.Name })
	s.given = s.given.Delete(c.Name)
	return Nothing{}, nil
}

func noSecret(op, name string) error {
	return fault.New(op, fault.NotFound, "there is no secret %q: demarc control-plane secret list", fault.Clip(name))
}

// ownSecret refuses the name of a secret of the control plane itself, and what is no name.
func ownSecret(op, name string) error {
	if name == SecretLogKey || name == SecretNonceKey {
		return fault.New(op, fault.Denied, "%q is a key of the control plane itself: it is neither replaced nor forgotten", name)
	}
	return fleet.CheckName("secret", name)
}

// Given lists the secrets that the vendor gave: who gave each, and when.
func (s State) Given(name string) (Given, bool) { return s.given.Get(name) }

// PutSecret seals a value and puts it into the book. The value is in no log, no entry and no answer.
func (s *Server) PutSecret(ctx context.Context, req *connect.Request[controlv1.PutSecretRequest]) (*connect.Response[controlv1.PutSecretResponse], error) {
	const op = "controlplane.PutSecret"
	m := req.Msg
	if err := ownSecret(op, m.GetName()); err != nil { // before anything is sealed
		return nil, err
	}
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	k, err := s.ring.get(s.replica.View().KEK)
	if err != nil {
		return nil, err
	}
	id := m.GetRequestId()
	if id == "" {
		id = string(DrawRequestID())
	}
	by := api.From(ctx).Principal
	sealed, err := identity.SealSecret(m.GetName(), m.GetValue(), k.key, onceFor(k.key, string(by), id, m.GetName(), m.GetValue()))
	if err != nil {
		return nil, err
	}
	if _, err := Submit(ctx, s.replica, by, fleet.RequestID(id), PutSecret{KEK: k.id, Name: m.GetName(), Sealed: sealed}); err != nil {
		return nil, err
	}
	s.log.Info("a secret was put into the book", "secret", m.GetName(), "by", by)
	return connect.NewResponse(&controlv1.PutSecretResponse{}), nil
}

// onceFor gives random bytes that are the same for one question and for no other, so that a question which is asked again, at
// whichever node, is the same change.
func onceFor(kek []byte, by, id, name string, value []byte) *onceReader {
	mac := hmac.New(sha256.New, kek)
	sum := sha256.Sum256(value)
	for _, part := range [][]byte{[]byte("demarc-secret-nonce/1"), []byte(by), []byte(id), []byte(name), sum[:]} {
		mac.Write([]byte{byte(len(part) >> 8), byte(len(part))})
		mac.Write(part)
	}
	return &onceReader{mac.Sum(nil)}
}

type onceReader struct{ left []byte }

// Read implements io.Reader: all of it or an error, so that no nonce is ever short.
func (o *onceReader) Read(p []byte) (int, error) {
	if len(p) > len(o.left) {
		return 0, fault.New("controlplane.onceFor", fault.Internal, "a nonce of more bytes than there are")
	}
	n := copy(p, o.left)
	o.left = o.left[n:]
	return n, nil
}

// ListSecrets tells which secrets were given, when, and by whom.
func (s *Server) ListSecrets(ctx context.Context, _ *connect.Request[controlv1.ListSecretsRequest]) (*connect.Response[controlv1.ListSecretsResponse], error) {
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	out := &controlv1.ListSecretsResponse{}
	for name, g := range s.replica.View().VendorSecrets() {
		out.Secrets = append(out.Secrets, &controlv1.SecretRecord{Name: name, SinceUnix: g.At.Unix(), By: string(g.By)})
	}
	return connect.NewResponse(out), nil
}

// ForgetSecret takes one out of the book.
func (s *Server) ForgetSecret(ctx context.Context, req *connect.Request[controlv1.ForgetSecretRequest]) (*connect.Response[controlv1.ForgetSecretResponse], error) {
	_, err := Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(req.Msg.GetRequestId()), ForgetSecret{Name: req.Msg.GetName()})
	return connect.NewResponse(&controlv1.ForgetSecretResponse{}), err
}

// Secret opens one that the vendor gave. It is for this process only.
func (s *Server) Secret(name string) ([]byte, error) {
	const op = "controlplane.Secret"
	page := s.replica.View()
	if _, ok := page.Given(name); !ok {
		return nil, noSecret(op, name)
	}
	k, err := s.ring.get(page.KEK)
	if err != nil {
		return nil, err
	}
	for _, one := range page.Secrets {
		if one.Name == name {
			return identity.OpenSecret(name, one.Sealed, k.key)
		}
	}
	return nil, noSecret(op, name)
}
