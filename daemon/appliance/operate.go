// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"sync"
	"time"

	"filippo.io/age"

	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/operation"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/workload"
)

// maxPlain bounds an operation's output in clear: encrypted it must fit in MaxOutput.
const maxPlain = 3 << 20

// runner holds the operations that run now.
type runner struct {
	mu   sync.Mutex
	live map[string]*execution
	wg   sync.WaitGroup
}

// execution is one operation that runs.
type execution struct {
	cancel context.CancelFunc
	ended  chan struct{} // closed when its processes are gone
}

// kill ends operations and returns when their processes are gone.
func (r *runner) kill(ids []string) {
	var gone []chan struct{}
	r.mu.Lock()
	for _, id := range ids {
		if l := r.live[id]; l != nil {
			l.cancel()
			gone = append(gone, l.ended)
		}
	}
	r.mu.Unlock()
	for _, ch := range gone {
		<-ch
	}
}

// operate starts what was approved, kills what was cancelled, and expires what waited too long.
func (a *Appliance) operate(ctx context.Context, ready func()) error {
	for _, o := range a.book.View().Operations() {
		if o.State == operation.Running { // of an earlier process: its own processes are gone
			a.running.wg.Go(func() {
				if err := a.finish(ctx, o, workload.ExecResult{}, ending{failed: book.Grounds{Why: fleet.Reason{Kind: fleet.Restarted},
					Sentence: "the appliance was started anew while it ran"}}); a.book.Reportable(ctx, err) {
					a.log.Error("the end of an operation is not on record", "id", o.ID, "err", err)
				}
			})
		}
	}
	ready()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	defer a.running.wg.Wait()
	for ctx.Err() == nil {
		changed := a.book.Changed()
		for _, o := range a.book.View().Operations() {
			if err := a.step(ctx, o); a.book.Reportable(ctx, err) {
				a.log.Error("an operation can't go on", "id", o.ID, "err", err)
			}
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-tick.C:
		}
	}
	return nil
}

func (a *Appliance) step(ctx context.Context, o book.Operation) error {
	switch o.State {
	case operation.Cancelled:
		a.running.mu.Lock()
		if l := a.running.live[o.ID]; l != nil {
			l.cancel()
		}
		a.running.mu.Unlock()
	case operation.Requested:
		r, err := seal.Peek[operation.Request](o.Request)
		if err != nil {
			return err
		}
		if !a.book.Now().Before(r.NotAfter) {
			_, err = book.Attempt(ctx, a.book, book.Expire{ID: o.ID})
		}
		return err
	case operation.Approved:
		state, err := book.Attempt(ctx, a.book, book.Start{ID: o.ID})
		if err != nil || state != operation.Running {
			return err
		}
		a.begin(ctx, o.ID)
	}
	return nil
}

// begin runs an operation whose use was counted.
func (a *Appliance) begin(all context.Context, id string) {
	ctx, cancel := context.WithCancel(all)
	l := &execution{cancel: cancel, ended: make(chan struct{})}
	a.running.mu.Lock()
	a.running.live[id] = l
	a.running.mu.Unlock()
	a.running.wg.Go(func() {
		defer func() {
			a.running.mu.Lock()
			delete(a.running.live, id)
			a.running.mu.Unlock()
			cancel()
		}()
		o, err := a.book.View().Operation(id)
		if err == nil {
			err = a.exec(ctx, all, o, l)
		}
		if err != nil {
			a.log.Error("the result of an operation is not on record", "id", id, "err", err)
		}
	})
}

// exec runs an operation until ctx ends, and puts its result on record before all does.
func (a *Appliance) exec(ctx, all context.Context, o book.Operation, l *execution) error {
	ended := sync.OnceFunc(func() { close(l.ended) })
	defer ended()
	r, err := seal.Peek[operation.Request](o.Request)
	if err != nil {
		return err
	}
	t, err := a.book.View().Template(r)
	var res workload.ExecResult
	// The act is registered by now: a revocation that came earlier is seen here, a later one finds it.
	if o.State != operation.Running {
		err = fleet.Reason{Kind: fleet.ConsentRevoked}.With(fault.New("appliance.exec", fault.Denied, "the consent was revoked before it began"))
	}
	ctx, stop := a.while(ctx, []string{o.Grant}, func(now time.Time) error { return a.book.View().Lapsed(o.Grant, now) })
	defer stop()
	if err == nil {
		res, err = a.run.Exec(ctx, t.Service, o.Argv, workload.Limits{Timeout: t.Limit(), Output: min(t.Output, maxPlain),
			Network:     t.Effects.Network,
			Credentials: t.Effects.Credentials, Writes: t.Effects.Writes})
	}
	ended()
	var end ending
	switch cause := context.Cause(ctx); {
	case fault.Of(cause) == fault.Expired && (err != nil || res.Killed):
		end.lapsed = book.GroundsOf(cause)
	case err != nil:
		end.failed = book.GroundsOf(err)
	case res.TimedOut:
		end.failed = book.Grounds{Why: fleet.Reason{Kind: fleet.TimedOut}, Sentence: "its time was up: it was killed"}
	case res.Killed:
		end.failed = book.Grounds{Why: fleet.Reason{Kind: fleet.WasKilled}, Sentence: "it was killed"}
	}
	return a.finish(all, o, res, end)
}

// ending is why an operation did not come to its own end: it failed, or its grant lapsed.
type ending struct{ failed, lapsed book.Grounds }

// finish signs the result of an operation that came to its end, failed, or was killed because its grant lapsed, encrypts the
// output to the customer, and puts both into the book, as soon as its disk takes them.
func (a *Appliance) finish(ctx context.Context, o book.Operation, res workload.ExecResult, end ending) error {
	began := o.Started.UTC()
	now := a.now().UTC()
	if now.Before(began) {
		now = began // the clock was set back while it ran
	}
	state := operation.Held
	why := end.failed.Why
	if end.failed.Sentence != "" {
		state = operation.Failed
	}
	if end.lapsed.Sentence != "" {
		state, why = operation.Cancelled, end.lapsed.Why
	}
	if cur, err := a.book.View().Operation(o.ID); err == nil && cur.State == operation.Cancelled {
		state = operation.Cancelled
	}
	r := operation.Result{ID: o.ID, Appliance: a.book.View().Appliance, Request: fleet.DigestOf(o.Request),
		Approval: fleet.DigestOf(o.Approval),
		Argv:     o.Argv, State: state, Exit: res.Exit, Signal: res.Signal, Reason: why.Kind, Started: began, Ended: now}
	sealed, hidden, kept, err := a.result(r, res)
	if err != nil {
		return err
	}
	if kept != nil {
		end.failed = book.Grounds{Why: fleet.Reason{Kind: fleet.OutputNotKept}, Sentence: fault.Text(kept)}
		why = end.failed.Why
	}
	_, err = book.Persist(ctx, a.book, book.Finish{ID: o.ID, Result: sealed, Output: hidden, Failed: end.failed.Sentence,
		Lapsed: end.lapsed.Sentence, Why: a.names(a.book.View()).reason(why)})
	return err
}

// result seals what the vendor learns of a run before the customer has looked at its output, which is nothing but commitments
// to it, and encrypts a held output with its salts to the customer. An output that can't be encrypted makes it a failure: kept says why.
func (a *Appliance) result(r operation.Result, res workload.ExecResult) (sealed, hidden []byte, kept, err error) {
	out := operation.Output{Stdout: res.Stdout, Stderr: res.Stderr, Truncated: res.Truncated}
	_, _ = rand.Read(out.StdoutSalt[:]) // crypto/rand.Read never fails
	_, _ = rand.Read(out.StderrSalt[:])
	if r.State == operation.Held {
		if hidden, kept = a.encrypt(out.Encode()); kept != nil {
			r.State, r.Reason = operation.Failed, fleet.OutputNotKept
		}
	}
	r.Stdout, r.Stderr = out.Commitments()
	sealed, err = seal.Seal(r, a.signer)
	return sealed, hidden, kept, err
}

// encrypt hides an output from everybody but the customer.
func (a *Appliance) encrypt(plain []byte) ([]byte, error) {
	const op = "appliance.encrypt"
	var to []age.Recipient
	for _, p := range a.book.View().Pinned {
		if p.Recipient == "" {
			continue
		}
		r, err := age.ParseX25519Recipient(p.Recipient)
		if err != nil {
			return nil, fault.At(op, fault.Internal, err)
		}
		to = append(to, r)
	}
	if len(to) == 0 {
		return nil, fault.New(op, fault.Invalid, "no pinned key has a recipient for output: pin one that demarc key create made")
	}
	var b bytes.Buffer
	w, err := age.Encrypt(&b, to...)
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	if _, err := io.Copy(w, bytes.NewReader(plain)); err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	if err := w.Close(); err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	return b.Bytes(), nil
}
