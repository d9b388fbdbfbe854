// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
)

// TestAReleaseIsOnAMajority (FAULTS.md J7): publish answers when two of three voters have the artifacts on disk, whichever node is
// dead; where only one can have them, nothing is published and the answer says who lacks what. The node that took the upload may
// die at once after the answer.
func TestAReleaseIsOnAMajority(t *testing.T) {
	for name, x := range map[string]struct {
		down []string
		want fault.Kind
	}{
		"all are there": {nil, ""}, "one is dead": {[]string{"cp-3"}, ""}, "two are dead": {[]string{"cp-2", "cp-3"}, fault.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newDepots(t)
				w.set(func() {
					for _, n := range x.down {
						w.down[n] = true
					}
				})
				d := w.put(0, some(20_000, 1))
				began := time.Now()
				err := w.publish(0, "1.0.0", d)
				if fault.Of(err) != x.want {
					t.Fatalf("%v, want %q", err, x.want)
				}
				if took := time.Since(began); took > publishWait+time.Second {
					t.Errorf("it took %s", took)
				}
				if err != nil {
					if !strings.Contains(fault.Text(err), "1 of 3 voters") || !strings.Contains(fault.Text(err), "cp-3: connection refused") {
						t.Errorf("%v does not say who lacks it, and why", err)
					}
					if n := w.order.book.View().ReleaseCount(); n != 0 {
						t.Errorf("%d releases are published", n)
					}
					return
				}
				if n := w.holding(d); n < 2 {
					t.Fatalf("%d nodes hold it when publish answers", n)
				}
				w.set(func() { w.down = map[string]bool{"cp-1": true} })
				for i := 1; i < 3; i++ {
					if err := w.nodes[i].depot.bring(context.Background(), d); err != nil {
						t.Errorf("the upload's node is dead, and an appliance at %s gets: %v", w.nodes[i].replica.Node, err)
					}
				}
			})
		})
	}
}

// TestALostDiskIsRepaired (FAULTS.md J7): a node whose disk was replaced gets all that releases name, tells how much it lacks until
// then, and does not get what no release names.
func TestALostDiskIsRepaired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newDepots(t)
		var all []fleet.Digest
		for i := range byte(6) {
			all = append(all, w.put(int(i)%3, some(5000, i)))
			if err := w.publish(int(i)%3, fmt.Sprint("1.0.", i), all[i]); err != nil {
				t.Fatal(err)
			}
		}
		stray := w.put(0, some(3000, 99))
		soon(t, time.Minute, "each node has all", func() bool { return w.nodes[2].depot.missing.Load() == 0 && w.holding(all[5]) == 3 })
		w.set(func() { w.down["cp-1"], w.down["cp-2"] = true, true })
		w.lose(2)
		soon(t, time.Minute, "it says how many it lacks", func() bool { return w.nodes[2].depot.missing.Load() == 6 })
		w.set(func() { w.down["cp-2"] = false }) // one of them is enough
		soon(t, 2*missMost, "it has all again", func() bool { return w.nodes[2].depot.missing.Load() == 0 })
		for _, d := range all {
			if n := w.holding(d); n != 3 {
				t.Errorf("%d nodes hold %s", n, d.Short())
			}
		}
		if n := w.holding(stray); n != 1 {
			t.Errorf("%d nodes hold what no release names", n)
		}
	})
}

// TestOneFetchOfADigest (FAULTS.md J7, I5): many who ask for what is not here cause one fetch, and after one that failed the other
// nodes are not asked anew for each.
func TestOneFetchOfADigest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newDepots(t)
		ask := func(d fleet.Digest) (failed int) {
			var wg sync.WaitGroup
			var mu sync.Mutex
			for range 50 {
				wg.Go(func() {
					if err := w.nodes[0].depot.bring(context.Background(), d); err != nil {
						mu.Lock()
						defer mu.Unlock()
						failed++
					}
				})
			}
			wg.Wait()
			return failed
		}
		d := w.put(1, some(10_000, 1))
		if n := ask(d); n != 0 || w.calls["cp-2"] != 1 {
			t.Fatalf("50 who asked caused %d fetches, and %d failed", w.calls["cp-2"], n)
		}
		absent := fleet.DigestOf([]byte("absent"))
		w.calls = map[string]int{}
		for range 300 { // two a second
			if n := ask(absent); n != 50 {
				t.Fatalf("%d of 50 were told that it is not there", n)
			}
			time.Sleep(500 * time.Millisecond)
		}
		if n := w.calls["cp-2"]; n < 4 || n > 10 {
			t.Errorf("15,000 questions for what is nowhere asked another node %d times, want 4 to 10: after 1, 2, 4, ... and at most 60 s", n)
		}
		w.put(1, []byte("absent"))
		soon(t, missMost+time.Second, "it is found once it is there", func() bool { return w.nodes[0].depot.bring(context.Background(), absent) == nil })
	})
}

// TestAFetchGoesOnElsewhere (FAULTS.md J7): what breaks off is gone on with at another node; who hangs, lies or has rotten bytes
// costs a while, and never makes something else count for the artifact.
func TestAFetchGoesOnElsewhere(t *testing.T) {
	b := some(50_000, 3)
	for name, x := range map[string]struct {
		first func(w *depots)
		most  time.Duration
	}{
		"it dies in the middle": {func(w *depots) {
			n := 0
			w.spoil["cp-2"] = func([]byte) error {
				if n++; n > 25 {
					return fault.New("test", fault.Unavailable, "reset")
				}
				return nil
			}
		}, 5 * time.Second},
		"it hangs":           {func(w *depots) { w.hangs["cp-2"] = true }, fetchStall + 5*time.Second},
		"its disk is rotten": {func(w *depots) { w.spoil["cp-2"] = func(p []byte) error { p[0]++; return nil } }, 5 * time.Second},
		"rotten, and then dead": {func(w *depots) {
			n := 0
			w.spoil["cp-2"] = func(p []byte) error {
				p[0]++
				if n++; n > 25 {
					return fault.New("test", fault.Unavailable, "reset")
				}
				return nil
			}
		}, 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newDepots(t)
				d := w.put(1, b)
				w.put(2, b)
				x.first(w)
				began := time.Now()
				if err := w.nodes[0].depot.bring(context.Background(), d); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(began); took > x.most {
					t.Errorf("it took %s", took)
				}
				if n := w.holding(d); n != 3 {
					t.Errorf("%d nodes hold it", n)
				}
			})
		})
	}
}

// TestAFetchResumes: bytes that came do not come again.
func TestAFetchResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newDepots(t)
		d := w.put(1, some(50_000, 3))
		pieces := 0
		w.spoil["cp-2"] = func([]byte) error {
			if pieces++; pieces == 26 {
				return fault.New("test", fault.Unavailable, "reset")
			}
			return nil
		}
		if err := w.nodes[0].depot.bring(context.Background(), d); fault.Of(err) != fault.Unavailable {
			t.Fatal(err)
		}
		soon(t, time.Minute, "it is here", func() bool { return w.nodes[0].depot.bring(context.Background(), d) == nil })
		if pieces != 51 { // 50 and the one that was lost
			t.Errorf("%d pieces of 50 were sent", pieces)
		}
	})
}

// TestOrdersOfFaults (FAULTS.md J7) plays nodes that die, hang and lose their disk, one at a time, while releases are published at
// any of them: what publish answered is never lost, and at the end each node has all.
func TestOrdersOfFaults(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := rand.New(rand.NewPCG(seed, 1))
				w := newDepots(t)
				var out []fleet.Digest
				hurt := 0 // one node at a time may be
				for k := range 30 {
					i := r.IntN(3)
					name := w.nodes[hurt].replica.Node
					switch r.IntN(5) {
					case 0:
						w.set(func() { w.down, w.hangs = map[string]bool{}, map[string]bool{} })
						soon(t, 5*time.Minute, "all is repaired before the next one is hurt", func() bool {
							for _, d := range out {
								if w.holding(d) != 3 {
									return false
								}
							}
							return true
						})
						hurt = r.IntN(3)
					case 1:
						w.set(func() { w.down[name] = true })
					case 2:
						w.set(func() { w.hangs[name] = true })
					case 3:
						w.lose(hurt)
					}
					if w.nodes[i].replica.Node == name && (w.down[name] || w.hangs[name]) {
						continue // nobody reaches it to publish there
					}
					d := w.put(i, some(4000, byte(k)))
					if err := w.publish(i, fmt.Sprint("1.0.", k), d); err == nil {
						out = append(out, d)
					} else if fault.Of(err) != fault.Unavailable {
						t.Fatal(err)
					}
					for _, d := range out {
						if w.holding(d) == 0 {
							t.Fatalf("%s is lost", d.Short())
						}
					}
					time.Sleep(time.Duration(r.IntN(3000)) * time.Millisecond)
				}
				w.set(func() { w.down, w.hangs = map[string]bool{}, map[string]bool{} })
				for _, d := range out {
					soon(t, 5*time.Minute, "each node has all", func() bool { return w.holding(d) == 3 })
				}
				if len(out) < 8 {
					t.Fatalf("only %d of 30 were published", len(out))
				}
			})
		})
	}
}

// TestReplicationTellsHowFarItIs: who waits sees each node get further.
func TestReplicationTellsHowFarItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newDepots(t)
		w.set(func() { w.down["cp-3"] = true })
		d := w.put(0, some(700_000, 3)) // 7 s
		var seen []int64
		err := w.nodes[0].depot.replicate(context.Background(), d, func(m *controlv1.ReplicateArtifactResponse) error {
			for _, c := range m.GetCopies() {
				if c.GetNode() == "cp-2" {
					seen = append(seen, c.GetArrived())
				}
			}
			return nil
		})
		if err != nil || len(seen) < 5 || seen[0] != 0 || seen[len(seen)-1] != 700_000 {
			t.Fatalf("%v, %v", seen, err)
		}
	})
}
