// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"io"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/http2"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/mesh"
)

// welcomeWait bounds the wait for the first word on a channel.
const welcomeWait = 10 * time.Second

// Of an HTTP/2 connection: after how much silence it is pinged, and how long the answer may take.
const (
	pingAfter = 10 * time.Second
	pingWait  = 5 * time.Second
)

// base stands for the control plane in URLs: who answers is proven by its certificate, not by a name.
const base = "https://control-plane"

// link is what a node of the control plane is called over. Closing cc ends it.
type link struct {
	cc   io.Closer
	http *http.Client
	node string
	at   string // route
}

// open proves the node that answers on a connection, and speaks HTTP/2 with it.
func (a *Appliance) open(ctx context.Context, route string, c net.Conn, s identity.Source) (*link, error) {
	const op = "appliance.open"
	t, err := mesh.Handshake(ctx, c, identity.Client(s, identity.WantNode(a.cfg.TrustDomain), "h2"))
	if err != nil {
		return nil, mesh.Explain(err)
	}
	tr := &http2.Transport{ReadIdleTimeout: pingAfter, PingTimeout: pingWait}
	cc, err := tr.NewClientConn(t)
	if err != nil {
		return nil, fault.At(op, fault.Unavailable, err)
	}
	return &link{cc: cc, http: &http.Client{Transport: cc}, at: route}, nil
}

// session is the work over one connection: it enrols where there is no good certificate, then carries the channel.
func (a *Appliance) session(ctx context.Context, route string, c net.Conn, up func()) error {
	if !a.wallet.good(a.now()) {
		l, err := a.open(ctx, route, c, stranger{a.wallet})
		if err != nil {
			return err
		}
		logKey, err := a.enrol(ctx, l)
		_ = l.cc.Close()
		if err != nil {
			a.log.Warn("not enrolled", "route", route, "err", err)
			return err
		}
		if _, err := submit(ctx, a, MeetVendor{LogKey: logKey}); err != nil {
			return err
		}
		a.log.Info("enrolled", "route", route)
		if c, err = a.routes[route].Dial(ctx, ""); err != nil { // the certificate is shown on a connection of its own
			return err
		}
		defer c.Close()
	}
	return a.carry(ctx, route, c, up)
}
