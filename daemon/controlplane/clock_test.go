// SPDX-License-Identifier: Apache-2.0

package controlplane_test

import (
	"strings"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
)

// judging lets in the stamps of one moment.
type judging struct {
	voting
	at time.Time
}

func (j judging) Judge(at time.Time) error {
	if at.Equal(j.at) {
		return nil
	}
	return fault.New("test", fault.Unavailable, "stamped at %s", at.UTC().Format(time.RFC3339Nano))
}

// The gate gives the stamp of each proposal to the judgement of the clocks, however it is spelled.
func TestTheGateJudgesStamps(t *testing.T) {
	o := newBook(t)
	rehearse := func(at time.Time, data string) error {
		return book.Gate{Book: o.book, Cluster: func() book.Voting { return judging{at: at} }}.DryRun([]byte(data))
	}
	own := string(proposal(t, "x", book.RegisterCustomer{Name: "initech"}))
	body := `"body":{"name":"initech"}`
	for name, data := range map[string]string{
		"as it is written": own,
		"spaces":           `{"kind": "customer.register/1", "meta":{"at":"` + start.Format(time.RFC3339Nano) + `","by":"t","request":"r"},` + body + `}`,
		"another order":    `{"meta":{"by":"t","request":"r","at":"` + start.Format(time.RFC3339Nano) + `"},"kind":"customer.register/1",` + body + `}`,
		"by comes first":   `{"kind":"customer.register/1","meta":{"by":"\"meta\":{\"at\":\"2030-01-01T00:00:00Z\"","at":"` + start.Format(time.RFC3339Nano) + `","request":"r"},` + body + `}`,
		"a body before":    `{"kind":"customer.register/1","body":{"name":"initech"},"meta":{"at":"` + start.Format(time.RFC3339Nano) + `","by":"t","request":"r"}}`,
	} {
		if err := rehearse(start, data); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		err := rehearse(start.Add(time.Hour), data)
		if fault.Of(err) != fault.Unavailable || !strings.Contains(fault.Text(err), start.UTC().Format(time.RFC3339Nano)) {
			t.Errorf("%s: %v, want it refused", name, err)
		}
	}
}
