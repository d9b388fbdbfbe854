// SPDX-License-Identifier: Apache-2.0

// Package management is the platform operator's role: it learns from each control plane that its file names the
// counts and the health of one closed message, and nothing more.
//
// A control plane proves itself with a node certificate of its own trust domain. The operator's file pins the key of its log, and nothing
// else: the CAs of its nodes come as that key signed them (see bundle.go), and a change of CA needs nobody here. The name of a control
// plane is the operator's, never the caller's word. Of reports nothing is stored: after a restart the next one of each control plane fills
// the table again.
package management

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"

	"github.com/demarc-dev/demarc/api"
	managementv1 "github.com/demarc-dev/demarc/api/management/v1"
	"github.com/demarc-dev/demarc/api/management/v1/managementv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// Peer is a control plane that may report.
type Peer struct {
	Name        string
	TrustDomain string
	LogKey      seal.Key // it signs the bundle of CAs by which the nodes are recognised
}

// ReportEvery is how often a control plane reports.
const ReportEvery = 10 * time.Second

// Bounds of a report, in bytes.
const (
	maxWord   = 64 // each string
	maxReport = 4 << 10
)

// Options is what a server is made of.
type Options struct {
	Peers []Peer
	Dir   string // where the bundles are kept
	Now   func() time.Time
	Log   *slog.Logger
}

// Server holds the table. Its methods may be called concurrently.
type Server struct {
	Options
	strangers *rate.Limiter // who hand over bundles

	mu    sync.Mutex
	last  map[string]seen
	held  map[string]bundle // by the peer's name
	pool  *x509.CertPool    // of all of them; another one after each change
	conns map[*watched]struct{}
}

type seen struct {
	report *managementv1.ReportRequest
	at     time.Time
}

// New makes a server that knows the peers, with the bundles that it kept before. Two peers of one trust domain are refused.
func New(o Options) (*Server, error) {
	domains := map[string]bool{}
	for _, p := range o.Peers {
		if domains[p.TrustDomain] {
			return nil, fault.New("management.New", fault.Invalid, "trust domain %q is named twice", p.TrustDomain)
		}
		domains[p.TrustDomain] = true
	}
	s := &Server{Options: o, strangers: rate.NewLimiter(strangerRate, strangerBurst), last: map[string]seen{}, held: map[string]bundle{},
		conns: map[*watched]struct{}{}}
	if err := s.load(); err != nil {
		return nil, err
	}
	return s, nil
}

// Admit takes the nodes of known trust domains. The chain that verifies is compared with the peer's own CAs afterwards, for each
// connection and in each call: one vendor can't speak for another.
func (s *Server) Admit(p fleet.Principal, _ fleet.Serial) error {
	_, err := s.peer(p)
	return err
}

func (s *Server) peer(p fleet.Principal) (Peer, error) {
	td, role, _, ok := p.Split()
	i := slices.IndexFunc(s.Peers, func(x Peer) bool { return x.TrustDomain == td })
	if !ok || role != fleet.Node || i < 0 {
		return Peer{}, fault.New("management.Admit", fault.Denied,
			"the caller is not a node of a control plane that this management plane's file names")
	}
	return s.Peers[i], nil
}

// Handler serves the control planes; it must be served with TLS by [identity.Server].
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(managementv1connect.NewManagementHandler(s, connect.WithInterceptors(api.Guard(nil)),
		connect.WithReadMaxBytes(2*identity.MaxBundle+4<<10)))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, err := s.caller(r.TLS)
		if err != nil {
			http.Error(w, fault.Text(err), http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r.WithContext(api.With(r.Context(), who)))
	})
}

// caller names who calls, and refuses a chain that ends in another vendor's authority, or in one that is not trusted any more.
func (s *Server) caller(state *tls.ConnectionState) (api.Who, error) {
	if state == nil || len(state.VerifiedChains) == 0 {
		return api.Who{Class: api.Stranger}, nil
	}
	p, serial, err := identity.PrincipalOf(state)
	if err != nil {
		return api.Who{}, err
	}
	issuer := identity.IssuerOf(state)
	if err := s.trusts(p, issuer); err != nil {
		return api.Who{}, err
	}
	return api.Who{Class: api.ClassOf(p), Principal: p, Serial: serial, Issuer: issuer}, nil
}

// OwnerHandler serves the operator of the management plane, over a Unix socket.
func (s *Server) OwnerHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(managementv1connect.NewOverviewHandler(s, connect.WithInterceptors(api.Guard(nil)), connect.WithReadMaxBytes(4<<10)))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mux.ServeHTTP(w, r.WithContext(api.With(r.Context(), api.Who{Class: api.Owner, Principal: fleet.Local})))
	})
}

// Report takes the state of one control plane. A field that this build does not know is refused: the message is closed.
func (s *Server) Report(ctx context.Context,
	req *connect.Request[managementv1.ReportRequest]) (*connect.Response[managementv1.ReportResponse], error) {
	const op = "management.Report"
	p, err := s.peer(api.From(ctx).Principal)
	if err != nil {
		return nil, err
	}
	m := req.Msg
	if proto.Size(m) > maxReport {
		return nil, fault.New(op, fault.Invalid, "the report has %d bytes, the limit is %d", proto.Size(m), maxReport)
	}
	if len(m.ProtoReflect().GetUnknown()) > 0 {
		return nil, fault.New(op, fault.Invalid, "the message has fields that this management plane does not take")
	}
	if !slices.Contains([]string{"ok", "degraded", "down"}, m.GetHealth()) {
		return nil, fault.New(op, fault.Invalid, "health is ok, degraded or down")
	}
	for _, w := range []string{m.GetBuild(), m.GetNode()} {
		if len(w) > maxWord || strings.ContainsFunc(w, func(r rune) bool { return r < ' ' || r > '~' }) {
			return nil, fault.New(op, fault.Invalid, "build and node are at most %d plain characters each", maxWord)
		}
	}
	s.mu.Lock()
	s.last[p.Name] = seen{proto.CloneOf(m), s.Now()}
	held := s.held[p.Name].number
	s.mu.Unlock()
	return connect.NewResponse(&managementv1.ReportResponse{NextSeconds: uint32(ReportEvery.Seconds()), BundleHeld: held}), nil
}

// List tells what each control plane said last. One that has not been heard is listed without a report.
func (s *Server) List(context.Context, *connect.Request[managementv1.ListRequest]) (*connect.Response[managementv1.ListResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &managementv1.ListResponse{}
	for _, p := range s.Peers {
		c := &managementv1.ControlPlane{Name: p.Name, Bundle: s.held[p.Name].number}
		if x, ok := s.last[p.Name]; ok {
			c.Last, c.SeenUnix = proto.CloneOf(x.report), x.at.Unix()
		}
		out.ControlPlanes = append(out.ControlPlanes, c)
	}
	return connect.NewResponse(out), nil
}
