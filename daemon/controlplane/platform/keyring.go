// SPDX-License-Identifier: Apache-2.0

package platform

import (
	"context"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// Life of fetched keys.
const (
	fresh    = time.Hour        // so long they are used without asking
	stale    = 24 * time.Hour   // so long they are used where asking fails
	askAgain = 30 * time.Second // so long nobody is asked again, whatever failed and whatever key a token names
)

// keyring is the fetched keys of one issuer. One question is under way at a time; strangers can't make it more than one
// every 30 s.
type keyring struct {
	now   func() time.Time
	fetch func(context.Context) (identity.Keys, error)

	turn sync.Mutex // held while asking
	mu   sync.Mutex // of what follows, held for moments
	held held
}

type held struct {
	keys  identity.Keys
	got   time.Time // of keys; zero: none yet
	asked time.Time
	err   error // of the newest question
}

// good tells whether the keys may be used at all, and whether without asking.
func (h held) good(now time.Time, kid string) (usable, enough bool) {
	age := now.Sub(h.got)
	usable = !h.got.IsZero() && age < stale
	return usable, usable && age < fresh && h.keys.Has(kid)
}

func (k *keyring) read() held {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.held
}

// get gives keys that are fresh. A token that names an unknown key makes it ask once before that; tokens of known keys do
// not wait for the answer.
func (k *keyring) get(ctx context.Context, kid string) (identity.Keys, error) {
	now := k.now()
	h := k.read()
	if _, enough := h.good(now, kid); enough {
		return h.keys, nil
	}
	k.turn.Lock()
	defer k.turn.Unlock()
	h = k.read()
	usable, enough := h.good(now, kid)
	if !enough && (h.asked.IsZero() || now.Sub(h.asked) >= askAgain) {
		// Who asks may go away, and what is fetched is for all: the question has its own end.
		keys, err := k.fetch(context.WithoutCancel(ctx))
		h.asked, h.err = now, err
		if err == nil {
			h.keys, h.got, usable = keys, now, true
		}
		k.mu.Lock()
		k.held = h
		k.mu.Unlock()
	}
	if usable {
		return h.keys, nil
	}
	if h.err == nil {
		return identity.Keys{}, fault.New("platform.keys", fault.Unavailable, "the platform's keys are too old: try again in %s", askAgain)
	}
	return identity.Keys{}, h.err
}
