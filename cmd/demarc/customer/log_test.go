// SPDX-License-Identifier: Apache-2.0

package customer

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	localv1 "github.com/demarc-dev/demarc/api/local/v1"
	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// quietAppliance has no entry from the one that is asked for on.
type quietAppliance struct {
	localv1connect.UnimplementedLocalHandler
}

func (quietAppliance) ListLog(context.Context, *connect.Request[localv1.ListLogRequest]) (*connect.Response[localv1.ListLogResponse],
	error) {
	return connect.NewResponse(&localv1.ListLogResponse{}), nil
}

// TestNoEntriesAreAList: a script that reads entries gets an empty list, and not null.
func TestNoEntriesAreAList(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(localv1connect.NewLocalHandler(quietAppliance{}))
	srv := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	var out bytes.Buffer
	code := cli.Run(t.Context(), []string{"local", "log", "--from", "99999", "-o", "json", "--socket", socket}, strings.NewReader(""), &out,
		&out,
		func(a *cli.App) []cli.Topic { return []cli.Topic{{ID: "customer", Commands: Commands(a)}} })
	if code != cli.ExitOK || strings.TrimSpace(out.String()) != "[]" {
		t.Errorf("exit code %d, %q", code, out.String())
	}
}
