// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"

	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/daemon/controlplane/limit"
	"github.com/demarc-dev/demarc/daemon/controlplane/refusal"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/workload/artifact"
)

// Bounds of how a node brings artifacts here from the others.
const (
	fetchesMax = 4                // at once; what is more waits
	fetchStall = 15 * time.Second // without a byte, before another node is asked
	missFirst  = time.Second      // after a fetch that failed, before nodes are asked anew; it doubles
	missMost   = time.Minute      // as far as this
	missesMax  = 4096             // failed fetches that are remembered
	sickFor    = 30 * time.Second // for which a node that failed is asked after the others

	collectEvery = time.Hour
	collectAge   = 7 * 24 * time.Hour // for which what no release names is kept: an upload precedes its release
)

// Remote is another node, as one that keeps artifacts. Its methods may be called concurrently. Errors are faults:
// [fault.NotFound] means that it does not have the artifact.
type Remote interface {
	// Fetch streams an artifact from an offset in bytes: how many it has in all, and the next piece of it. An error of give ends it.
	Fetch(ctx context.Context, d fleet.Digest, offset int64, give func(total int64, piece []byte) error) error
	// Hold has the node take the artifact from one of those that are named, and tells how many bytes have arrived. It returns nil
	// once the artifact is on the node's disk.
	Hold(ctx context.Context, d fleet.Digest, from []string, told func(arrived int64)) error
}

// depot is the artifacts of this node. What the book's releases name and is not here is brought here from any node that has it, one
// fetch at a time for each digest.
type depot struct {
	s     *Server
	store *artifact.Store
	reach func(book.Member) Remote // nil: there are no other nodes

	life    context.Context // of fetches: they go on when who asked for them gives up
	end     context.CancelFunc
	wg      sync.WaitGroup
	flights singleflight.Group
	places  chan struct{}
	named   catalog
	missing atomic.Int64 // that releases name and that are not here; -1 while that is not known

	mu     sync.Mutex // guards what follows, and that no fetch begins after the end
	misses map[fleet.Digest]miss
	sick   map[string]time.Time // until when
}

// miss is a fetch that failed.
type miss struct {
	err   error
	wait  time.Duration
	until time.Time
}

func newDepot(s *Server, store *artifact.Store) *depot {
	life, end := context.WithCancel(context.Background())
	d := &depot{s: s, store: store, life: life, end: end, places: make(chan struct{}, fetchesMax), misses: map[fleet.Digest]miss{}, sick: map[string]time.Time{}}
	d.missing.Store(-1)
	return d
}

// local is trouble of this node, and not of the one that was asked.
type local struct{ error }

// Unwrap gives the trouble.
func (l local) Unwrap() error { return l.error }

// bring brings an artifact here, unless it is here. Where fetching it failed a moment ago the nodes are not asked anew. The fetch
// goes on when ctx ends.
func (d *depot) bring(ctx context.Context, x fleet.Digest) error {
	const op = "controlplane.fetch"
	if d.store.Durable(x) {
		return nil
	}
	if m, ok := d.missed(x); ok {
		return m
	}
	select {
	case r := <-d.fly(x, nil):
		return r.Err
	case <-ctx.Done():
		return fault.Because(ctx.Err(), op, fault.Unavailable, "artifact %s is still on its way to this node: try again in a moment", x.Short())
	}
}

// hold brings an artifact here, from those that are named before all others, and tells about once a second how much has arrived. It
// returns nil once the artifact is on the disk.
func (d *depot) hold(ctx context.Context, x fleet.Digest, from []string, told func(arrived int64) error) error {
	const op = "controlplane.Hold"
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var flight <-chan singleflight.Result
	for !d.store.Durable(x) {
		if flight == nil {
			flight = d.fly(x, from)
		}
		select {
		case r := <-flight:
			if r.Err != nil && fault.Of(r.Err) != fault.Busy { // busy: an upload of it is under way here
				return r.Err
			}
			if flight = nil; r.Err == nil {
				continue
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		case <-tick.C:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			return fault.Because(ctx.Err(), op, fault.Unavailable, "artifact %s is still on its way to this node", x.Short())
		}
		if err := told(d.store.Arrived(x)); err != nil {
			return err
		}
	}
	return nil
}

// fly begins to fetch an artifact, or joins the fetch that is under way.
func (d *depot) fly(x fleet.Digest, from []string) <-chan singleflight.Result {
	return d.flights.DoChan(string(x), func() (any, error) {
		if !d.begin() {
			return nil, admission.ErrStops
		}
		defer d.wg.Done()
		return nil, d.fetch(d.life, x, from)
	})
}

// begin counts a fetch, unless the depot has ended.
func (d *depot) begin() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.life.Err() != nil {
		return false
	}
	d.wg.Add(1)
	return true
}

// fetch asks one node after another.
func (d *depot) fetch(ctx context.Context, x fleet.Digest, from []string) error {
	const op = "controlplane.fetch"
	select {
	case d.places <- struct{}{}:
		defer func() { <-d.places }()
	case <-ctx.Done():
		return admission.ErrStops
	}
	var trouble []string
	for _, m := range d.order(from) {
		err := d.pull(ctx, m, x, false)
		if fault.Of(err) == fault.Invalid { // what had come from elsewhere before may be what is wrong
			err = d.pull(ctx, m, x, true)
		}
		var own local
		switch {
		case err == nil:
			d.forget(x)
			d.s.log.Info("artifact fetched", "digest", x.Short(), "from", m.Name)
			return nil
		case ctx.Err() != nil:
			return admission.ErrStops
		case errors.As(err, &own):
			return d.miss(x, own.error)
		case fault.Of(err) != fault.NotFound:
			d.sicken(m.Name)
			trouble = append(trouble, fmt.Sprintf("node %s: %s", m.Name, fault.Text(err)))
		}
	}
	if len(trouble) > 0 {
		return d.miss(x, fault.New(op, fault.Unavailable, "artifact %s is on no node that answers (%s)", x.Short(), strings.Join(trouble, "; ")))
	}
	return d.miss(x, fault.New(op, fault.NotFound, "artifact %s is on no node", x.Short()))
}

// pull fetches an artifact from one node, going on where an earlier try ended unless it is to begin anew.
func (d *depot) pull(ctx context.Context, m book.Member, x fleet.Digest, anew bool) error {
	const op = "controlplane.fetch"
	p, err := d.store.Begin(x)
	if err != nil {
		return local{err}
	}
	defer p.Close()
	if p.Done() {
		return nil
	}
	if anew {
		if err := p.Restart(); err != nil {
			return local{err}
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stalled := time.AfterFunc(fetchStall, cancel)
	defer stalled.Stop()
	err = d.reach(m).Fetch(ctx, x, p.Offset(), func(total int64, piece []byte) error {
		stalled.Reset(fetchStall)
		if size := p.Offset() + int64(len(piece)); total > artifact.MaxArtifact || size > total {
			return fault.New(op, fault.Invalid, "it sends %d bytes of an artifact of %d, and %d is the most", size, total, artifact.MaxArtifact)
		}
		if _, err := p.Write(piece); err != nil {
			return local{err}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := p.Commit(); err != nil && fault.Of(err) != fault.Invalid {
		return local{err}
	} else if err != nil {
		return err
	}
	return nil
}

// order lists the other nodes: those that are named first, those that failed a moment ago last.
func (d *depot) order(from []string) []book.Member {
	if d.reach == nil {
		return nil
	}
	all := slices.DeleteFunc(slices.Clone(d.s.replica.Roster()), func(m book.Member) bool { return m.Name == d.s.replica.Node || m.API == "" })
	d.mu.Lock()
	defer d.mu.Unlock()
	rank := func(m book.Member) int {
		switch {
		case slices.Contains(from, m.Name):
			return 0
		case time.Now().Before(d.sick[m.Name]):
			return 2
		}
		return 1
	}
	slices.SortStableFunc(all, func(a, b book.Member) int { return cmp.Compare(rank(a), rank(b)) })
	return all
}

func (d *depot) sicken(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	maps.DeleteFunc(d.sick, func(_ string, until time.Time) bool { return time.Now().After(until) })
	d.sick[name] = time.Now().Add(sickFor)
}

// miss remembers why a fetch failed, and returns it.
func (d *depot) miss(x fleet.Digest, err error) error {
	if fault.Of(err) == fault.Busy { // it is being uploaded
		return err
	}
	now := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	wait := min(max(2*d.misses[x].wait, missFirst), missMost)
	if len(d.misses) >= missesMax {
		maps.DeleteFunc(d.misses, func(_ fleet.Digest, m miss) bool { return now.After(m.until) })
		for old := range d.misses { // any one: it is asked for once more
			if len(d.misses) < missesMax {
				break
			}
			delete(d.misses, old)
		}
	}
	d.misses[x] = miss{err, wait, now.Add(wait)}
	return err
}

func (d *depot) missed(x fleet.Digest) (error, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, ok := d.misses[x]
	return m.err, ok && time.Now().Before(m.until)
}

func (d *depot) forget(x fleet.Digest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.misses, x)
}

// run keeps here what the book's releases name, until ctx ends: after a loss, and after each release. It waits for the fetches.
func (d *depot) run(ctx context.Context, ready func()) error {
	defer func() {
		d.end()
		d.mu.Lock() // nothing begins after this
		d.mu.Unlock()
		d.wg.Wait()
	}()
	ready()
	collect := time.NewTicker(collectEvery)
	defer collect.Stop()
	for ctx.Err() == nil {
		page := d.s.replica.View()
		retry := time.NewTimer(d.repair(ctx, page))
		for same := true; same && ctx.Err() == nil; {
			changed := d.s.replica.Changed()
			if d.s.replica.View().ReleasesVersion() != page.ReleasesVersion() {
				break
			}
			select {
			case <-ctx.Done():
			case <-changed:
			case <-retry.C:
				same = false
			case <-collect.C:
				d.collect()
			}
		}
		retry.Stop()
	}
	return nil
}

// repair fetches what releases name and is not here, and tells when to look again.
func (d *depot) repair(ctx context.Context, page book.State) time.Duration {
	var lacks []fleet.Digest
	for x := range d.named.of(page) {
		if !d.store.Durable(x) {
			lacks = append(lacks, x)
		}
	}
	d.missing.Store(int64(len(lacks)))
	if len(lacks) == 0 {
		return collectEvery
	}
	var g errgroup.Group
	g.SetLimit(fetchesMax)
	for _, x := range lacks {
		g.Go(func() error {
			err := d.bring(ctx, x)
			if err == nil {
				d.missing.Add(-1)
			}
			return err
		})
	}
	if err := g.Wait(); err == nil || ctx.Err() != nil {
		return collectEvery
	} else if d.grumbles() {
		d.s.log.Warn("this node lacks artifacts that releases name", "missing", d.missing.Load(), "err", err)
	}
	return missFirst
}

// grumbles reports whether it is time to log once more that artifacts are missing.
func (d *depot) grumbles() bool {
	now, _ := d.s.refusals.Allow(refusal.Caller{Key: "artifacts", Rate: ofMissing})
	return now
}

// ofMissing is lines about artifacts that can't be had.
var ofMissing = limit.Rate{PerSecond: 1. / 60, Burst: 1}

// collect removes what no release names and nobody has wanted for long.
func (d *depot) collect() {
	named := d.named.of(d.s.replica.View())
	n, err := d.store.Collect(func(x fleet.Digest) bool { return len(named[x]) > 0 }, time.Now().Add(-collectAge))
	if err != nil {
		d.s.log.Warn("artifacts that no release names were not removed", "err", err)
	}
	if n > 0 {
		d.s.log.Info("files of artifacts that no release names were removed", "files", n)
	}
}
