// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"encoding/hex"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/daemon/appliance/credentials"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ingress"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// local is what the customer says to the customer's own appliance.
type local struct{ *Appliance }

// Local is the service of the socket.
func (a *Appliance) Local() localv1connect.LocalHandler { return local{a} }

// Handler serves the owner of the Unix socket.
func (a *Appliance) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(localv1connect.NewLocalHandler(local{a}, connect.WithInterceptors(api.Guard(nil)), connect.WithReadMaxBytes(8<<20)))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mux.ServeHTTP(w, r.WithContext(api.With(r.Context(), api.Who{Class: api.Owner, Principal: fleet.Local})))
	})
}

// Status tells everything: it is the customer's own.
func (l local) Status(context.Context, *connect.Request[localv1.StatusRequest]) (*connect.Response[localv1.StatusResponse], error) {
	st, log := l.book.Both()
	root := log.Root()
	out := &localv1.StatusResponse{Appliance: string(st.Appliance), Customer: string(st.Customer), TrustDomain: st.Site.TrustDomain,
		Route: l.sw.Current(),
		State: string(st.Deploy.State), Reason: st.Deploy.Reason, Release: string(st.Deploy.Release), Version: st.Deploy.Version,
		AuditSize: log.Size(), AuditRoot: hex.EncodeToString(root[:]), ProbesSeen: st.ProbesSeen, VendorEpoch: epochStatus(st)}
	if err := l.book.Failed(); err != nil {
		out.BookFailed, out.BookFailedUnix = fault.Text(err), l.book.FailedSince().Unix()
	}
	if k := l.link.Load(); k != nil {
		out.Connected, out.Node = true, k.node
	}
	for _, t := range l.cfg.Transports {
		out.Routes = append(out.Routes, t.Name)
		out.Ways = append(out.Ways, transportStatus(t.Name, t.Kind, t.Name == out.Route, l.transportErr(t.Name)))
	}
	if l.private != nil {
		out.Door = transportStatus("ingress", configs.Tailscale, l.private.Joined() != nil, l.private.Err())
	}
	out.BookTime = l.bookTime()
	if apart := l.creds.ClockOffset(); apart != nil {
		out.Clock = &localv1.Clock{VendorAheadMs: apart.Milliseconds(), TrustedMs: credentials.ClockTolerance.Milliseconds()}
	}
	if leaf, _ := l.creds.Leaf(); leaf != nil {
		out.ExpiresUnix = leaf.Leaf.NotAfter.Unix()
	}
	for _, s := range l.run.Status().Services {
		out.Services = append(out.Services, &localv1.Service{Name: s.Name, Healthy: s.Healthy, Restarts: uint32(s.Restarts), Pid: int32(s.PID),
			Reason: s.Reason, Kind: string(s.Why.Kind), Number: s.Why.Number, SinceUnix: unix(s.Since)})
	}
	out.Waits, out.Endings = waitsFor(st, l.book.Now()), endings(st, l.book.Now())
	for _, p := range st.Pinned {
		out.Pinned = append(out.Pinned, string(p.ID))
	}
	if d := st.CurrentRelease(); d != "" {
		plan, _, _, err := l.plans.Plan(st, d)
		if err != nil {
			return nil, err
		}
		for _, s := range plan.Secrets {
			x := &localv1.Secret{Name: s.Name, CreateWith: l.createWith(s)}
			if x.Present, err = l.secret.Present(s.Store); err != nil { // all else is told
				x.Problem = fault.Text(err)
			}
			out.Secrets = append(out.Secrets, x)
		}
	}
	return connect.NewResponse(out), nil
}

// bookTime tells the customer the time by which the book judges.
func (l local) bookTime() *localv1.BookTime {
	w := &localv1.BookTime{AtUnix: l.book.Now().Unix()}
	if lead, why := l.book.Lead(); lead > 0 {
		w.AheadMs, w.Said = lead.Milliseconds(), why
	}
	return w
}

// Pin pins a key. It refuses one whose private half it can read: such a key proves nothing about the customer.
func (l local) Pin(ctx context.Context, req *connect.Request[localv1.PinRequest]) (*connect.Response[localv1.PinResponse], error) {
	m := req.Msg
	if len(m.GetPublicKey()) > 16<<10 || len(m.GetEndorsement()) > seal.MaxSealed || len(m.GetRecipient()) > 256 {
		return nil, fault.New("appliance.Pin", fault.Invalid, "the key is larger than any key")
	}
	if at := l.readableKey(); at != "" {
		return nil, fault.New("appliance.Pin", fault.Denied,
			"a private key lies readable in %s: keep it on a workstation, encrypted (demarc key create), and never on the appliance", at)
	}
	id, err := book.SubmitAs(ctx, l.book, fleet.RequestID(m.GetRequestId()),
		book.Pin{Public: m.GetPublicKey(), Recipient: m.GetRecipient(), Endorsement: m.GetEndorsement()})
	return connect.NewResponse(&localv1.PinResponse{KeyId: string(id)}), err
}

// readableKey looks for an unencrypted private key that is not the appliance's own, where the customer may have dropped
// one: in the appliance's directory and beside its socket.
func (l local) readableKey() string {
	own := map[string]bool{filepath.Join(l.cfg.Dir, "signing.key"): true, filepath.Join(l.cfg.Dir, "wallet.json"): true}
	for _, dir := range []string{l.cfg.Dir, filepath.Dir(l.cfg.Socket)} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			info, err := e.Info()
			if err != nil || !info.Mode().IsRegular() || own[path] || info.Size() > 64<<10 {
				continue
			}
			if b, err := os.ReadFile(path); err == nil && seal.LooksReadable(b) {
				return path
			}
		}
	}
	return ""
}

// Submit takes one document of the customer. After a revocation it answers once the processes that may not continue are gone.
func (l local) Submit(ctx context.Context, req *connect.Request[localv1.SubmitRequest]) (*connect.Response[localv1.SubmitResponse], error) {
	began := time.Now()
	m := req.Msg
	done, err := book.SubmitAs(ctx, l.book, fleet.RequestID(m.GetRequestId()), book.Consent{Document: m.GetDocument(), Output: m.GetOutput()})
	if err != nil {
		return nil, err
	}
	l.running.kill(done.Stopped)
	out := &localv1.SubmitResponse{Kind: done.What, Id: done.ID, TookMicros: time.Since(began).Microseconds()}
	if done.What == "revocation" || done.What == "deny" || done.What == "cancel" {
		out.Receipt, err = seal.Seal(operation.Receipt{
			Appliance: l.book.View().Appliance, Document: fleet.DigestOf(m.GetDocument()), At: l.now().UTC(), TookMicros: out.TookMicros,
			Stopped: done.Stopped,
		}, l.signer)
	}
	return connect.NewResponse(out), err
}

// Review compiles what would run, and how it differs from what runs.
func (l local) Review(_ context.Context, req *connect.Request[localv1.ReviewRequest]) (*connect.Response[localv1.ReviewResponse], error) {
	st := l.book.View()
	plan, _, o, err := l.plans.Plan(st, fleet.Digest(req.Msg.GetRelease()))
	if err != nil {
		return nil, err
	}
	var old manifest.Plan
	if st.Good.Release != "" {
		if old, _, _, err = l.plans.Plan(st, st.Good.Release); err != nil {
			return nil, err
		}
	}
	var phases []string
	for _, p := range st.DeployPhases() {
		phases = append(phases, string(p))
	}
	return connect.NewResponse(&localv1.ReviewResponse{Release: string(o.Digest), Version: o.Version, PlanDigest: string(plan.Digest()),
		Plan: plan.JSON(),
		Diff: manifest.Diff(old, plan), Phase: strings.Join(phases, ",")}), nil
}

// Access tells what the vendor can do right now, why, and until when.
func (l local) Access(_ context.Context, req *connect.Request[localv1.AccessRequest]) (*connect.Response[localv1.AccessResponse], error) {
	st := l.book.View()
	want := fleet.Phase(req.Msg.GetPhase())
	if want != "" {
		if err := want.Check(); err != nil {
			return nil, err
		}
	}
	out := &localv1.AccessResponse{BookTime: l.bookTime()}
	for _, d := range st.Grants.Access(st.Appliance, l.book.Now()) {
		if want != "" && d.Phase != want {
			continue
		}
		x := &localv1.Access{Phase: string(d.Phase), Allowed: d.Allow, Why: d.Why, By: d.By}
		if d.Allow {
			x.UntilUnix, x.UsesLeft = unix(d.Until), int64(d.UsesLeft)
		}
		for _, r := range d.Reach {
			x.Reach = append(x.Reach, &localv1.Reach{Operations: r.Scope.Operations, Services: r.Scope.Services, FromUnix: unix(r.From),
				UntilUnix: unix(r.Until), UsesLeft: int64(r.UsesLeft), Grants: r.Grants})
		}
		out.Access = append(out.Access, x)
	}
	return connect.NewResponse(out), nil
}

// unix spells a time, 0 for none.
func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// SetPosture opens and shuts doors.
func (l local) SetPosture(ctx context.Context,
	req *connect.Request[localv1.SetPostureRequest]) (*connect.Response[localv1.SetPostureResponse], error) {
	p := fleet.Posture{Exposure: fleet.Exposure(req.Msg.GetExposure())}
	for _, s := range req.Msg.GetAllow() {
		if len(p.Allow) >= 256 {
			return nil, fault.New("appliance.SetPosture", fault.Invalid, "at most 256 networks")
		}
		n, err := netip.ParsePrefix(s)
		if err != nil {
			ip, ipErr := netip.ParseAddr(s)
			if ipErr != nil {
				return nil, fault.New("appliance.SetPosture", fault.Invalid, "%.64q is neither a network nor an address", s)
			}
			n = netip.PrefixFrom(ip, ip.BitLen())
		}
		p.Allow = append(p.Allow, n)
	}
	return connect.NewResponse(&localv1.SetPostureResponse{}), l.setPosture(ctx, fleet.RequestID(req.Msg.GetRequestId()), p)
}

// GetPosture tells which doors stand open, and why the others are shut.
func (l local) GetPosture(context.Context, *connect.Request[localv1.GetPostureRequest]) (*connect.Response[localv1.GetPostureResponse],
	error) {
	p := l.book.View().Posture
	out := &localv1.GetPostureResponse{Exposure: string(p.Exposure)}
	for _, n := range p.Allow {
		out.Allow = append(out.Allow, n.String())
	}
	plan := l.gate.Plan()
	standing := l.gate.Doors()
	for _, d := range plan.Doors {
		x := &localv1.Door{Name: d.Name, Side: string(d.Side), Address: d.Addr, Tls: d.TLS, To: d.To}
		for _, n := range d.From {
			x.From = append(x.From, n.String())
		}
		if i := slices.IndexFunc(standing, func(s ingress.Standing) bool { return s.Name == d.Name && s.Addr != nil }); i >= 0 {
			x.Address = standing[i].Addr.String()
		}
		out.Doors = append(out.Doors, x)
	}
	for _, s := range plan.Shut {
		out.Shut = append(out.Shut, &localv1.Shut{Port: s.Port, Why: s.Why})
	}
	return connect.NewResponse(out), nil
}

// SetTransport moves the channel to another route of the customer's list. The old channel ends when the new one is up.
func (l local) SetTransport(ctx context.Context,
	req *connect.Request[localv1.SetTransportRequest]) (*connect.Response[localv1.SetTransportResponse], error) {
	name := req.Msg.GetKind()
	if err := l.sw.Use(ctx, name); err != nil {
		return nil, err
	}
	_, err := book.SubmitAs(ctx, l.book, fleet.RequestID(req.Msg.GetRequestId()), book.UseTransport{Name: name})
	return connect.NewResponse(&localv1.SetTransportResponse{Kind: l.sw.Current()}), err
}

// ListOperations tells what the vendor asked for and what became of it.
func (l local) ListOperations(_ context.Context,
	req *connect.Request[localv1.ListOperationsRequest]) (*connect.Response[localv1.ListOperationsResponse], error) {
	st := l.book.View()
	ops := st.Operations()
	if id := req.Msg.GetId(); id != "" {
		o, err := st.Operation(id)
		if err != nil {
			return nil, err
		}
		ops = []book.Operation{o}
	}
	own, err := seal.KeyOf(l.signer.Public())
	if err != nil {
		return nil, err
	}
	out := &localv1.ListOperationsResponse{LogKey: own.PEM()}
	for _, o := range st.Site.Operators {
		out.OperatorKeys = append(out.OperatorKeys, o.Keys...)
	}
	for _, p := range st.Pinned {
		out.CustomerKeys = append(out.CustomerKeys, p.Public)
	}
	for _, o := range ops {
		x := &localv1.Operation{Id: o.ID, State: string(o.State), Reason: o.Reason, Request: o.Request, Statements: o.Statements(),
			Argv: o.Argv, Tier: string(o.Phase), Service: o.Service}
		if r, err := seal.Peek[operation.Request](o.Request); err == nil {
			if t, err := st.Template(r); err == nil { // gone with its release: then the request alone is shown
				x.Effects, x.About, x.LimitSeconds = declared(t), t.About, int64(t.Limit()/time.Second)
			}
		}
		if req.Msg.GetId() != "" {
			x.Output = o.Output
		}
		out.Operations = append(out.Operations, x)
	}
	return connect.NewResponse(out), nil
}

// declared says what a template may do beyond reading its own files, for the person who approves.
func declared(t operation.Template) []string {
	var out []string
	for _, w := range t.Effects.Writes {
		out = append(out, "writes below "+w)
	}
	if t.Effects.Network {
		out = append(out, "uses the network")
	}
	if t.Effects.Credentials {
		out = append(out, "is given the service's environment and the paths of its secrets")
	}
	return out
}

// ListLog returns a stretch of the customer's log.
func (l local) ListLog(_ context.Context, req *connect.Request[localv1.ListLogRequest]) (*connect.Response[localv1.ListLogResponse],
	error) {
	log := l.book.Log()
	from := min(max(req.Msg.GetFrom(), 0), log.Size())
	n := int64(req.Msg.GetLimit())
	if n <= 0 || n > 1000 {
		n = 1000
	}
	leaves, err := log.Entries(from, min(from+n, log.Size()))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&localv1.ListLogResponse{Entries: leaves, Size: log.Size()}), nil
}
