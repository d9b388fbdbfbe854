// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// TestSecretsLaws: a secret is named, bounded, and sealed with the book's key; those of the control plane itself are nobody's to
// replace; who gave one and when survives a snapshot.
func TestSecretsLaws(t *testing.T) {
	o := newBook(t)
	refused(t, o, fault.Unavailable, book.PutSecret{KEK: "0123456789abcdef", Name: "a", Sealed: []byte("x")}) // it has no key yet
	own := []book.Secret{{Name: book.SecretLogKey, Sealed: []byte("l")}, {Name: book.SecretNonceKey, Sealed: []byte("n")}}
	must(t, o, book.KeepSecrets{KEK: "0123456789abcdef", Secrets: own})
	one := func(name string) book.PutSecret {
		return book.PutSecret{KEK: "0123456789abcdef", Name: name, Sealed: []byte("box of " + name)}
	}
	refused(t, o, fault.Unavailable, book.PutSecret{KEK: "fedcba9876543210", Name: "a", Sealed: []byte("x")})
	for _, s := range own {
		refused(t, o, fault.Denied, one(s.Name))
		refused(t, o, fault.Denied, book.ForgetSecret{Name: s.Name})
	}
	refused(t, o, fault.Invalid, one("A b"))
	refused(t, o, fault.Invalid, book.PutSecret{KEK: "0123456789abcdef", Name: "a"})
	refused(t, o, fault.Invalid, book.PutSecret{KEK: "0123456789abcdef", Name: "a", Sealed: make([]byte, 9<<10)})
	refused(t, o, fault.NotFound, book.ForgetSecret{Name: "zz"})
	for i := range book.MaxSecrets - 2 {
		must(t, o, one(fmt.Sprintf("z%02d", i)))
	}
	refused(t, o, fault.Conflict, one("one-too-many"))
	must(t, o, book.ForgetSecret{Name: "z00"})
	must(t, o, one("a"))
	must(t, o, book.PutSecret{KEK: "0123456789abcdef", Name: "a", Sealed: []byte("another box")})
	page := o.book.View()
	names := func(s book.State) (out []string) {
		for _, one := range s.Secrets {
			out = append(out, one.Name)
		}
		return out
	}
	if all := names(page); !slices.IsSorted(all) || len(all) != book.MaxSecrets || all[0] != "a" || string(page.Secrets[0].Sealed) != "another box" {
		t.Fatalf("%v", all)
	}
	b, err := json.Marshal(page)
	ok(t, err)
	var again book.State
	ok(t, json.Unmarshal(b, &again))
	if g, is := again.Given("a"); !is || g.By != "test" || g.At.IsZero() || !slices.Equal(names(again), names(page)) {
		t.Fatalf("%+v %v", g, is)
	}
	for i := range o.book.Log().Size() {
		if e := o.book.Log().Entry(i); bytes.Contains(e, []byte("box of")) || bytes.Contains(e, []byte(base64.StdEncoding.EncodeToString([]byte("box of a")))) {
			t.Fatalf("what is sealed is in the audit log: %s", e)
		}
	}
}

// TestASecretIsSealedAtTheDoor: an admin puts a value, the node seals it and can open it, no answer gives it back, the same question
// asked twice is done once, and lesser roles are refused.
func TestASecretIsSealedAtTheDoor(t *testing.T) {
	g := newGate(t, 0)
	kek := bytes.Repeat([]byte{7}, 32)
	ann := g.operator("ann")
	ok(t, g.status(ann))
	g.kekFile(kek)
	g.until("the book keeps its secrets", func(s book.State) bool { return len(s.Secrets) == 2 })
	keys := controlv1connect.NewKeyServiceClient(g.caller(ann), "https://"+g.addr)
	value := []byte("tskey-client-" + rand.Text())
	req := &controlv1.PutSecretRequest{RequestId: rand.Text(), Name: "tailnet-oauth", Value: value}
	for range 2 {
		_, err := keys.PutSecret(t.Context(), connect.NewRequest(req))
		ok(t, err)
	}
	_, err := keys.PutSecret(t.Context(), connect.NewRequest(&controlv1.PutSecretRequest{RequestId: req.RequestId, Name: "tailnet-oauth", Value: []byte("another")}))
	refusedWith(t, api.FromWire("test", err), fault.Conflict, "")
	if got, err := g.server.Authority().Secret("tailnet-oauth"); err != nil || !bytes.Equal(got, value) {
		t.Fatalf("%q %v", got, err)
	}
	list, err := keys.ListSecrets(t.Context(), connect.NewRequest(&controlv1.ListSecretsRequest{}))
	ok(t, err)
	if s := list.Msg.GetSecrets(); len(s) != 1 || s[0].GetName() != "tailnet-oauth" || s[0].GetBy() != string(fleet.PrincipalOf(domain, fleet.Operator, "ann")) || s[0].GetSinceUnix() == 0 {
		t.Fatalf("%v", s)
	}
	b, err := json.Marshal(g.order.book.View())
	ok(t, err)
	for _, where := range []string{string(b), list.Msg.String(), g.last()} {
		if strings.Contains(where, string(value)) || strings.Contains(where, base64.StdEncoding.EncodeToString(value)) {
			t.Fatal("the value is there in the clear")
		}
	}
	_, err = keys.PutSecret(t.Context(), connect.NewRequest(&controlv1.PutSecretRequest{RequestId: rand.Text(), Name: book.SecretLogKey, Value: value}))
	refusedWith(t, api.FromWire("test", err), fault.Denied, "key of the control plane itself")
	ben := controlv1connect.NewKeyServiceClient(g.caller(g.joins(ann, "ben", fleet.Operate)), "https://"+g.addr)
	_, err = ben.PutSecret(t.Context(), connect.NewRequest(&controlv1.PutSecretRequest{RequestId: rand.Text(), Name: "x", Value: value}))
	refusedWith(t, api.FromWire("test", err), fault.Denied, "")
	_, err = keys.ForgetSecret(t.Context(), connect.NewRequest(&controlv1.ForgetSecretRequest{RequestId: rand.Text(), Name: "tailnet-oauth"}))
	ok(t, err)
	if _, err := g.server.Authority().Secret("tailnet-oauth"); fault.Of(err) != fault.NotFound {
		t.Fatalf("a forgotten secret: %v", err)
	}
}
