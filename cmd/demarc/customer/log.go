// SPDX-License-Identifier: Apache-2.0

package customer

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/cmd/demarc/evidence"
)

// maxEntries is how many entries of the log are shown at once.
const maxEntries = 1000

func logCommand(a *cli.App) *cobra.Command {
	var from int64
	c := a.Local(&cobra.Command{
		Use:   "log",
		Short: "Show the customer's own log: everything that the vendor asked and the appliance did",
		Args:  cli.Exactly(0, "no arguments"),
	},
		func(ctx context.Context, l localv1connect.LocalClient, _ []string) error {
			if from < 0 {
				return cli.Usage("--from %d: the first entry has the number 0", from)
			}
			m, err := client.Do(ctx, l.ListLog, &localv1.ListLogRequest{From: from, Limit: maxEntries})
			if err != nil {
				return err
			}
			raw := []json.RawMessage{} // an empty list, and never null
			for _, e := range m.GetEntries() {
				raw = append(raw, e)
			}
			return a.Emit(raw, func(w io.Writer) {
				for i, b := range m.GetEntries() {
					e, err := audit.ParseEntry(b)
					if err != nil {
						fmt.Fprintf(w, "%d\tcan't be read: %v\n", from+int64(i), err)
						continue
					}
					fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s %s\n", from+int64(i), e.At.Format(time.RFC3339), e.By, e.Kind, e.Fault, e.Detail)
				}
			})
		})
	c.Flags().Int64Var(&from, "from", 0, "number of the first entry")
	return c
}

func evidenceCommand(a *cli.App) *cobra.Command {
	var file string
	c := a.Local(&cobra.Command{
		Use:     "evidence",
		Short:   "Export the customer's log with its countersignatures",
		Args:    cli.Exactly(0, "no arguments"),
		Example: "  demarc local evidence --out customer.json",
	},
		func(ctx context.Context, l localv1connect.LocalClient, _ []string) error {
			return evidence.Save(a, file, func(restart func() io.Writer) error {
				s, err := l.ExportEvidence(ctx, connect.NewRequest(&localv1.ExportEvidenceRequest{}))
				if err != nil {
					return client.Fault(err)
				}
				return evidence.Receive(s, restart(), func() {})
			})
		})
	c.Flags().StringVar(&file, "out", "", "the file to write")
	return c
}
