// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/daemon/appliance/tailnet"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ingress"
	"github.com/demarc-dev/demarc/manifest"
	"github.com/demarc-dev/demarc/mesh"
)

// openGate makes the gate, with every door shut.
func (a *Appliance) openGate() error {
	limits := a.cfg.Ingress.Limits
	cfg := ingress.Config{Host: ingress.HostNet{}, Logger: a.log, MaxConns: limits.Connections, ConnsPerSource: limits.ConnectionsPerSource,
		MaxRequests: limits.Requests, RequestsPerSource: limits.RequestsPerSource, Refused: func(why ingress.Refusal) {
			if v := a.turnedAway.Load(); v != nil {
				v.With(string(why)).Inc()
			}
		}}
	if t := a.cfg.Ingress.TLS; t != nil {
		files, err := ingress.Load(t.CertFile, t.KeyFile)
		if err != nil {
			return err
		}
		cfg.Certificate, a.doorCert = files.Certificate, files
	}
	if a.cfg.Ingress.Tailnet != nil {
		a.private = newPrivateSide(daemon.Tailnet(*a.cfg.Ingress.Tailnet, a.log))
		cfg.Tailnet = a.private
	}
	a.gate = ingress.New(cfg)
	return nil
}

// doorPlan compiles a posture and what runs into the plan of doors.
func (a *Appliance) doorPlan(p fleet.Posture) (ingress.Plan, error) {
	st := a.book.View()
	var ports []ingress.Port
	if st.Good.Release != "" {
		plan, _, _, err := a.plans.Plan(st, st.Good.Release)
		if err != nil {
			return ingress.Plan{}, err
		}
		addrs := tailnetAddrs(plan.Ports, a.cfg.Ingress.TailnetPorts)
		for _, x := range plan.Ports {
			up, ok := a.run.Addr(x.Service, x.Port)
			if !ok {
				continue // the service has not come up yet: reconcile looks again
			}
			ports = append(ports, ingress.Port{Name: x.Name, Protocol: x.Protocol, Widest: x.Widest, Upstream: up,
				HostAddr: a.hostAddr(x.Name), TailnetAddr: addrs[x.Name]})
		}
	}
	slices.SortFunc(ports, func(x, y ingress.Port) int { return strings.Compare(x.Name, y.Name) })
	return ingress.Compile(p, ports, ingress.Site{TLS: a.cfg.Ingress.TLS != nil, Tailnet: a.cfg.Ingress.Tailnet != nil})
}

// hostAddr is where the customer's file puts a port on this host, "" where it does not.
func (a *Appliance) hostAddr(port string) string { return a.cfg.Ingress.Ports[port] }

// tailnetAddrs returns each port its address on the customer's tailnet: that of the file, else for HTTP 443 or 80 where the service
// listens there and 80 where not, else the number that the service listens on. Where all of these are taken, the last stands, and
// [ingress.Compile] shuts the port with its reason.
func tailnetAddrs(ports []manifest.Port, file map[string]string) map[string]string {
	out, taken := map[string]string{}, map[string]bool{}
	for _, x := range ports {
		if at, ok := file[x.Name]; ok {
			out[x.Name], taken[at] = at, true
		}
	}
	sorted := slices.SortedFunc(slices.Values(ports), func(x, y manifest.Port) int { return strings.Compare(x.Name, y.Name) })
	for _, x := range sorted {
		if out[x.Name] != "" {
			continue
		}
		own := ":" + strconv.Itoa(x.Port)
		at := own
		if x.Protocol == ingress.HTTP && x.Port != 443 && !taken[":80"] {
			at = ":80"
		}
		out[x.Name], taken[at] = at, true
	}
	return out
}

// followDoors opens and shuts doors after what runs has changed.
func (a *Appliance) followDoors(ctx context.Context) error {
	plan, err := a.doorPlan(a.book.View().Posture)
	if err != nil {
		return err
	}
	if reflect.DeepEqual(plan, a.gate.Plan()) && !slices.ContainsFunc(a.gate.Doors(), func(s ingress.Standing) bool { return s.Err != nil }) {
		return nil
	}
	short, cancel := context.WithTimeout(ctx, openWait) // the join goes on meanwhile: the next look finds it done
	defer cancel()
	if err := a.ready(short, plan); err != nil {
		return err
	}
	a.door.Lock()
	defer a.door.Unlock()
	if plan, err = a.doorPlan(a.book.View().Posture); err != nil { // the customer may have set another posture meanwhile
		return err
	}
	return a.gate.Set(ctx, plan)
}

// setPosture opens the doors of a posture and then puts it on record. Where a door can't be opened, the old ones stay and
// so does the old posture.
func (a *Appliance) setPosture(ctx context.Context, id fleet.RequestID, p fleet.Posture) error {
	if err := p.Check(); err != nil {
		return err
	}
	plan, err := a.doorPlan(p)
	if err != nil {
		return err
	}
	if p.Exposure == fleet.Private && a.cfg.Ingress.Tailnet == nil {
		return fault.New("appliance.setPosture", fault.Invalid, "the posture private needs ingress.tailnet in the file of this appliance")
	}
	if err := a.ready(ctx, plan); err != nil {
		return err
	}
	a.door.Lock()
	defer a.door.Unlock()
	if plan, err = a.doorPlan(p); err != nil {
		return err
	}
	was := a.gate.Plan()
	if err := a.gate.Set(ctx, plan); err != nil {
		return err
	}
	if _, err := book.SubmitAs(ctx, a.book, id, book.SetPosture{Posture: p}); err != nil {
		if back := a.gate.Set(context.WithoutCancel(ctx), was); back != nil {
			a.log.Error("the old doors could not be opened again", "err", back)
		}
		return err
	}
	return nil
}

// openWait bounds how long the deployment's loop, and the lock of the doors, wait for the node on the customer's tailnet.
const openWait = 2 * time.Second

// ready joins the customer's tailnet where a plan has a door on it: before the lock of the doors is taken, so that a coordinator
// that is slow or away holds up nobody who shuts doors or opens others.
func (a *Appliance) ready(ctx context.Context, p ingress.Plan) error {
	if a.private == nil || !slices.ContainsFunc(p.Doors, func(d ingress.Door) bool { return d.Side == ingress.Tailnet }) {
		return nil
	}
	_, err := a.private.Up(ctx)
	return err
}

// privateSide is the customer's own tailnet. The node joins when the first door on it is opened, and not before.
type privateSide struct{ *tailnet.Node }

func newPrivateSide(cfg mesh.TailnetConfig) *privateSide {
	cfg.Doors = true
	return &privateSide{tailnet.New("the customer's tailnet", cfg)}
}

// Open implements [ingress.Opener].
func (p *privateSide) Open(ctx context.Context, addr string) (net.Listener, error) {
	ctx, cancel := context.WithTimeout(ctx, openWait)
	defer cancel()
	n, err := p.Up(ctx)
	if err != nil {
		return nil, err
	}
	return n.Listen(ctx, addr)
}

// WhoIs implements [ingress.Knower]. It joins nothing: where the node is gone, so is who was behind the address.
func (p *privateSide) WhoIs(ctx context.Context, remote netip.AddrPort) (ingress.Peer, error) {
	n := p.Joined()
	if n == nil {
		return ingress.Peer{}, fault.New("appliance.WhoIs", fault.NotFound, "the node on the customer's tailnet is not up")
	}
	who, err := n.WhoIs(ctx, remote)
	return ingress.Peer(who), err
}
