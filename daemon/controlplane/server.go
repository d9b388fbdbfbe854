// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/time/rate"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/evidence"
	"github.com/demarc-dev/demarc/daemon/controlplane/platform"
	"github.com/demarc-dev/demarc/daemon/controlplane/refusal"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/telemetry"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// Options is what a server is made of.
type Options struct {
	Name      string // of this node
	Book      *ledger.Book[book.State]
	Consensus book.Consensus
	Artifacts *artifact.Store // nil: this node keeps none
	KEK       []byte          // 32 bytes; opens the CA keys. See [Server.TendKeys] for another one
	LeafLife  time.Duration
	Backdate  time.Duration                                                     // of leaves, from their issue; zero means [identity.DefaultBackdate]
	Platforms *platform.Verifier                                                // asks AWS, Google and listed issuers; nil: pinned keys are all that is known
	Login     *Login                                                            // nil: operators come by invitation only
	Members   []book.Member                                                     // of the file: where the first nodes serve
	Cluster   Membership                                                        // who is a member; nil: Members are all there are
	Build     string                                                            // of this process
	Dial      func(ctx context.Context, network, addr string) (net.Conn, error) // to another node's API, for [Server.CatchUp]; nil: TCP
	Now       func() time.Time
	Clocks    Clocks // of the voters; nil: the book's time is never set back
	// Snapshot makes sure that what this node starts from has the entries of its log up to an index; nil: it starts from nothing.
	Snapshot func(ctx context.Context, index uint64) error
	Log      *slog.Logger
	// StrangerWait is how long a call of the bootstrap service may take, its body and its answer included; zero means 15 s.
	StrangerWait time.Duration
	// Beat is how often an appliance speaks at least, for tests; it keeps to an hour where it is told more. Zero means
	// that the size of the fleet decides.
	Beat time.Duration
	// WriteWait is how long an appliance may take to read one message of its channel; zero means 10 s.
	WriteWait time.Duration
	// CallsIdle is how long a connection for calls has had none before it may give way to another one of the same member; zero
	// means 10 s.
	CallsIdle time.Duration
	Meter     admission.Meter
	Unlogged  telemetry.Counter // refused calls that are neither in the log nor on record: there were too many; nil counts none
}

// Server answers appliances and operators. Its methods may be called concurrently.
type Server struct {
	Options
	replica   *book.Replica
	log       *slog.Logger
	authority *authority.Store
	keys      *authority.Service
	evidence  *evidence.Exchange
	logins    *rate.Limiter
	refusals  *refusal.Recorder
	channels  channels
	depot     *depot
	quotas    *quotas
	patience  *patience
	leaving   atomic.Bool // the book knows that this node stops
	desk      *admission.Desk
	seeing    sync.Map // operators whose call is being put on record; see saw
	sessions  sessions

	controlv1connect.UnimplementedOperatorServiceHandler
	boundaryv1connect.UnimplementedBoundaryHandler
}

// maxStranger bounds a message of a stranger, in bytes.
const maxStranger = 32 << 10

// anonymousWait is how long a call of the bootstrap services may take, unless the options say another.
const anonymousWait = 15 * time.Second

// NewServer makes a server.
func NewServer(o Options) (*Server, error) {
	if o.StrangerWait <= 0 {
		o.StrangerWait = anonymousWait
	}
	if o.WriteWait <= 0 {
		o.WriteWait = writeWait
	}
	if o.Backdate <= 0 {
		o.Backdate = identity.DefaultBackdate
	}
	s := &Server{Options: o, replica: &book.Replica{Node: o.Name, Book: o.Book, Consensus: o.Consensus, Clock: o.Now, First: o.Members}, log: o.Log,
		logins:   rate.NewLimiter(loginRate, loginBurst),
		channels: channels{open: map[fleet.ApplianceID]*live{}, greeted: map[fleet.ApplianceID][]*tls.Conn{}}, patience: newPatience(), sessions: newSessions()}
	if o.Cluster != nil {
		s.replica.IDs = o.Cluster.IDs
	}
	s.refusals = refusal.NewRecorder(s.replica, s.log, o.Unlogged)
	s.depot, s.quotas = newDepot(s, o.Artifacts), newQuotas(o.LeafLife)
	var err error
	if s.authority, err = authority.NewStore(authority.Config{Replica: s.replica, KEK: o.KEK, LeafLife: o.LeafLife, Backdate: o.Backdate, Dial: o.Dial, Snapshot: o.Snapshot, Log: o.Log}); err != nil {
		return nil, err
	}
	s.keys = authority.NewService(s.authority)
	s.evidence = evidence.NewExchange(s.replica, s.authority, s.refusals, s.channels.names, s.log)
	s.desk = admission.NewDesk(admission.Config{Calls: s.Handler(), CallsIdle: o.CallsIdle, Meter: o.Meter, Opened: s.sessions.watch,
		Channel: func(life context.Context, c *tls.Conn) admission.Session {
			if l := s.greet(life, c); l != nil {
				return l
			}
			return nil
		},
		Verified: func(state tls.ConnectionState) error { return s.replica.View().RefusesConnection(state) }})
	return s, nil
}

// Admit is the door's question in each handshake: may this certificate come in now.
func (s *Server) Admit(p fleet.Principal, serial fleet.Serial) error {
	td, role, id, ok := p.Split()
	page := s.replica.View()
	if !ok || td != page.TrustDomain {
		return fault.New("controlplane.Admit", fault.Denied, "%s is not of this trust domain", fault.Clip(string(p)))
	}
	if role == fleet.Node {
		return s.admitNode(id, serial)
	}
	if role == fleet.Operator {
		return s.admitOperator(p, serial)
	}
	if role != fleet.Appliance {
		return nil
	}
	a, err := page.Appliance(fleet.ApplianceID(id))
	if err == nil {
		err = a.Accepts(serial)
	}
	if err == nil || a.Status == book.Banned { // a ban is for good: no later page takes it back
		return err
	}
	// The certificate is genuine, and this node may be behind the one that issued it: it catches up before it says no.
	ctx, cancel := context.WithTimeout(context.Background(), admitWait)
	defer cancel()
	if s.desk.Yield(func() error { return s.replica.Read(ctx) }) != nil {
		return err
	}
	if a, err = s.replica.View().Appliance(fleet.ApplianceID(id)); err != nil {
		return err
	}
	return a.Accepts(serial)
}

// admitWait is how long a handshake waits for this node to catch up.
const admitWait = 2 * time.Second

// Handler serves all procedures of this role behind the table. It must be served with TLS by [identity.Server].
func (s *Server) Handler() http.Handler {
	packed := connect.WithCompressMinBytes(1 << 10) // to compress a short answer costs more than the change that it answers
	opts := []connect.HandlerOption{connect.WithInterceptors(api.Guard(s.refusals.Call)), connect.WithReadMaxBytes(8 << 20), packed}
	small := []connect.HandlerOption{connect.WithInterceptors(api.Guard(s.refusals.Call)), connect.WithReadMaxBytes(maxStranger), packed}
	mux := http.NewServeMux()
	mux.Handle(boundaryv1connect.NewBootstrapHandler(bootstrap{Server: s}, small...))
	mux.Handle(boundaryv1connect.NewBoundaryHandler(s, opts...))
	mux.Handle(controlv1connect.NewControlHandler(controlHandler{s, s.keys, s.evidence}, opts...))
	mux.Handle(controlv1connect.NewReplicasHandler(replicas{Server: s}, small...))
	mux.Handle(controlv1connect.NewClusterHandler(cluster{Server: s}, opts...))
	mux.Handle(controlv1connect.NewOperatorServiceHandler(s, opts...))
	mux.Handle(controlv1connect.NewKeyServiceHandler(s.keys, opts...))
	mux.Handle(controlv1connect.NewOperatorBootstrapHandler(operatorBootstrap{Server: s}, small...))
	mux.Handle(controlv1connect.NewIssuerKeysHandler(keys{Server: s}, small...))
	errors := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who := api.Who{Class: api.Stranger}
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			p, serial, err := identity.PrincipalOf(r.TLS)
			if err != nil {
				http.Error(w, fault.Text(err), http.StatusForbidden)
				return
			}
			who = api.Who{Class: api.ClassOf(p), Principal: p, Serial: serial, Issuer: identity.IssuerOf(r.TLS)}
			if err := barred(s.replica.View(), who); err != nil {
				s.refusals.Named(r.Context(), who.Principal, book.Refuse{What: r.URL.Path, Name: fault.Clip(string(who.Principal)), Fault: fault.Of(err), Reason: fault.Text(err)})
				_ = errors.Write(w, r, api.ToWire(err))
				return
			}
			if who.Class == api.Operator {
				if who.Rank, err = s.rank(r.Context(), who, r.TLS.VerifiedChains[0][0].NotAfter); err != nil {
					_ = errors.Write(w, r, api.ToWire(err))
					return
				}
				s.saw(r.Context(), who, r.Header.Get(api.BundleHeader))
				w = &tellsBundle{ResponseWriter: w, s: s}
			}
		}
		if bootstraps(r.URL.Path) {
			if err := s.bound(http.NewResponseController(w)); err != nil {
				http.Error(w, fault.Text(err), http.StatusInternalServerError)
				return
			}
			if r.ContentLength > maxStranger {
				_ = errors.Write(w, r, api.ToWire(s.tooLong(r)))
				return
			}
			r.Body = http.MaxBytesReader(w, r.Body, maxStranger) // Connect would read on, and throw away, for as long as bytes come
		}
		mux.ServeHTTP(w, r.WithContext(api.With(r.Context(), who)))
	})
}

// tellsBundle tells an operator, with the answer, which bundle is the newest: the one after the call, which may have changed it.
type tellsBundle struct {
	http.ResponseWriter
	s    *Server
	told bool
}

func (w *tellsBundle) tell() {
	if !w.told {
		w.told = true
		w.Header().Set(api.BundleHeader, strconv.FormatUint(w.s.replica.View().Bundle(), 10))
	}
}

// WriteHeader implements [http.ResponseWriter].
func (w *tellsBundle) WriteHeader(code int) {
	w.tell()
	w.ResponseWriter.WriteHeader(code)
}

// Write implements [http.ResponseWriter].
func (w *tellsBundle) Write(b []byte) (int, error) {
	w.tell()
	return w.ResponseWriter.Write(b)
}

// Flush implements [http.Flusher].
func (w *tellsBundle) Flush() {
	w.tell()
	_ = http.NewResponseController(w.ResponseWriter).Flush() // what can't be flushed is written all the same
}

// Unwrap gives the writer beneath to [http.ResponseController].
func (w *tellsBundle) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// barred refuses whoever shows a certificate of a CA that was retired, and an appliance that was banned, after the connection for calls
// came in: such a connection is asked at each call, and each piece of an artifact. An appliance's certificate that another has replaced
// still makes calls on the connection that it opened.
func barred(s book.State, who api.Who) error {
	if err := s.RefusesIssuer("controlplane.call", who.Issuer); err != nil || who.Class != api.Appliance {
		return err
	}
	_, _, id, _ := who.Principal.Split()
	a, err := s.Appliance(fleet.ApplianceID(id))
	if err == nil && a.Status == book.Banned {
		err = a.Accepts(who.Serial)
	}
	return err
}

// bootstraps tells of a procedure that a stranger may call.
func bootstraps(path string) bool {
	return strings.HasPrefix(path, "/"+boundaryv1connect.BootstrapName+"/") || strings.HasPrefix(path, "/"+controlv1connect.OperatorBootstrapName+"/")
}

// bound ends a call of a bootstrap service that a stranger draws out.
func (s *Server) bound(rc *http.ResponseController) error {
	till := time.Now().Add(s.StrangerWait)
	if err := rc.SetReadDeadline(till); err != nil {
		return fault.At("controlplane.Bootstrap", fault.Internal, err)
	}
	return fault.At("controlplane.Bootstrap", fault.Internal, rc.SetWriteDeadline(till))
}

// tooLong puts on record that a stranger announced more than is taken, as often as strangers may be heard.
func (s *Server) tooLong(r *http.Request) error {
	err := fault.New("controlplane.Bootstrap", fault.Invalid, "the message has %d bytes, at most %d are taken from a stranger", r.ContentLength, maxStranger)
	if s.refusals.Heard(r.RemoteAddr) {
		s.refusals.AnonymousCall(r.Context(), r.URL.Path, "", err)
	}
	return err
}

// controlHandler answers the control service: each method is of the room that the question belongs to.
type controlHandler struct {
	*Server
	*authority.Service
	*evidence.Exchange
}

// Authority is the sealed keys of this node.
func (s *Server) Authority() *authority.Store { return s.authority }

// Keys answers what operators ask about authorities, keys and secrets.
func (s *Server) Keys() *authority.Service { return s.keys }

// Listener makes the part that serves ln with conf of [identity.Server] and [admission.Protocols]. The part closes ln.
func (s *Server) Listener(name string, ln net.Listener, conf *tls.Config, log *slog.Logger) *admission.Listener {
	return s.desk.Listener(name, ln, conf, log)
}

// Evidence countersigns the customers' logs, and has the vendor's countersigned.
func (s *Server) Evidence() *evidence.Exchange { return s.evidence }
