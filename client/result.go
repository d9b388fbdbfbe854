// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"net"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/fault"
)

// nodeError is what is wrong with one node, and not with the request.
type nodeError struct{ error }

// Unwrap returns the cause.
func (n nodeError) Unwrap() error { return n.error }

// Do calls one procedure once, and returns its answer or a fault.
func Do[Req, Res any](ctx context.Context, procedure func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error),
	req *Req) (*Res, error) {
	return Result(procedure(ctx, connect.NewRequest(req)))
}

// Result returns the message of an answer, or the fault of its error.
func Result[Res any](res *connect.Response[Res], err error) (*Res, error) {
	if err != nil {
		return nil, Fault(err)
	}
	return res.Msg, nil
}

// Fault makes a fault of what a server answered, or of what went wrong before it could. Fault(nil) is nil.
func Fault(err error) error {
	const op = "client.Fault"
	wire, ok := errors.AsType[*connect.Error](err)
	if !ok {
		return fault.At(op, "", err)
	}
	if own, ok := errors.AsType[*fault.Error](wire.Unwrap()); ok { // of our own side: the handshake, or the socket
		return fault.Because(nodeError{err}, op, own.Kind, "%s", fault.Text(own))
	}
	if alerted(wire) {
		return fault.Because(nodeError{err}, op, fault.Denied, "it refused this operator's certificate: that ran out, was replaced or banned, "+
			"its CA was retired, or it is of another trust domain; log in again, or ask an admin for an invitation")
	}
	return api.FromWire(op, err)
}

// alerted reports whether the other side ended the handshake with an alert. crypto/tls keeps the type of the alert to itself, and puts it
// into a [net.OpError] of this operation.
func alerted(err error) bool {
	o, ok := errors.AsType[*net.OpError](err)
	return ok && o.Op == "remote error"
}

// NewID draws a request id, a nonce, or an operation's id: 128 random bits in hexadecimal.
func NewID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails
	return hex.EncodeToString(b[:])
}
