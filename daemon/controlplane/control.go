// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"encoding/hex"
	"slices"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/api/channel"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
)

// Status tells what this node knows of the cluster and of the audit log.
func (s *Server) Status(ctx context.Context, _ *connect.Request[controlv1.StatusRequest]) (*connect.Response[controlv1.StatusResponse], error) {
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	log := s.replica.Log()
	root := log.Root()
	out := &controlv1.StatusResponse{Node: s.replica.Node, Leader: s.replica.Leader(), TrustDomain: s.replica.View().TrustDomain, Development: s.replica.View().Development,
		AuditSize: log.Size(), AuditRoot: hex.EncodeToString(root[:]), Epoch: epochStatus(s.replica.View())}
	for _, m := range s.replica.Roster() {
		out.Members = append(out.Members, &controlv1.Member{Name: m.Name, RaftAddress: m.Raft, ApiAddress: m.API})
	}
	return connect.NewResponse(out), nil
}

// RegisterCustomer adds a customer.
func (s *Server) RegisterCustomer(ctx context.Context, req *connect.Request[controlv1.RegisterCustomerRequest]) (*connect.Response[controlv1.RegisterCustomerResponse], error) {
	m := req.Msg
	_, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), book.RegisterCustomer{Name: fleet.CustomerID(m.GetName())})
	return connect.NewResponse(&controlv1.RegisterCustomerResponse{}), err
}

// RegisterAppliance adds an appliance and the platform identity that it must prove.
func (s *Server) RegisterAppliance(ctx context.Context, req *connect.Request[controlv1.RegisterApplianceRequest]) (*connect.Response[controlv1.RegisterApplianceResponse], error) {
	m := req.Msg
	if err := s.checkExpect(m.GetExpect()); err != nil {
		return nil, err
	}
	_, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()),
		book.RegisterAppliance{Name: fleet.ApplianceID(m.GetName()), Customer: fleet.CustomerID(m.GetCustomer()), Expect: m.GetExpect()})
	return connect.NewResponse(&controlv1.RegisterApplianceResponse{}), err
}

// ListAppliances tells what the vendor may know of each appliance.
func (s *Server) ListAppliances(ctx context.Context, req *connect.Request[controlv1.ListAppliancesRequest]) (*connect.Response[controlv1.ListAppliancesResponse], error) {
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	out := &controlv1.ListAppliancesResponse{}
	page := s.replica.View()
	for _, a := range page.Appliances() {
		if c := req.Msg.GetCustomer(); c == "" || c == string(a.Customer) {
			out.Appliances = append(out.Appliances, applianceToWire(a, s.here(page, a)))
		}
	}
	return connect.NewResponse(out), nil
}

func applianceToWire(a book.Appliance, online bool) *controlv1.Appliance {
	out := &controlv1.Appliance{Name: string(a.Name), Customer: string(a.Customer), Status: a.Status, Online: online, Node: a.Node,
		Route: a.Route, Serial: string(a.Current), Release: string(a.Release), Version: a.Version, State: string(a.State), Reason: a.Reason, Why: whyToWire(a.Why),
		Posture: string(a.Health.Posture), Orders: a.OrdersSent(), OrdersDone: a.OrdersDone, ReportsDone: a.ReportsDone, LogKey: a.LogKey, Platform: book.PlatformOf(a.Expect)}
	if !a.CurrentTill.IsZero() {
		out.ExpiresUnix = a.CurrentTill.Unix()
	}
	for _, h := range a.Health.Services {
		out.Services = append(out.Services, &controlv1.Service{Name: h.Name, Healthy: h.Healthy, Restarts: h.Restarts, Why: whyToWire(h.Why)})
	}
	for _, t := range a.Roads {
		out.Roads = append(out.Roads, &controlv1.RoadTrouble{Kind: t.Kind, Reason: string(t.Reason)})
	}
	for _, p := range a.Health.Secrets {
		out.Secrets = append(out.Secrets, &controlv1.Secret{Name: p.Name, Present: p.Present})
	}
	if o := a.Health.Offer; o.Release != "" {
		out.Offer = &controlv1.OfferWaits{Release: string(o.Release), Why: whyToWire(o.Why)}
	}
	return out
}

func whyToWire(r fleet.Reason) *controlv1.Reason {
	if r.Kind == "" {
		return nil
	}
	return &controlv1.Reason{Kind: string(r.Kind), Service: r.Service, Secret: r.Secret, Number: r.Number, Runs: string(r.Runs)}
}

// BanAppliance makes every certificate of an appliance worthless and closes its channel.
func (s *Server) BanAppliance(ctx context.Context, req *connect.Request[controlv1.BanApplianceRequest]) (*connect.Response[controlv1.BanApplianceResponse], error) {
	m := req.Msg
	if len(m.GetReason()) > channel.MaxSentence {
		return nil, fault.New("controlplane.Ban", fault.Invalid, "the reason has more than %d bytes", channel.MaxSentence)
	}
	_, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), book.Ban{Name: fleet.ApplianceID(m.GetName()), Reason: m.GetReason()})
	return connect.NewResponse(&controlv1.BanApplianceResponse{}), err
}

// PublishRelease puts a signed release into the book and offers it, once a majority of the voters has its artifacts on disk. Who may
// sign releases is pinned at each appliance.
func (s *Server) PublishRelease(ctx context.Context, req *connect.Request[controlv1.PublishReleaseRequest]) (*connect.Response[controlv1.PublishReleaseResponse], error) {
	const op = "controlplane.PublishRelease"
	m := req.Msg
	rel, err := seal.Peek[manifest.Release](m.GetRelease())
	if err != nil {
		return nil, err
	}
	if len(rel.Artifacts) > channel.MaxServices {
		return nil, fault.New(op, fault.Invalid, "the release has %d artifacts, and %d is the most", len(rel.Artifacts), channel.MaxServices)
	}
	if len(rel.Artifacts) > 0 {
		if s.depot.store == nil {
			return nil, fault.New(op, fault.Unavailable, "this node keeps no artifacts")
		}
		if err := s.depot.replicateAll(ctx, rel); err != nil {
			return nil, err
		}
	}
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	c := book.Publish{Digest: fleet.DigestOf(m.GetRelease()), App: rel.App, Version: rel.Version, Sealed: m.GetRelease()}
	out := &controlv1.PublishReleaseResponse{Digest: string(c.Digest)}
	for _, a := range s.replica.View().Appliances() {
		if named := slices.Contains(m.GetAppliances(), string(a.Name)); named || (len(m.GetAppliances()) == 0 && a.Status != book.Banned) {
			c.To = append(c.To, a.Name)
			out.Appliances = append(out.Appliances, string(a.Name))
		}
	}
	if want := len(m.GetAppliances()); want > 0 && len(c.To) != want {
		return nil, fault.New(op, fault.NotFound, "of the %d appliances named, %d are registered", want, len(c.To))
	}
	_, err = book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()), c)
	return connect.NewResponse(out), err
}

// Probe sends numbered messages to an appliance, which echoes each.
func (s *Server) Probe(ctx context.Context, req *connect.Request[controlv1.ProbeRequest]) (*connect.Response[controlv1.ProbeResponse], error) {
	m := req.Msg
	_, err := book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()),
		book.Ask{To: fleet.ApplianceID(m.GetAppliance()), ID: m.GetId(), First: m.GetFirst(), Count: m.GetCount()})
	return connect.NewResponse(&controlv1.ProbeResponse{}), err
}

// GetProbe counts the echoes.
func (s *Server) GetProbe(ctx context.Context, req *connect.Request[controlv1.GetProbeRequest]) (*connect.Response[controlv1.GetProbeResponse], error) {
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	a, err := s.replica.View().Appliance(fleet.ApplianceID(req.Msg.GetAppliance()))
	if err != nil {
		return nil, err
	}
	if a.Probe.ID != req.Msg.GetId() {
		return nil, fault.New("controlplane.GetProbe", fault.NotFound, "no probe %q: the newest is kept, and it is %q", fault.Clip(req.Msg.GetId()), a.Probe.ID)
	}
	return connect.NewResponse(&controlv1.GetProbeResponse{Sent: a.Probe.Sent, Echoed: a.Probe.Echoed, Doubled: a.Probe.Doubled, OutOfOrder: a.Probe.OutOfOrder}), nil
}

// RequestOperation hands a sealed request on to an appliance, unchanged.
func (s *Server) RequestOperation(ctx context.Context, req *connect.Request[controlv1.RequestOperationRequest]) (*connect.Response[controlv1.RequestOperationResponse], error) {
	const op = "controlplane.RequestOperation"
	m := req.Msg
	r, err := seal.Peek[operation.Request](m.GetRequest())
	if err != nil {
		return nil, err
	}
	if string(r.Appliance) != m.GetAppliance() {
		return nil, fault.New(op, fault.Invalid, "the request is signed for appliance %q and sent to %q", r.Appliance, fault.Clip(m.GetAppliance()))
	}
	if who := api.From(ctx).Principal; r.Operator != who {
		return nil, fault.New(op, fault.Denied, "the request names %q, and you are %q: everybody asks in their own name", fault.Clip(string(r.Operator)), who)
	}
	_, err = book.Submit(ctx, s.replica, api.From(ctx).Principal, fleet.RequestID(m.GetRequestId()),
		book.RequestOperation{ID: r.ID, To: fleet.ApplianceID(m.GetAppliance()), Sealed: m.GetRequest()})
	return connect.NewResponse(&controlv1.RequestOperationResponse{Id: r.ID}), err
}

// ListOperations tells what became of operations; output only where the customer released it, and encrypted.
func (s *Server) ListOperations(ctx context.Context, req *connect.Request[controlv1.ListOperationsRequest]) (*connect.Response[controlv1.ListOperationsResponse], error) {
	if err := s.replica.Read(ctx); err != nil {
		return nil, err
	}
	page := s.replica.View()
	if _, err := page.Appliance(fleet.ApplianceID(req.Msg.GetAppliance())); err != nil {
		return nil, err
	}
	out := &controlv1.ListOperationsResponse{}
	for _, o := range page.Operations(fleet.ApplianceID(req.Msg.GetAppliance())) {
		if id := req.Msg.GetId(); id == "" || id == o.ID {
			out.Operations = append(out.Operations, &controlv1.Operation{Id: o.ID, Appliance: string(o.Appliance), State: o.State, Why: whyToWire(o.Why),
				Request: o.Request, Statements: o.Statements, Output: o.Output})
		}
	}
	return connect.NewResponse(out), nil
}

// epochStatus is what an operator is told of the present epoch; nil in the first epoch.
func epochStatus(s book.State) *controlv1.Epoch {
	e := s.Epoch()
	if e.Epoch == (fleet.Epoch{}) {
		return nil
	}
	out := &controlv1.Epoch{Number: e.Number, Id: e.ID, Cause: e.Cause, BegunUnix: e.Begun.Unix(), LogKept: e.Size}
	out.Unmet = s.Unmet()
	return out
}
