// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/x509"
	"time"

	"connectrpc.com/connect"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// Keep gives a server a store, before it is used.
func (s *Server) Keep(store *artifact.Store) { s.depot.store = store }

// RefusesNode tells whether a certificate of a node is refused, and whether open connections with it end.
func RefusesNode(s book.State, name string, serial fleet.Serial, begins time.Time) (cut bool, err error) {
	return s.RefusesNode("test", name, serial, begins)
}

// AtWork counts the connections for calls that have one under way.
func (s *Server) AtWork() int { return s.desk.AtWork() }

// What tests measure bounds against.
const (
	GuestsEach    = admission.AnonymousEach
	OperatorEach  = admission.OperatorEach
	GreetingsEach = greetingsEach
)

// TroublesOf reads a status report's roads.
var TroublesOf = troublesOf

// RetiredLeaf tells whether a certificate of a node is of a CA that was retired.
func RetiredLeaf(s book.State, leaf *x509.Certificate) error { return s.RefusesRetired("test", leaf) }

// HandBundle is what a stranger gets who asks for the signed bundle.
func HandBundle(ctx context.Context, s *Server, m *boundaryv1.BundleRequest) (*boundaryv1.BundleResponse, error) {
	res, err := bootstrap{Server: s}.Bundle(ctx, connect.NewRequest(m))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

// Newest is the bundle that goes with a certificate.
func Newest(ctx context.Context, s *Server) ([][]byte, uint64, error) {
	return s.authority.NewestBundle(ctx)
}

// LogPublic is the key of the vendor's log, PEM.
func LogPublic(s *Server) []byte { return s.authority.LogPublicKey() }

// OpenCredentials reads the credentials of a node with one key-encryption key.
func OpenCredentials(b []byte, trustDomain string, key []byte) error {
	k, err := authority.NewKEK(key)
	if err != nil {
		return err
	}
	_, err = authority.OpenCredentials(b, trustDomain, []authority.KEK{k})
	return err
}

// ReportOf reads a report from the wire.
var ReportOf = reportOf

// SetMembers replaces the nodes of the configuration file.
func (s *Server) SetMembers(all []book.Member) { s.replica.First = all }
