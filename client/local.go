// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"net"
	"net/http"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/api/management/v1/managementv1connect"
	"github.com/demarc-dev/demarc/fault"
)

// Local calls the customer's own appliance over its socket. Use [Do] to call a procedure of it.
func Local(socket string) localv1connect.LocalClient {
	return localv1connect.NewLocalClient(unix(socket), "http://appliance", connect.WithReadMaxBytes(64<<20), api.Doubt())
}

// Management calls a management plane over its socket.
func Management(socket string) managementv1connect.OverviewClient {
	return managementv1connect.NewOverviewClient(unix(socket), "http://management")
}

func unix(socket string) *http.Client {
	return &http.Client{Transport: api.Sent(&http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
		if err != nil {
			return nil, fault.Because(err, "client.socket", fault.Unavailable,
				"nothing answers on %s: is the daemon running, and may you open its socket?", socket)
		}
		return c, nil
	}})}
}
