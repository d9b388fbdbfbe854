// SPDX-License-Identifier: Apache-2.0

// Demarc is the people's command: vendor operators, customers and auditors.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/demarc-dev/demarc/cmd/demarc/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
