// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/tls"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/daemon/controlplane/admission"
)

// stuck is an order that answers no proposal while it is on: that of a node which hears of no leader.
type stuck struct {
	*alone
	on atomic.Bool
}

func (o *stuck) Propose(ctx context.Context, data []byte) ([]byte, error) {
	if o.on.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return o.alone.Propose(ctx, data)
}

// TestADoorWaitsForAllThatItBegan (FAULTS.md H2): a door that stops while nobody orders changes ends what it began within its
// time, and leaves nothing behind: the bubble fails where a goroutine is left.
func TestADoorWaitsForAllThatItBegan(t *testing.T) {
	for name, begin := range map[string]func(t *testing.T, c *tls.Conn){
		"a coming is being put on record": func(t *testing.T, c *tls.Conn) {
			say(t, c, &boundaryv1.Up{Body: &boundaryv1.Up_Hello{Hello: &boundaryv1.Hello{Route: "https"}}})
		},
		"no hello has come": func(t *testing.T, c *tls.Conn) {
			if err := c.Handshake(); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, o := begun(t)
				held := &stuck{alone: o}
				s.replica.Consensus = held
				door, in, conf := atDoor(t, s)
				held.on.Store(true)
				stopped(t, door, func() {
					mine, theirs := net.Pipe()
					t.Cleanup(func() { mine.Close() })
					in.conns <- theirs
					begin(t, tls.Client(mine, conf))
				})
			})
		})
	}
	t.Run("a report is being taken", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, o := begun(t)
			held := &stuck{alone: o}
			s.replica.Consensus = held
			door, in, conf := atDoor(t, s)
			stopped(t, door, func() {
				mine, theirs := net.Pipe()
				t.Cleanup(func() { mine.Close() })
				in.conns <- theirs
				c := tls.Client(mine, conf)
				say(t, c, &boundaryv1.Up{Body: &boundaryv1.Up_Hello{Hello: &boundaryv1.Hello{Route: "https"}}})
				go func() { // the reader, until the end
					for {
						if channel.Read(c, &boundaryv1.Down{}, channel.MaxDown) != nil {
							return
						}
					}
				}()
				synctest.Wait()
				held.on.Store(true)
				say(t, c, &boundaryv1.Up{Body: &boundaryv1.Up_Report{Report: &boundaryv1.Report{Number: 1, Body: &boundaryv1.Report_Probe{Probe: &boundaryv1.ProbeReport{Id: "p"}}}}})
			})
		})
	})
}

func say(t *testing.T, c *tls.Conn, up *boundaryv1.Up) {
	t.Helper()
	if err := channel.Write(c, up, channel.MaxUp); err != nil {
		t.Error(err)
	}
}

// stopped runs a door, has something begin, and stops the door.
func stopped(t *testing.T, d *admission.Listener, begin func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx, func() {}) }()
	begin()
	synctest.Wait()
	began := time.Now()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > admission.StopWait+admitWait {
		t.Errorf("the door ended after %s", took)
	}
}
