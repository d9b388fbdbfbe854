// SPDX-License-Identifier: Apache-2.0

package vendor

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
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
	a         *cli.App
	v         *client.Client
	appliance string
	id        string
	count     uint64
	rate      float64
	watch     bool
}

func probeCommand(a *cli.App) *cobra.Command {
	p := &prober{a: a}
	c := a.Online(&cobra.Command{
		Use:   "probe",
		Short: "Send numbered messages to an appliance and count the echoes",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "probe measures the channel: each message asks for nothing but its own echo, which must come once and in order. It\n" +
			"fails unless all do. After the last message it waits for --timeout.",
		Example: "  demarc probe --appliance eu-1 --count 200 --rate 50 --watch",
	},
		func(ctx context.Context, v *client.Client, _ []string) error {
			if p.appliance == "" {
				return cli.Usage("name the appliance with --appliance NAME")
			}
			if p.count < 1 || p.count > 1_000_000 || !(p.rate > 0 && p.rate <= 10_000) {
				return cli.Usage("--count is 1 to 1000000, --rate above 0 and at most 10000")
			}
			p.v, p.id = v, client.NewID()
			return p.run(ctx)
		})
	c.Flags().StringVar(&p.appliance, "appliance", "", "to whom")
	c.Flags().Uint64Var(&p.count, "count", 100, "messages")
	c.Flags().Float64Var(&p.rate, "rate", 100, "messages a second")
	c.Flags().BoolVar(&p.watch, "watch", false, "print the counts every second until it ends")
	return c
}

// run sends all, waits for the echoes, and prints the counts.
func (p *prober) run(ctx context.Context) error {
	const op = "demarc.probe"
	began := time.Now()
	m, err := p.exchange(ctx, began)
	if err != nil {
		return err
	}
	doc := probeDoc{ID: p.id, Appliance: p.appliance, Sent: m.GetSent(), Echoed: m.GetEchoed(), Doubled: m.GetDoubled(),
		OutOfOrder: m.GetOutOfOrder(), TookMS: time.Since(began).Milliseconds()}
	doc.OK = doc.Sent == p.count && doc.Echoed == p.count && doc.Doubled == 0 && doc.OutOfOrder == 0
	err = p.a.Emit(doc, func(w io.Writer) {
		fmt.Fprintf(w, "sent %d, echoed %d, doubled %d, out of order %d, in %s\n", doc.Sent, doc.Echoed, doc.Doubled, doc.OutOfOrder,
			time.Duration(doc.TookMS)*time.Millisecond)
	})
	switch {
	case err != nil || doc.OK:
		return err
	case doc.Doubled > 0 || doc.OutOfOrder > 0:
		return fault.New(op, fault.Conflict, "messages came twice or out of order")
	}
	return fault.New(op, fault.Unavailable, "%d of %d messages were not echoed in time", p.count-min(p.count, doc.Echoed), p.count)
}

// exchange sends at the rate, and reads the counts until all is echoed, something is wrong, or the time is over.
func (p *prober) exchange(ctx context.Context, began time.Time) (*controlv1.GetProbeResponse, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	reported, end := began, began
	for sent := uint64(0); ; {
		due := min(p.count, uint64(time.Since(began).Seconds()*p.rate)+1)
		for sent < due {
			n := min(due-sent, maxProbe)
			if err := p.send(ctx, sent+1, n); err != nil {
				return nil, err
			}
			sent += n
			end = time.Now().Add(p.v.Timeout())
		}
		show := p.watch && time.Since(reported) >= time.Second
		if show || sent == p.count {
			m, err := p.counts(ctx)
			if err != nil {
				return nil, err
			}
			if show {
				reported = time.Now()
				p.a.Note("sent %d, echoed %d, doubled %d, out of order %d", m.GetSent(), m.GetEchoed(), m.GetDoubled(), m.GetOutOfOrder())
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
	_, err := client.Call(ctx, p.v, client.Node.Probe,
		&controlv1.ProbeRequest{RequestId: client.NewID(), Appliance: p.appliance, Id: p.id, First: first, Count: uint32(n)})
	return err
}

func (p *prober) counts(ctx context.Context) (*controlv1.GetProbeResponse, error) {
	return client.Call(ctx, p.v, client.Node.GetProbe, &controlv1.GetProbeRequest{Appliance: p.appliance, Id: p.id})
}
