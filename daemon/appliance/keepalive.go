// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"net"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/mesh"
)

// idleTolerance is what is known of how long each road bears silence. Where the kernels watch the whole path, beats may be rare;
// but no host sees a proxy that stands at the other end, or one that a network puts in the way unasked, and such a
// proxy may drop what is silent. Two channels in a row that broke off after more silence than [channel.KnownQuiet],
// with none between that lived through as much, make a road one of which nothing is known, until this program starts anew.
type idleTolerance struct {
	mu    sync.Mutex
	drops map[string]int // by the name of the road
}

// maxDrops is how many channels in a row a silence must have broken: one may be a node that was killed.
const maxDrops = 2

// tolerated tells how long the road bears silence, for hello.
func (q *idleTolerance) tolerated(road string, c net.Conn) time.Duration {
	if !mesh.Straight(c) {
		return channel.KnownQuiet
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.drops[road] >= maxDrops {
		return channel.KnownQuiet
	}
	return channel.MaxQuiet
}

// lasted notes that something was heard after a silence.
func (q *idleTolerance) lasted(road string, silent time.Duration) {
	if silent <= channel.KnownQuiet {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.drops, road)
}

// dropped notes that a channel broke off after a silence, without a word.
func (q *idleTolerance) dropped(road string, silent time.Duration) {
	if silent <= channel.KnownQuiet {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.drops == nil {
		q.drops = map[string]int{}
	}
	q.drops[road] = min(q.drops[road]+1, maxDrops)
}
