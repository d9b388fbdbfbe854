// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/daemon/appliance/tailnet"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/ingress"
	"github.com/demarc-dev/demarc/mesh"
	"github.com/demarc-dev/demarc/telemetry"
)

// stopWait is how long the application may take to stop.
const stopWait = 12 * time.Second

// Parts makes the parts of an appliance, in the order in which they start.
func Parts(ctx context.Context, cfg *configs.Appliance, build string, log *slog.Logger) ([]daemon.Part, error) {
	a, err := New(ctx, cfg, build, log, Options{})
	if err != nil {
		return nil, err
	}
	parts, err := a.parts()
	if err != nil {
		a.Close(ctx)
		return nil, err
	}
	return parts, nil
}

func (a *Appliance) parts() ([]daemon.Part, error) {
	const op = "appliance.Parts"
	own, err := daemon.Listen(a.cfg.Socket)
	if err != nil {
		return nil, err
	}
	reg := telemetry.New(configs.RoleAppliance, a.build)
	a.describe(reg)
	parts := []daemon.Part{
		daemon.Func("book", a.tendBook),
		daemon.Func("deploy", a.reconcile),
		daemon.Func("operations", a.operate),
		daemon.Func("clock", a.tendTime),
		own.HTTP("socket", a.Handler(), a.log),
	}
	if m := a.cfg.Metrics; m != nil && m.Listen != "" {
		ln, err := net.Listen("tcp", m.Listen)
		if err != nil {
			_ = own.Close()
			return nil, fault.Because(err, op, fault.Unavailable, "metrics.listen: %v", err)
		}
		parts = append(parts, daemon.HTTP("metrics", ln, nil, reg.Handler(), a.log))
	}
	return append(append(parts, a.Link()...), a.Witness(), daemon.NewNotify(reg.Health, a.log)), nil
}

// Link is the parts that keep the appliance connected, and nothing of what it runs or serves.
func (a *Appliance) Link() []daemon.Part {
	return []daemon.Part{daemon.Func("channel", a.channel), daemon.Func("renewal", a.renewal), daemon.Func("cluster-keys", a.clusterKeys)}
}

// Witness is the part that asks the vendor to countersign the customer's log.
func (a *Appliance) Witness() daemon.Part { return daemon.Func("witness", a.witness) }

// tendBook looks after the book, and closes it at the end.
func (a *Appliance) tendBook(ctx context.Context, ready func()) error {
	ready()
	a.book.Tend(ctx)
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWait)
	defer cancel()
	a.Close(stop)
	return nil
}

func (a *Appliance) tendTime(ctx context.Context, ready func()) error {
	ready()
	a.book.TendTime(ctx)
	return nil
}

// channel keeps the channel up over the customer's list of routes.
func (a *Appliance) channel(ctx context.Context, ready func()) error {
	ready()
	var wg sync.WaitGroup
	defer wg.Wait()
	if want := a.book.View().Transport; want != "" {
		wg.Go(func() { // what the customer chose before a restart
			wait, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			if err := a.sw.Use(wait, want); err != nil && ctx.Err() == nil {
				a.log.Warn("the transport that was chosen does not work", "transport", want, "err", err)
			}
		})
	}
	return a.sw.Run(ctx, a.session)
}

// transports makes the switch of the customer's list.
func (a *Appliance) transports() (*mesh.Switch, error) {
	var routes []mesh.Route
	for _, t := range a.cfg.Transports {
		a.hellos[t.Name] = mesh.NewHello(mesh.HelloConfig{PQRequired: t.PQ == configs.PQRequired, Logger: a.log.With("transport", t.Name)})
		r := a.opts.Routes[t.Name]
		if r == nil {
			var err error
			if r, err = a.route(t); err != nil {
				return nil, err
			}
		}
		routes = append(routes, named{r, t.Name})
		a.routes[t.Name] = r
	}
	return mesh.NewSwitch(mesh.SwitchConfig{Routes: routes, Rand: a.opts.Rand, Logger: a.log, Stale: a.stale})
}

// named is a route by the name that the customer's file gives it.
type named struct {
	mesh.Route
	name string
}

// Name implements [mesh.Route].
func (n named) Name() string { return n.name }

func (a *Appliance) route(t configs.Transport) (mesh.Route, error) {
	const op = "appliance.transports"
	addresses := t.Addresses
	if len(addresses) == 0 {
		addresses = a.cfg.ControlPlane.Addresses
	}
	switch t.Kind {
	case configs.HTTPS:
		return httpsRoute(t, addresses, a.hellos[t.Name], a.log)
	case configs.PrivateLink:
		return mesh.NewPrivateLink(mesh.PrivateLink{Addresses: addresses})
	case configs.Tailscale:
		join := daemon.Tailnet(*t.Tailnet, a.log)
		join.Addresses = addresses
		return tailnet.NewTransport(join), nil
	}
	return nil, fault.New(op, fault.Invalid, "the transport %q is not one of https, privatelink, tailscale", t.Kind)
}

// describe registers what Prometheus may know.
func (a *Appliance) describe(r *telemetry.Registry) {
	r.Gauge("demarc_channel_up", "1 while a channel to the control plane is up.", func() float64 {
		if a.link.Load() != nil {
			return 1
		}
		return 0
	})
	r.Gauge("demarc_audit_entries", "Entries of the customer's audit log.", func() float64 { return float64(a.book.Log().Size()) })
	r.Gauge("demarc_reports_waiting", "Reports that the control plane has not acknowledged.",
		func() float64 { return float64(len(a.book.View().Reports)) })
	r.Gauge("demarc_services_healthy", "Services of the application that are healthy.", func() float64 {
		n := 0
		for _, s := range a.run.Status().Services {
			if s.Healthy {
				n++
			}
		}
		return float64(n)
	})
	r.Gauge("demarc_doors_open", "Doors for end users that stand open.", func() float64 { return float64(len(a.gate.Doors())) })
	var kinds []string
	for _, why := range ingress.Refusals() {
		kinds = append(kinds, string(why))
	}
	a.turnedAway.Store(r.CounterVec("demarc_doors_refused_total",
		"Connections and requests of end users that were turned away at a bound.", "bound", kinds))
	r.Gauge("demarc_doors_certificate_expires_seconds", "When the certificate of the doors runs out, seconds since 1970; 0 for none.",
		func() float64 {
			if a.doorCert == nil {
				return 0
			}
			return float64(a.doorCert.Expires().Unix())
		})
	r.Gauge("demarc_certificate_expires_seconds", "When the certificate runs out, seconds since 1970; 0 for none.", func() float64 {
		if leaf, _ := a.creds.Leaf(); leaf != nil {
			return float64(leaf.Leaf.NotAfter.Unix())
		}
		return 0
	})
	// not Alive: to start again makes no space, and ends the application
	r.Check("book", func(context.Context) error { return a.book.Failed() })
}
