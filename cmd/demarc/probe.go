// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
)

const maxProbe = 1000 // messages in one call

type probeDoc struct {
	ID         string `json:"id"`
	Appliance  string `json:"appliance"`
	Sent       uint64 `json:"sent"`
	Echoed     uint64 `json:"echoed"`
	Doubled    uint64 `json:"doubled"`
	OutOfOrder uint64 `json:"out_of_order"`
	TookMS     int64  `json:"took_ms"`
	OK         bool   `json:"ok"`
}

// prober sends the messages of one probe and counts the echoes.
type prober struct {
	a         *app
	v         *vendor
	appliance string
	id        string
	count     uint64
	rate      float64
	watch     bool
}

func (a *app) probe() *cobra.Command {
	p := &prober{a: a}
	c := a.online(&cobra.Command{Use: "probe", Short: "Send numbered messages to an appliance and count the echoes", Args: exactly(0, "no arguments"),
		Long:    "probe measures the channel: each message asks for nothing but its own echo, which must come once and in order. It fails unless all do.\nAfter the last message it waits for --timeout.",
		Example: "  demarc probe --appliance eu-1 --count 200 --rate 50 --watch"},
		func(ctx context.Context, v *vendor, _ []string) error {
			if p.appliance == "" {
				return usage("name the appliance with --appliance NAME")
			}
			if p.count < 1 || p.count > 1_000_000 || !(p.rate > 0 && p.rate <= 10_000) {
				return usage("--count is 1 to 1000000, --rate above 0 and at most 10000")
			}
			p.v, p.id = v, draw()
			return p.run(ctx)
		})
	c.Flags().StringVar(&p.appliance, "appliance", "", "to whom")
	c.Flags().Uint64Var(&p.count, "count", 100, "messages")
	c.Flags().Float64Var(&p.rate, "rate", 100, "messages a second")
	c.Flags().BoolVar(&p.watch, "watch", false, "tell the counts every second while it goes on")
	return c
}

// run sends all, waits for the echoes, and says how it went.
func (p *prober) run(ctx context.Context) error {
	const op = "demarc.probe"
	began := time.Now()
	m, err := p.exchange(ctx, began)
	if err != nil {
		return err
	}
	doc := probeDoc{ID: p.id, Appliance: p.appliance, Sent: m.GetSent(), Echoed: m.GetEchoed(), Doubled: m.GetDoubled(), OutOfOrder: m.GetOutOfOrder(), TookMS: time.Since(began).Milliseconds()}
	doc.OK = doc.Sent == p.count && doc.Echoed == p.count && doc.Doubled == 0 && doc.OutOfOrder == 0
	err = p.a.emit(doc, func(w io.Writer) {
		fmt.Fprintf(w, "sent %d, echoed %d, doubled %d, out of order %d, in %s\n", doc.Sent, doc.Echoed, doc.Doubled, doc.OutOfOrder, time.Duration(doc.TookMS)*time.Millisecond)
	})
	switch {
	case err != nil || doc.OK:
		return err
	case doc.Doubled > 0 || doc.OutOfOrder > 0:
		return fault.New(op, fault.Conflict, "messages came twice or out of order")
	}
	return fault.New(op, fault.Unavailable, "%d of %d messages were not echoed in time", p.count-min(p.count, doc.Echoed), p.count)
}

// exchange sends at the rate, and looks until all is echoed, something is wrong, or the time is over.
func (p *prober) exchange(ctx context.Context, began time.Time) (*controlv1.GetProbeResponse, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	told, end := began, began
	for sent := uint64(0); ; {
		due := min(p.count, uint64(time.Since(began).Seconds()*p.rate)+1)
		for sent < due {
			n := min(due-sent, maxProbe)
			if err := p.send(ctx, sent+1, n); err != nil {
				return nil, err
			}
			sent += n
			end = time.Now().Add(p.v.total)
		}
		show := p.watch && time.Since(told) >= time.Second
		if show || sent == p.count {
			m, err := p.look(ctx)
			if err != nil {
				return nil, err
			}
			if show {
				told = time.Now()
				p.a.note("sent %d, echoed %d, doubled %d, out of order %d", m.GetSent(), m.GetEchoed(), m.GetDoubled(), m.GetOutOfOrder())
			}
			over := sent == p.count && (m.GetEchoed() >= p.count || time.Now().After(end))
			if over || m.GetDoubled() > 0 || m.GetOutOfOrder() > 0 {
				return m, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, fault.Because(ctx.Err(), "demarc.probe", fault.Unavailable, "interrupted")
		case <-tick.C:
		}
	}
}

func (p *prober) send(ctx context.Context, first, n uint64) error {
	id := draw()
	_, err := ask(ctx, p.v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.ProbeResponse, error) {
		return wire(c.Probe(ctx, connect.NewRequest(&controlv1.ProbeRequest{RequestId: id, Appliance: p.appliance, Id: p.id, First: first, Count: uint32(n)})))
	})
	return err
}

func (p *prober) look(ctx context.Context) (*controlv1.GetProbeResponse, error) {
	return ask(ctx, p.v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.GetProbeResponse, error) {
		return wire(c.GetProbe(ctx, connect.NewRequest(&controlv1.GetProbeRequest{Appliance: p.appliance, Id: p.id})))
	})
}
