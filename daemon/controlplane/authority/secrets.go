// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

// PutSecret seals a value and puts it into the book. The value is in no log, no entry and no answer.
func (s *Service) PutSecret(ctx context.Context,
	req *connect.Request[controlv1.PutSecretRequest]) (*connect.Response[controlv1.PutSecretResponse], error) {
	const op = "controlplane.PutSecret"
	m := req.Msg
	if err := book.OwnSecret(op, m.GetName()); err != nil { // before anything is sealed
		return nil, err
	}
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	k, err := s.store.keyring.Get(s.replica.View().KEK)
	if err != nil {
		return nil, err
	}
	id := m.GetRequestId()
	if id == "" {
		id = string(book.DrawRequestID())
	}
	by := api.From(ctx).Principal
	sealed, err := identity.SealSecret(m.GetName(), m.GetValue(), k.Key, onceFor(k.Key, string(by), id, m.GetName(), m.GetValue()))
	if err != nil {
		return nil, err
	}
	if _, err := book.Submit(ctx, s.replica, by, fleet.RequestID(id), book.PutSecret{KEK: k.ID, Name: m.GetName(),
		Sealed: sealed}); err != nil {
		return nil, err
	}
	s.log.Info("a secret was put into the book", "secret", m.GetName(), "by", by)
	return connect.NewResponse(&controlv1.PutSecretResponse{}), nil
}

// onceFor returns pseudo-random bytes that are unique to a request, so that a repeated request is the same change at any node.
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

// ListSecrets returns which secrets were supplied, when, and by whom.
func (s *Service) ListSecrets(ctx context.Context,
	_ *connect.Request[controlv1.ListSecretsRequest]) (*connect.Response[controlv1.ListSecretsResponse], error) {
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	out := &controlv1.ListSecretsResponse{}
	for name, g := range s.replica.View().VendorSecrets() {
		out.Secrets = append(out.Secrets, &controlv1.SecretRecord{Name: name, SinceUnix: g.At.Unix(), By: string(g.By)})
	}
	return connect.NewResponse(out), nil
}

// ForgetSecret removes a secret from the book.
func (s *Service) ForgetSecret(ctx context.Context,
	req *connect.Request[controlv1.ForgetSecretRequest]) (*connect.Response[controlv1.ForgetSecretResponse], error) {
	_, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(req.Msg.GetRequestId()),
		book.ForgetSecret{Name: req.Msg.GetName()})
	return connect.NewResponse(&controlv1.ForgetSecretResponse{}), err
}

// Secret opens a secret that the vendor supplied. The value is for this process only.
func (s *Store) Secret(name string) ([]byte, error) {
	const op = "controlplane.Secret"
	st := s.replica.View()
	if _, ok := st.Given(name); !ok {
		return nil, book.NoSecret(op, name)
	}
	k, err := s.keyring.Get(st.KEK)
	if err != nil {
		return nil, err
	}
	for _, one := range st.Secrets {
		if one.Name == name {
			return identity.OpenSecret(name, one.Sealed, k.Key)
		}
	}
	return nil, book.NoSecret(op, name)
}
