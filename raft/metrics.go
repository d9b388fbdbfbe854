// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"math"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/demarc-dev/demarc/fault"
)

// meters are what Prometheus may know of a node. They count whether or not they are registered.
type meters struct {
	proposals *prometheus.CounterVec
	packs     prometheus.Histogram
	writes    prometheus.Histogram
	all       []prometheus.Collector
}

func newMeters(n *Node) *meters {
	m := &meters{
		proposals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "demarc_raft_proposals_total",
			Help: "Proposals that were answered to callers on this node, by kind of fault; ok is none.",
		}, []string{"kind"}),
		packs: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "demarc_raft_pack_proposals",
			Help:    "Proposals in one entry, on the leader.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 9),
		}),
		writes: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "demarc_raft_write_seconds",
			Help:    "Time to write entries to the disk, or to sync what was written.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 10),
		}),
	}
	m.all = append(m.all, m.proposals, m.packs, m.writes)
	gauge := func(name, help string, read func() float64) {
		m.all = append(m.all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, read))
	}
	one := func(is bool) float64 {
		if is {
			return 1
		}
		return 0
	}
	gauge("demarc_raft_leader", "1 if this node leads.", func() float64 { return one(n.lib.leads()) })
	gauge("demarc_raft_leader_known", "1 if this node knows a leader.", func() float64 {
		_, ok := n.lib.leader()
		return one(ok)
	})
	gauge("demarc_raft_term", "Current term.", func() float64 { return float64(n.lib.term()) })
	gauge("demarc_raft_applied_index", "Index of the last entry that was applied.", func() float64 {
		return float64(n.lib.fsm.index.Load())
	})
	gauge("demarc_raft_last_index", "Index of the last entry in the log.", func() float64 { return float64(n.lib.raft.LastIndex()) })
	gauge("demarc_raft_reachable_members", "Members that the leader hears from, itself included; 0 on a follower.", func() float64 {
		return float64(n.State().Reachable)
	})
	gauge("demarc_raft_clock_ahead_seconds",
		"By how much this node's clock is ahead of what a majority of the voters' clocks says; NaN if that is not known.", func() float64 {
			if d, known := n.time.offset(n.cfg.Self.ID); known {
				return d.Seconds()
			}
			return math.NaN()
		})
	gauge("demarc_raft_disk_full", "1 while this node takes no changes because its disk is full.", func() float64 {
		return one(n.disk.full.Load())
	})
	gauge("demarc_raft_disk_hangs", "1 while a write to the disk takes too long.", func() float64 { return one(n.lib.hung.Load()) })
	return m
}

func (m *meters) answered(err error) {
	kind := "ok"
	if err != nil {
		kind = string(fault.Of(err))
	}
	m.proposals.WithLabelValues(kind).Inc()
}

func (m *meters) wrote(d time.Duration) { m.writes.Observe(d.Seconds()) }

func (m *meters) register(to prometheus.Registerer) error {
	if to == nil {
		return nil
	}
	for i, c := range m.all {
		if err := to.Register(c); err != nil {
			for _, c := range m.all[:i] {
				to.Unregister(c)
			}
			return fault.Because(err, "raft.Open", fault.Conflict,
				"the metrics of another node are registered here: give each node its own registry")
		}
	}
	return nil
}

func (m *meters) unregister(from prometheus.Registerer) {
	if from == nil {
		return
	}
	for _, c := range m.all {
		from.Unregister(c)
	}
}
