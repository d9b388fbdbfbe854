// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"context"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ingress"
	"github.com/demarc-dev/demarc/mesh"
)

// openGate makes the gate, with every door shut.
func (a *Appliance) openGate() error {
	cfg := ingress.Config{Host: ingress.HostNet{}, Logger: a.log}
	if t := a.cfg.Ingress.TLS; t != nil {
		files, err := ingress.Load(t.CertFile, t.KeyFile)
		if err != nil {
			return err
		}
		cfg.Certificate = files.Certificate
	}
	if a.cfg.Ingress.Tailnet != nil {
		a.private.a = a
		cfg.Tailnet = &a.private
	}
	a.gate = ingress.New(cfg)
	return nil
}

// doorPlan compiles a posture and what runs into the plan of doors.
func (a *Appliance) doorPlan(p fleet.Posture) (ingress.Plan, error) {
	page := a.book.View()
	var ports []ingress.Port
	if page.Good.Release != "" {
		plan, _, _, err := page.Plan(page.Good.Release)
		if err != nil {
			return ingress.Plan{}, err
		}
		for _, x := range plan.Ports {
			up, ok := a.run.Addr(x.Service, x.Port)
			if !ok {
				continue // the service has not come up yet: reconcile looks again
			}
			ports = append(ports, ingress.Port{Name: x.Name, Protocol: x.Protocol, Widest: x.Widest, Upstream: up, HostAddr: a.hostAddr(x.Name), TailnetAddr: tailnetAddr(x.Port)})
		}
	}
	slices.SortFunc(ports, func(x, y ingress.Port) int { return strings.Compare(x.Name, y.Name) })
	return ingress.Compile(p, ports, ingress.Site{TLS: a.cfg.Ingress.TLS != nil, Tailnet: a.cfg.Ingress.Tailnet != nil})
}

// hostAddr is where the customer's file puts a port on this host, "" where it does not.
func (a *Appliance) hostAddr(port string) string { return a.cfg.Ingress.Ports[port] }

func tailnetAddr(port int) string {
	if port == 443 || port == 80 {
		return netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(port)).String()[len("0.0.0.0"):]
	}
	return ":80"
}

// followDoors opens and shuts doors after what runs has changed.
func (a *Appliance) followDoors(ctx context.Context) error {
	a.door.Lock()
	defer a.door.Unlock()
	plan, err := a.doorPlan(a.book.View().Posture)
	if err != nil {
		return err
	}
	if reflect.DeepEqual(plan, a.gate.Plan()) && !slices.ContainsFunc(a.gate.Doors(), func(s ingress.Standing) bool { return s.Err != nil }) {
		return nil
	}
	return a.gate.Set(ctx, plan)
}

// setPosture opens the doors of a posture and then puts it on record. Where a door can't be opened, the old ones stay and
// so does the old posture.
func (a *Appliance) setPosture(ctx context.Context, id fleet.RequestID, p fleet.Posture) error {
	if err := p.Check(); err != nil {
		return err
	}
	a.door.Lock()
	defer a.door.Unlock()
	plan, err := a.doorPlan(p)
	if err != nil {
		return err
	}
	if p.Exposure == fleet.Private && a.cfg.Ingress.Tailnet == nil {
		return fault.New("appliance.setPosture", fault.Invalid, "the posture private needs ingress.tailnet in the file of this appliance")
	}
	was := a.gate.Plan()
	if err := a.gate.Set(ctx, plan); err != nil {
		return err
	}
	if _, err := submitAs(ctx, a, id, SetPosture{Posture: p}); err != nil {
		if back := a.gate.Set(context.WithoutCancel(ctx), was); back != nil {
			a.log.Error("the old doors could not be opened again", "err", back)
		}
		return err
	}
	return nil
}

// privateSide is the customer's own tailnet. The node joins when the first door on it is opened, and not before.
type privateSide struct {
	a    *Appliance
	mu   sync.Mutex
	node *mesh.Node
}

func (p *privateSide) join(ctx context.Context) (*mesh.Node, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.node != nil {
		if !isClosed(p.node.Gone()) {
			return p.node, nil
		}
		_ = p.node.Close() // its key has expired
		p.node = nil
	}
	cfg := daemon.Tailnet(*p.a.cfg.Ingress.Tailnet, p.a.log)
	cfg.Doors = true
	n, err := mesh.Join(ctx, cfg)
	if err != nil {
		return nil, err
	}
	p.node = n
	return n, nil
}

// Open implements [ingress.Opener].
func (p *privateSide) Open(ctx context.Context, addr string) (net.Listener, error) {
	n, err := p.join(ctx)
	if err != nil {
		return nil, err
	}
	return n.Listen(ctx, addr)
}

// WhoIs implements [ingress.Knower].
func (p *privateSide) WhoIs(ctx context.Context, remote netip.AddrPort) (ingress.Peer, error) {
	n, err := p.join(ctx)
	if err != nil {
		return ingress.Peer{}, err
	}
	who, err := n.WhoIs(ctx, remote)
	return ingress.Peer(who), err
}

func (p *privateSide) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.node != nil {
		_ = p.node.Close()
		p.node = nil
	}
}
