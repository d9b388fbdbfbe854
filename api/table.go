// SPDX-License-Identifier: Apache-2.0

// Package api is the words between programs: protobuf schemas, generated Connect code, and the one table of who may call what.
//
// boundary/v1 is all that crosses the trust boundary; control/v1 is the vendor's operator to the vendor's control plane;
// local/v1 is the customer to the customer's appliance, over a Unix socket; management/v1 is a control plane to the
// management plane. A procedure that the table does not name is refused to everybody.
package api

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api/boundary/v1/boundaryv1connect"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/api/management/v1/managementv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// Caller is a class of caller, as the door that it came through proves it.
type Caller string

// The closed set of classes.
const (
	Stranger  Caller = "stranger"  // TLS without a client certificate
	Appliance Caller = "appliance" // a certificate of the trust domain with the role appliance
	Operator  Caller = "operator"  // likewise, operator
	Node      Caller = "node"      // likewise, node
	Owner     Caller = "owner"     // whoever may open the Unix socket of the process
)

// Callers lists every class.
func Callers() []Caller { return []Caller{Stranger, Appliance, Operator, Node, Owner} }

// rule is who may call one procedure: the classes, and for an operator the least rank.
type rule struct {
	classes []Caller
	least   fleet.Rank // where the classes hold Operator
}

func only(classes ...Caller) rule { return rule{classes: classes} }

func from(least fleet.Rank) rule { return rule{classes: []Caller{Operator}, least: least} }

// table is the only list of who may call what: one class a procedure, but for Bootstrap and Artifact; for an operator, the
// least rank that may.
// A certificate where none is needed does no harm, so Bootstrap takes strangers and appliances (which come back
// after their certificate has run out).
var table = map[string]rule{
	boundaryv1connect.BootstrapChallengeProcedure: only(Stranger, Appliance),
	boundaryv1connect.BootstrapBundleProcedure:    only(Stranger, Appliance),
	boundaryv1connect.BootstrapEnrolProcedure:     only(Stranger, Appliance),

	boundaryv1connect.BoundaryRenewProcedure:    only(Appliance),
	boundaryv1connect.BoundaryRollKeysProcedure: only(Appliance),
	boundaryv1connect.BoundaryChannelProcedure:  only(Appliance),
	boundaryv1connect.BoundaryArtifactProcedure: only(Appliance, Node), // a node asks the node that an artifact was uploaded to

	controlv1connect.ControlStatusProcedure:            from(fleet.Viewer),
	controlv1connect.ControlRegisterCustomerProcedure:  from(fleet.Operate),
	controlv1connect.ControlRegisterApplianceProcedure: from(fleet.Operate),
	controlv1connect.ControlListAppliancesProcedure:    from(fleet.Viewer),
	controlv1connect.ControlBanApplianceProcedure:      from(fleet.Operate),
	controlv1connect.ControlSetExpectProcedure:         from(fleet.Admin),
	controlv1connect.ControlListAuthoritiesProcedure:   from(fleet.Viewer),
	controlv1connect.ControlPrepareAuthorityProcedure:  from(fleet.Admin),
	controlv1connect.ControlActivateAuthorityProcedure: from(fleet.Admin),
	controlv1connect.ControlRetireAuthorityProcedure:   from(fleet.Admin),
	controlv1connect.ControlRenewOperatorProcedure:     from(fleet.Viewer),
	controlv1connect.ControlUploadArtifactProcedure:    from(fleet.Deployer),
	controlv1connect.ControlReplicateArtifactProcedure: from(fleet.Deployer),
	controlv1connect.ControlPublishReleaseProcedure:    from(fleet.Deployer),
	controlv1connect.ControlProbeProcedure:             from(fleet.Operate),
	controlv1connect.ControlGetProbeProcedure:          from(fleet.Viewer),
	controlv1connect.ControlRequestOperationProcedure:  from(fleet.Operate),
	controlv1connect.ControlListOperationsProcedure:    from(fleet.Viewer),
	controlv1connect.ControlExportEvidenceProcedure:    from(fleet.Viewer),

	controlv1connect.ReplicasHoldProcedure: only(Node),

	// For an admin alone: who is a member decides who holds the book and its keys.
	controlv1connect.ClusterListMembersProcedure:        from(fleet.Admin),
	controlv1connect.ClusterAddMemberProcedure:          from(fleet.Admin),
	controlv1connect.ClusterCertifyMemberProcedure:      from(fleet.Admin),
	controlv1connect.ClusterPromoteMemberProcedure:      from(fleet.Admin),
	controlv1connect.ClusterDemoteMemberProcedure:       from(fleet.Admin),
	controlv1connect.ClusterRemoveMemberProcedure:       from(fleet.Admin),
	controlv1connect.ClusterReplaceMemberProcedure:      from(fleet.Admin),
	controlv1connect.ClusterTransferLeadershipProcedure: from(fleet.Admin),
	controlv1connect.ClusterSetAutopilotProcedure:       from(fleet.Admin),
	controlv1connect.ClusterSaveSnapshotProcedure:       from(fleet.Admin),

	controlv1connect.OperatorServiceListOperatorsProcedure:      from(fleet.Viewer),
	controlv1connect.OperatorServiceInviteOperatorProcedure:     from(fleet.Admin),
	controlv1connect.OperatorServiceSetOperatorRoleProcedure:    from(fleet.Admin),
	controlv1connect.OperatorServiceBanOperatorProcedure:        from(fleet.Admin),
	controlv1connect.OperatorServiceRemoveOperatorProcedure:     from(fleet.Admin),
	controlv1connect.KeyServiceGetKeysProcedure:                 from(fleet.Admin),
	controlv1connect.KeyServiceRotateKeyProcedure:               from(fleet.Admin),
	controlv1connect.KeyServicePutSecretProcedure:               from(fleet.Admin),
	controlv1connect.KeyServiceListSecretsProcedure:             from(fleet.Admin),
	controlv1connect.KeyServiceForgetSecretProcedure:            from(fleet.Admin),
	controlv1connect.OperatorServiceGetDoorProcedure:            from(fleet.Viewer),
	controlv1connect.OperatorBootstrapAcceptInvitationProcedure: only(Stranger),
	controlv1connect.OperatorBootstrapLoginOptionsProcedure:     only(Stranger),
	controlv1connect.OperatorBootstrapLoginProcedure:            only(Stranger),
	controlv1connect.OperatorBootstrapRecoverAdminProcedure:     only(Stranger),

	controlv1connect.IssuerKeysGetExpectProcedure:   from(fleet.Viewer),
	controlv1connect.IssuerKeysConfirmKeysProcedure: from(fleet.Admin), // it decides who an appliance is
	controlv1connect.IssuerKeysForgetKeysProcedure:  from(fleet.Admin),

	localv1connect.LocalStatusProcedure:         only(Owner),
	localv1connect.LocalPinProcedure:            only(Owner),
	localv1connect.LocalSubmitProcedure:         only(Owner),
	localv1connect.LocalReviewProcedure:         only(Owner),
	localv1connect.LocalAccessProcedure:         only(Owner),
	localv1connect.LocalSetPostureProcedure:     only(Owner),
	localv1connect.LocalGetPostureProcedure:     only(Owner),
	localv1connect.LocalSetTransportProcedure:   only(Owner),
	localv1connect.LocalListOperationsProcedure: only(Owner),
	localv1connect.LocalListLogProcedure:        only(Owner),
	localv1connect.LocalExportEvidenceProcedure: only(Owner),

	managementv1connect.ManagementReportProcedure: only(Node),
	managementv1connect.ManagementBundleProcedure: only(Stranger, Node),
	managementv1connect.OverviewListProcedure:     only(Owner),
}

// Procedures lists every procedure of the table, sorted.
func Procedures() []string { return slices.Sorted(maps.Keys(table)) }

// May tells whether a caller may call a procedure.
func May(w Who, procedure string) bool {
	r := table[procedure]
	return slices.Contains(r.classes, w.Class) && (w.Class != Operator || w.Rank.Covers(r.least))
}

// Least is the least rank of an operator that may call a procedure, "" where no operator may.
func Least(procedure string) fleet.Rank { return table[procedure].least }

// Who is a caller as its door proved it.
type Who struct {
	Class     Caller
	Principal fleet.Principal // empty for a stranger
	Serial    fleet.Serial    // of the certificate, where there is one
	Rank      fleet.Rank      // of an operator, as the book has it at the time of the call
	Issuer    fleet.Digest    // of the CA's certificate that the chain ends in, where the server tells it
}

// ClassOf gives the class that a principal's role proves.
func ClassOf(p fleet.Principal) Caller {
	if p == fleet.Local {
		return Owner
	}
	_, role, _, ok := p.Split()
	switch {
	case !ok:
		return Stranger
	case role == fleet.Appliance:
		return Appliance
	case role == fleet.Operator:
		return Operator
	case role == fleet.Node:
		return Node
	}
	return Stranger
}

type whoKey struct{}

// With returns a context that carries the caller. Only a door calls it.
func With(ctx context.Context, w Who) context.Context { return context.WithValue(ctx, whoKey{}, w) }

// From gives the caller that the door proved; without a door it is a stranger.
func From(ctx context.Context) Who {
	if w, ok := ctx.Value(whoKey{}).(Who); ok {
		return w
	}
	return Who{Class: Stranger}
}

// Guard is the interceptor of every server: it holds the table, turns faults into wire errors, and tells refused of
// each call that the table refused. refused may be nil.
func Guard(refused func(ctx context.Context, w Who, procedure string)) connect.Interceptor {
	return guard{refused}
}

type guard struct {
	refused func(context.Context, Who, string)
}

func (g guard) check(ctx context.Context, procedure string) error {
	w := From(ctx)
	if May(w, procedure) {
		return nil
	}
	if g.refused != nil {
		g.refused(ctx, w, procedure)
	}
	return ToWire(Refusal(w, procedure))
}

// Refusal is what a caller is told that the table refused.
func Refusal(w Who, procedure string) error {
	const op = "api.Guard"
	if least := Least(procedure); w.Class == Operator && least != "" {
		return fault.New(op, fault.Denied, "%s needs the role %s, and yours is %s: ask an admin", procedure, least, cmp.Or(w.Rank, "none"))
	}
	return fault.New(op, fault.Denied, "%s may not be called by %s", procedure, aOrAn(w.Class))
}

func aOrAn(c Caller) string {
	if slices.Contains([]Caller{Appliance, Operator, Owner}, c) {
		return "an " + string(c)
	}
	return "a " + string(c)
}

// WrapUnary implements connect.Interceptor.
func (g guard) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if err := g.check(ctx, req.Spec().Procedure); err != nil {
			return nil, err
		}
		res, err := next(ctx, req)
		return res, ToWire(err)
	}
}

// WrapStreamingClient implements connect.Interceptor; a guard stands on the server's side only.
func (g guard) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler implements connect.Interceptor.
func (g guard) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if err := g.check(ctx, conn.Spec().Procedure); err != nil {
			return err
		}
		return ToWire(next(ctx, conn))
	}
}

// kindHeader carries the kind of failure beside Connect's own code.
const kindHeader = "Demarc-Fault"

// codes is the only map from kinds to the wire.
var codes = map[fault.Kind]connect.Code{
	fault.Invalid: connect.CodeInvalidArgument, fault.Denied: connect.CodePermissionDenied,
	fault.NotFound: connect.CodeNotFound, fault.Conflict: connect.CodeAlreadyExists,
	fault.Expired: connect.CodeFailedPrecondition, fault.NotLeader: connect.CodeUnavailable,
	fault.Unsure: connect.CodeAborted, fault.Busy: connect.CodeResourceExhausted,
	fault.Unavailable: connect.CodeUnavailable, fault.Internal: connect.CodeInternal,
}

// ToWire turns a fault into a Connect error: kind and sentence cross, the cause does not. Connect's own errors pass.
func ToWire(err error) error {
	var own *connect.Error
	if err == nil || errors.As(err, &own) {
		return err
	}
	kind := fault.Of(err)
	out := connect.NewError(codes[kind], errors.New(fault.Text(err)))
	out.Meta().Set(kindHeader, string(kind))
	return out
}

// FromWire turns what a client of Connect returns back into a fault with the server's kind and sentence.
func FromWire(op string, err error) error {
	if err == nil {
		return nil
	}
	var e *connect.Error
	if !errors.As(err, &e) {
		return fault.At(op, "", err)
	}
	if k := fault.Kind(e.Meta().Get(kindHeader)); k.Known() {
		return fault.New(op, k, "%s", e.Message())
	}
	var own *fault.Error
	if errors.As(e.Unwrap(), &own) { // of this side: see Sent
		return fault.Because(err, op, own.Kind, "%s", fault.Text(own))
	}
	kind := fault.Internal
	switch e.Code() {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded, connect.CodeCanceled, connect.CodeUnknown:
		kind = fault.Unavailable
	case connect.CodeInvalidArgument:
		kind = fault.Invalid
	case connect.CodeResourceExhausted:
		kind = fault.Busy
	case connect.CodePermissionDenied, connect.CodeUnauthenticated:
		kind = fault.Denied
	case connect.CodeNotFound, connect.CodeUnimplemented:
		kind = fault.NotFound
	}
	return fault.Because(err, op, kind, "%s", e.Message())
}
