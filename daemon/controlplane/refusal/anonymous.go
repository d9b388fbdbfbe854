// SPDX-License-Identifier: Apache-2.0

package refusal

import (
	"context"

	"connectrpc.com/connect"
)

// Answer answers a call of an anonymous caller, if the rate limit permits it now. Each refusal is recorded under the name that the call
// was for, with the reason that the caller gets.
func Answer[Req, Res any](ctx context.Context, s *Recorder, req *connect.Request[Req], what string, do func(context.Context,
	*Req) (res *Res, name string, err error)) (*connect.Response[Res], error) {
	if !s.Heard(req.Peer().Addr) {
		return nil, Busy()
	}
	res, name, err := do(ctx, req.Msg)
	if err != nil {
		s.AnonymousCall(ctx, what, name, err)
		return nil, err
	}
	return connect.NewResponse(res), nil
}

// ByName adapts a call whose request has the name that it is for.
func ByName[Req interface{ GetName() string }, Res any](do func(context.Context, Req) (*Res, error)) func(context.Context,
	Req) (*Res, string, error) {
	return func(ctx context.Context, m Req) (*Res, string, error) {
		res, err := do(ctx, m)
		return res, m.GetName(), err
	}
}
