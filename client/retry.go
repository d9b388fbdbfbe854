// SPDX-License-Identifier: Apache-2.0

package client

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// refusalRounds is in how many rounds one node refuses while the others can't be reached, before its refusal is the answer.
const refusalRounds = 3

// attempt tries nodes in turn, beginning with *at, in so many rounds with a backoff between them; with rounds 0, until the context ends.
// It leaves *at at the node that answered.
func attempt(ctx context.Context, nodes []string, at *int, rounds int, do func(node int) error) error {
	const op = "client.attempt"
	if len(nodes) == 0 {
		return fault.New(op, fault.Invalid, "there is no node to call")
	}
	began := time.Now()
	var last error
	refused := false // last is the answer of a node that was reached
	for round := 1; ; round++ {
		again := false // another round may help
		for range nodes {
			err := do(*at)
			if err == nil {
				return nil
			}
			if errors.Is(ctx.Err(), context.Canceled) {
				return fault.Because(ctx.Err(), op, fault.Unavailable, "interrupted")
			}
			retry := transient(err)
			if _, one := errors.AsType[nodeError](err); !retry && !one {
				return err
			}
			// An answer that may be lost goes before nodes that could not be reached afterwards, and what a node answered goes before
			// another one that is dead.
			if last == nil || ctx.Err() == nil && !errors.Is(last, fault.Unsure) && (!retry || !refused) {
				refused = !retry
				last = fault.Because(err, op, fault.Of(err), "node %s: %s", nodes[*at], fault.Text(err))
			}
			*at = (*at + 1) % len(nodes)
			again = again || retry
		}
		if !again || refused && round >= refusalRounds {
			return last
		}
		if round == rounds || !backoff(ctx, round) {
			return giveUp(last, time.Since(began))
		}
	}
}

// transient reports whether the next try may succeed, here or at another node.
func transient(err error) bool {
	return slices.Contains([]fault.Kind{fault.Unavailable, fault.NotLeader, fault.Unsure, fault.Busy}, fault.Of(err))
}

func giveUp(last error, after time.Duration) error {
	const op = "client.attempt"
	after = after.Round(time.Second / 10)
	if errors.Is(last, fault.Unsure) {
		return fault.Because(last, op, fault.Unsure,
			"it may have happened, and no node could say so within %s: look before you do it again (%s)", after, fault.Text(last))
	}
	return fault.Because(last, op, fault.Of(last), "no node of the control plane did it within %s: %s", after, fault.Text(last))
}

// backoff waits between rounds: twice as long each time, up to 2 s, with jitter. It returns false if the context ends first.
func backoff(ctx context.Context, round int) bool {
	most := min(100*time.Millisecond<<min(round, 5), 2*time.Second)
	t := time.NewTimer(most/2 + rand.N(most/2+1))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
