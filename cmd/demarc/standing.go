// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"time"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
)

// waiting says what waits for the customer, and which consent ends soon.
func waiting(w io.Writer, m *localv1.StatusResponse) {
	if x := m.GetWaits(); x != nil {
		fmt.Fprintf(w, "WAITS\trelease %s, since %s: %s\n\twhat helps\t%s\n", x.GetVersion(), time.Unix(x.GetSinceUnix(), 0).UTC().Format(time.RFC3339), x.GetWhy(), x.GetDo())
	}
	for _, e := range m.GetEndings() {
		fmt.Fprintf(w, "ends soon\t%s\tat %s; again with: %s\n", e.GetWhat(), time.Unix(e.GetAtUnix(), 0).UTC().Format(time.RFC3339), e.GetDo())
	}
}

// road says why a road does not work or not as it should, and what helps; of one that works, or was not tried, nothing.
func road(w io.Writer, what string, r *localv1.Road) {
	if r.GetReason() == "" {
		return
	}
	how := "does not work"
	if r.GetInUse() {
		how = "is in use, and not as it should be"
	}
	fmt.Fprintf(w, "%s\t%s %s (%s)\t%s\n", what, r.GetName(), how, r.GetReason(), r.GetSaid())
	fmt.Fprintf(w, "\twhat helps\t%s\n", r.GetDo())
}

// bookTime says that grants are judged by another time than this host's, while that is so.
func bookTime(w io.Writer, b *localv1.BookTime) {
	if b.GetAheadMs() > 0 {
		fmt.Fprintf(w, "book's time\t%s, %s ahead of this host's clock: grants and approvals are judged by it; %s\n", time.Unix(b.GetAtUnix(), 0).UTC().Format(time.RFC3339),
			(time.Duration(b.GetAheadMs()) * time.Millisecond).Round(time.Second), b.GetSaid())
	}
}

// clock says how the host's clock compares with the vendor's, and what to do where that is too much.
func clock(c *localv1.Clock) string {
	if c == nil {
		return "not compared with the vendor's yet: no node of the vendor's has answered"
	}
	apart := time.Duration(c.GetVendorAheadMs()) * time.Millisecond
	off := apart.Abs().Round(time.Second)
	way := "behind"
	if apart < 0 {
		way = "ahead of"
	}
	switch {
	case off <= 2*time.Second:
		return "agrees with the vendor's"
	case off.Milliseconds() <= c.GetTrustedMs():
		return fmt.Sprintf("%s %s the vendor's: within bounds", off, way)
	}
	return fmt.Sprintf("%s %s the vendor's: set this host's clock (is its NTP running?); until then certificates are judged by the vendor's, and windows and ends of grants by this host's", off, way)
}
