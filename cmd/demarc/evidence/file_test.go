// SPDX-License-Identifier: Apache-2.0

package evidence_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/client/clienttest"
	"github.com/demarc-dev/demarc/cmd/demarc/evidence"
	"github.com/demarc-dev/demarc/fleet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestExportBeginsAgain(t *testing.T) {
	v := clienttest.NewVendor(t)
	addr := v.Serve(clienttest.NewNode().Cut(), v.Source(fleet.Node, "cp-1"))
	o := client.Operator{TrustDomain: clienttest.TrustDomain, Nodes: []string{addr}}
	c := client.New(o, v.Source(fleet.Operator, "ann"), client.Options{Timeout: 20 * time.Second})
	t.Cleanup(c.Close)
	var out bytes.Buffer
	times := 0
	err := c.Stream(context.Background(), func(ctx context.Context, rpc client.Node, alive func()) error {
		times++
		out.Reset()
		s, err := rpc.ExportEvidence(ctx, connect.NewRequest(&controlv1.ExportEvidenceRequest{}))
		if err != nil {
			return client.Fault(err)
		}
		return evidence.Receive(s, &out, alive)
	})
	if err != nil || out.String() != "one two" || times != 2 {
		t.Errorf("exported %q in %d tries: %v", out.String(), times, err)
	}
}
