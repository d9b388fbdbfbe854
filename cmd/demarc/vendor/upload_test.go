// SPDX-License-Identifier: Apache-2.0

package vendor

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/client/clienttest"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, src identity.Source, nodes ...string) *client.Client {
	t.Helper()
	o := client.Operator{TrustDomain: clienttest.TrustDomain, Nodes: nodes}
	c := client.New(o, src, client.Options{Timeout: 20 * time.Second})
	t.Cleanup(c.Close)
	return c
}

func TestUploadFindsANode(t *testing.T) {
	v := clienttest.NewVendor(t)
	body := bytes.Repeat([]byte("0123456789abcdef"), 100_000) // some chunks, and a rest
	d := fleet.DigestOf(body)
	file := filepath.Join(t.TempDir(), "artifact")
	if err := os.WriteFile(file, body, 0o600); err != nil {
		t.Fatal(err)
	}
	f := clienttest.NewNode()
	c := open(t, v.Source(fleet.Operator, "ann"), clienttest.Nobody(t), v.Serve(f, v.Source(fleet.Node, "cp-1")))
	var printed bytes.Buffer
	a := &cli.App{Errs: &printed}
	if err := upload(context.Background(), a, c, "store", file, d); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f.Artifact(string(d)), body) {
		t.Errorf("the node got %d bytes, want %d", len(f.Artifact(string(d))), len(body))
	}
	if !strings.Contains(printed.String(), "store: 1600000 bytes") {
		t.Errorf("printed %q", printed.String())
	}
	err := upload(context.Background(), a, open(t, v.Source(fleet.Operator, "ann"), clienttest.Nobody(t)), "store", file, d)
	if !errors.Is(err, fault.Unavailable) {
		t.Errorf("nobody there: %v", err)
	}
}
