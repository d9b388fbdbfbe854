// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/demarc-dev/demarc/api"
	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	managementv1 "github.com/demarc-dev/demarc/api/management/v1"
	"github.com/demarc-dev/demarc/api/management/v1/managementv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

func schemas() []protoreflect.FileDescriptor {
	return []protoreflect.FileDescriptor{boundaryv1.File_boundary_v1_boundary_proto, controlv1.File_control_v1_control_proto,
		controlv1.File_control_v1_cluster_proto, controlv1.File_control_v1_operators_proto, controlv1.File_control_v1_keys_proto,
		controlv1.File_control_v1_reported_proto, controlv1.File_control_v1_artifacts_proto,
		localv1.File_local_v1_local_proto, managementv1.File_management_v1_management_proto}
}

// The table and the schemas name the same procedures: lists kept twice drift.
func TestTableIsTheSchemas(t *testing.T) {
	var want []string
	for _, f := range schemas() {
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				want = append(want, fmt.Sprintf("/%s/%s", s.FullName(), s.Methods().Get(j).Name()))
			}
		}
	}
	slices.Sort(want)
	if got := api.Procedures(); !slices.Equal(got, want) {
		t.Errorf("table = %q\nschemas = %q", got, want)
	}
}

// allowed is written a second time on purpose, by service: a slip in the table must not pass unseen.
var allowed = map[string][]api.Caller{
	"demarc.boundary.v1.Bootstrap":        {api.Stranger, api.Appliance},
	"demarc.boundary.v1.Boundary":         {api.Appliance},
	"demarc.control.v1.Control":           {api.Operator}, // of the rank in least
	"demarc.control.v1.Cluster":           {api.Operator}, // likewise
	"demarc.control.v1.OperatorService":   {api.Operator}, // likewise
	"demarc.control.v1.KeyService":        {api.Operator}, // likewise
	"demarc.control.v1.IssuerKeys":        {api.Operator}, // likewise
	"demarc.control.v1.Replicas":          {api.Node},
	"demarc.control.v1.OperatorBootstrap": {api.Stranger},
	"demarc.local.v1.Local":               {api.Owner},
	"demarc.management.v1.Management":     {api.Node},
	"demarc.management.v1.Overview":       {api.Owner},
}

// least is written a second time on purpose too: the least rank of an operator for each procedure of the control plane.
var least = map[fleet.Rank][]string{
	fleet.Viewer: {"Control/Status", "Control/ListAppliances", "Control/ListAuthorities", "Control/GetProbe", "Control/ListOperations",
		"Control/ExportEvidence",
		"Control/RenewOperator", "OperatorService/ListOperators", "OperatorService/GetDoor", "IssuerKeys/GetExpect"},
	fleet.Deployer: {"Control/UploadArtifact", "Control/ReplicateArtifact", "Control/PublishRelease"},
	fleet.Operate: {"Control/RegisterCustomer", "Control/RegisterAppliance", "Control/BanAppliance", "Control/Probe",
		"Control/RequestOperation"},
	fleet.Admin: {"Control/SetExpect", "Control/PrepareAuthority", "Control/ActivateAuthority", "Control/RetireAuthority",
		"OperatorService/InviteOperator", "OperatorService/SetOperatorRole", "OperatorService/BanOperator", "OperatorService/RemoveOperator",
		"KeyService/GetKeys", "KeyService/RotateKey",
		"KeyService/PutSecret", "KeyService/ListSecrets", "KeyService/ForgetSecret",
		"IssuerKeys/ConfirmKeys", "IssuerKeys/ForgetKeys",
		"Cluster/ListMembers", "Cluster/AddMember", "Cluster/CertifyMember", "Cluster/PromoteMember", "Cluster/DemoteMember",
		"Cluster/RemoveMember", "Cluster/ReplaceMember",
		"Cluster/TransferLeadership", "Cluster/SetAutopilot", "Cluster/SaveSnapshot"},
}

// every is each class of caller, and an operator of each rank and of none.
func every() (out []api.Who) {
	for _, c := range api.Callers() {
		out = append(out, api.Who{Class: c})
	}
	for _, r := range append(fleet.Ranks(), "root") {
		out = append(out, api.Who{Class: api.Operator, Rank: r})
	}
	return append(out, api.Who{Class: "nobody"}, api.Who{Class: api.Appliance, Rank: fleet.Admin},
		api.Who{Class: api.Stranger, Rank: fleet.Admin})
}

// may is what a caller may by the two lists above.
func may(as api.Who, s protoreflect.ServiceDescriptor, m protoreflect.MethodDescriptor) bool {
	switch {
	case m.Name() == "Artifact" && as.Class == api.Node: // from the node that it was uploaded to
		return true
	case m.FullName() == "demarc.management.v1.Management.Bundle": // signed: whose word it is does not rest on who calls
		return as.Class == api.Stranger || as.Class == api.Node || as.Class == "nobody"
	case as.Class == "nobody":
		return slices.Contains(allowed[string(s.FullName())], api.Stranger)
	case !slices.Contains(allowed[string(s.FullName())], as.Class):
		return false
	case as.Class != api.Operator:
		return true
	}
	ranks := fleet.Ranks()
	for i, r := range ranks {
		if slices.Contains(least[r], fmt.Sprintf("%s/%s", s.Name(), m.Name())) {
			return slices.Contains(ranks[i:], as.Rank)
		}
	}
	return false
}

// Every procedure is called as every class of caller and every rank, through a real listener.
func TestEveryProcedureAsEveryCaller(t *testing.T) {
	mux := http.NewServeMux()
	opt := connect.WithInterceptors(api.Guard(nil))
	for _, h := range []func() (string, http.Handler){
		func() (string, http.Handler) {
			return boundaryv1connect.NewBootstrapHandler(boundaryv1connect.UnimplementedBootstrapHandler{}, opt)
		},
		func() (string, http.Handler) {
			return boundaryv1connect.NewBoundaryHandler(boundaryv1connect.UnimplementedBoundaryHandler{}, opt)
		},
		func() (string, http.Handler) {
			return controlv1connect.NewControlHandler(controlv1connect.UnimplementedControlHandler{}, opt)
		},
		func() (string, http.Handler) {
			return controlv1connect.NewClusterHandler(controlv1connect.UnimplementedClusterHandler{}, opt)
		},
		func() (string, http.Handler) {
			return controlv1connect.NewOperatorServiceHandler(controlv1connect.UnimplementedOperatorServiceHandler{}, opt)
		},
		func() (string, http.Handler) {
			return controlv1connect.NewKeyServiceHandler(controlv1connect.UnimplementedKeyServiceHandler{}, opt)
		},
		func() (string, http.Handler) {
			return controlv1connect.NewOperatorBootstrapHandler(controlv1connect.UnimplementedOperatorBootstrapHandler{}, opt)
		},
		func() (string, http.Handler) {
			return controlv1connect.NewIssuerKeysHandler(controlv1connect.UnimplementedIssuerKeysHandler{}, opt)
		},
		func() (string, http.Handler) {
			return controlv1connect.NewReplicasHandler(controlv1connect.UnimplementedReplicasHandler{}, opt)
		},
		func() (string, http.Handler) {
			return localv1connect.NewLocalHandler(localv1connect.UnimplementedLocalHandler{}, opt)
		},
		func() (string, http.Handler) {
			return managementv1connect.NewManagementHandler(managementv1connect.UnimplementedManagementHandler{}, opt)
		},
		func() (string, http.Handler) {
			return managementv1connect.NewOverviewHandler(managementv1connect.UnimplementedOverviewHandler{}, opt)
		},
	} {
		mux.Handle(h())
	}
	for _, as := range every() {
		srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if as.Class != "nobody" { // nobody: the door forgot to say who calls
				r = r.WithContext(api.With(r.Context(), as))
			}
			mux.ServeHTTP(w, r)
		}))
		srv.EnableHTTP2 = true
		srv.StartTLS()
		for _, f := range schemas() {
			for i := range f.Services().Len() {
				s := f.Services().Get(i)
				for j := range s.Methods().Len() {
					m := s.Methods().Get(j)
					want := connect.CodePermissionDenied
					if may(as, s, m) {
						want = connect.CodeUnimplemented
					}
					got := connect.CodeOf(call(t, srv, s, m))
					if got != want {
						t.Errorf("%s as %s %s: %v, want %v", m.FullName(), as.Class, as.Rank, got, want)
					}
				}
			}
		}
		srv.Close()
	}
}

func call(t *testing.T, srv *httptest.Server, s protoreflect.ServiceDescriptor, m protoreflect.MethodDescriptor) error {
	t.Helper()
	type empty = boundaryv1.ChallengeRequest
	c := connect.NewClient[empty, empty](srv.Client(), fmt.Sprintf("%s/%s/%s", srv.URL, s.FullName(), m.Name()))
	if !m.IsStreamingClient() && !m.IsStreamingServer() {
		_, err := c.CallUnary(context.Background(), connect.NewRequest(&empty{}))
		return err
	}
	st := c.CallBidiStream(context.Background())
	_ = st.CloseRequest()
	_, err := st.Receive()
	_ = st.CloseResponse()
	return err
}

func TestKindsSurviveTheWire(t *testing.T) {
	for _, k := range fault.Kinds() {
		err := fault.Because(errors.New("/a/cause"), "x.Y", k, "the sentence")
		var res error
		srv := httptest.NewServer(
			connect.NewUnaryHandler("/p", func(context.Context, *connect.Request[boundaryv1.Ack]) (*connect.Response[boundaryv1.Ack], error) {
				return nil, api.ToWire(err)
			}))
		_, res = connect.NewClient[boundaryv1.Ack,
			boundaryv1.Ack](srv.Client(), srv.URL+"/p").CallUnary(context.Background(), connect.NewRequest(&boundaryv1.Ack{}))
		srv.Close()
		got := api.FromWire("client", res)
		if fault.Of(got) != k || fault.Text(got) != "the sentence" {
			t.Errorf("%s arrives as %s %q", k, fault.Of(got), fault.Text(got))
		}
	}
	if api.ToWire(nil) != nil || api.FromWire("x", nil) != nil {
		t.Error("no failure became one")
	}
}
