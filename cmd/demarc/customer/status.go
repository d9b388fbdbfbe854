// SPDX-License-Identifier: Apache-2.0

package customer

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
)

func statusCommand(a *cli.App) *cobra.Command {
	return a.Local(&cobra.Command{
		Use:   "status",
		Short: "Show the appliance: channel, application, secrets, pinned keys, log",
		Args:  cli.Exactly(0, "no arguments"),
	},
		func(ctx context.Context, l localv1connect.LocalClient, _ []string) error {
			m, err := client.Do(ctx, l.Status, &localv1.StatusRequest{})
			if err != nil {
				return err
			}
			return a.Emit(m, func(w io.Writer) {
				fmt.Fprintf(w, "appliance\t%s of %s, vendor %s\n", m.GetAppliance(), m.GetCustomer(), m.GetTrustDomain())
				if m.GetBookFailed() != "" {
					fmt.Fprintf(w, "BOOK\tsince %s %s\n", time.Unix(m.GetBookFailedUnix(), 0).UTC().Format(time.RFC3339), m.GetBookFailed())
				}
				fmt.Fprintf(w, "channel\tconnected %v, node %s by %s (of %s)\n", m.GetConnected(), m.GetNode(), m.GetRoute(),
					strings.Join(m.GetRoutes(), ", "))
				for _, r := range m.GetWays() {
					printTransport(w, "transport", r)
				}
				printTransport(w, "tailnet of doors", m.GetDoor())
				fmt.Fprintf(w, "clock\t%s\n", clockSentence(m.GetClock()))
				printBookTime(w, m.GetBookTime())
				fmt.Fprintf(w, "application\t%s %s\t%s\n", m.GetVersion(), m.GetState(), m.GetReason())
				printWaiting(w, m)
				for _, s := range m.GetServices() {
					fmt.Fprintf(w, "service\t%s\thealthy %v, restarts %d, pid %d\t%s\n", s.GetName(), s.GetHealthy(), s.GetRestarts(), s.GetPid(),
						s.GetReason())
				}
				for _, s := range m.GetSecrets() {
					fmt.Fprintf(w, "secret\t%s\tpresent %v\t%s\n", s.GetName(), s.GetPresent(), s.GetProblem())
				}
				for _, k := range m.GetPinned() {
					fmt.Fprintf(w, "pinned\t%s\n", k)
				}
				printEpoch(w, m.GetVendorEpoch())
				fmt.Fprintf(w, "audit log\t%d entries, root %.16s\n", m.GetAuditSize(), m.GetAuditRoot())
			})
		})
}

// printEpoch says that the vendor's book was set back, and what it lost.
func printEpoch(w io.Writer, e *localv1.VendorEpoch) {
	if e.GetMetUnix() > 0 {
		fmt.Fprintf(w, "vendor's book\tepoch %d (%s)\tmet %s\n", e.GetNumber(), e.GetCause(),
			time.Unix(e.GetMetUnix(), 0).UTC().Format(time.RFC3339))
	}
	for _, l := range e.GetLost() {
		fmt.Fprintf(w, "\tsince then\t%s\n", l)
	}
	if r := e.GetRefused(); r != "" {
		fmt.Fprintf(w, "vendor's book\tan epoch was refused\t%s\n", r)
	}
}

// printWaiting says what waits for the customer, and which consent ends soon.
func printWaiting(w io.Writer, m *localv1.StatusResponse) {
	if x := m.GetWaits(); x != nil {
		fmt.Fprintf(w, "WAITS\trelease %s, since %s: %s\n\twhat helps\t%s\n", x.GetVersion(),
			time.Unix(x.GetSinceUnix(), 0).UTC().Format(time.RFC3339), x.GetWhy(), x.GetDo())
	}
	for _, e := range m.GetEndings() {
		fmt.Fprintf(w, "ends soon\t%s\tat %s; again with: %s\n", e.GetWhat(), time.Unix(e.GetAtUnix(), 0).UTC().Format(time.RFC3339), e.GetDo())
	}
}

// printTransport says why a transport does not work or not as it should, and what helps; of one that works, or was not tried, nothing.
func printTransport(w io.Writer, what string, r *localv1.Road) {
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

// printBookTime says by which time grants are judged, while it is another one than this host's.
func printBookTime(w io.Writer, b *localv1.BookTime) {
	if b.GetAheadMs() > 0 {
		fmt.Fprintf(w, "book's time\t%s, %s ahead of this host's clock: grants and approvals are judged by it; %s\n",
			time.Unix(b.GetAtUnix(), 0).UTC().Format(time.RFC3339),
			(time.Duration(b.GetAheadMs()) * time.Millisecond).Round(time.Second), b.GetSaid())
	}
}

// clockSentence says how the host's clock compares with the vendor's, and what to do if that is too much.
func clockSentence(c *localv1.Clock) string {
	if c == nil {
		return "not compared with the vendor's yet: no node of the vendor's has answered"
	}
	apart := time.Duration(c.GetVendorAheadMs()) * time.Millisecond
	off := apart.Abs().Round(time.Second)
	side := "behind"
	if apart < 0 {
		side = "ahead of"
	}
	switch {
	case off <= 2*time.Second:
		return "agrees with the vendor's"
	case off.Milliseconds() <= c.GetTrustedMs():
		return fmt.Sprintf("%s %s the vendor's: within bounds", off, side)
	}
	return fmt.Sprintf("%s %s the vendor's: set this host's clock (is its NTP running?); until then certificates are judged by the "+
		"vendor's, and windows and ends of grants by this host's", off, side)
}
