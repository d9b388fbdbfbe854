// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/cmd/demarc/auditor"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/cmd/demarc/cluster"
	"github.com/demarc-dev/demarc/cmd/demarc/customer"
	"github.com/demarc-dev/demarc/cmd/demarc/operator"
	"github.com/demarc-dev/demarc/cmd/demarc/setup"
	"github.com/demarc-dev/demarc/cmd/demarc/vendor"
)

// run runs one command line and returns its exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	return cli.Run(ctx, args, in, out, errs, topics)
}

// topics puts the groups of commands together.
func topics(a *cli.App) []cli.Topic {
	return []cli.Topic{
		{ID: "vendor", Title: "The vendor's operator types:", Commands: slices.Concat(
			[]*cobra.Command{controlPlane(a), cluster.CACommand(a), operator.Command(a), setup.MeshCommand(a)}, vendor.Commands(a))},
		{ID: "customer", Title: "The customer types:", Commands: customer.Commands(a)},
		{ID: "anyone", Title: "Anyone types:", Commands: []*cobra.Command{auditor.VerifyCommand(a), setup.PlatformCommand(a)}},
	}
}

// controlPlane is demarc control-plane, whose commands are in three rooms.
func controlPlane(a *cli.App) *cobra.Command {
	return cli.Group("control-plane", "The vendor's control plane", slices.Concat(
		[]*cobra.Command{setup.InitCommand(a), setup.AddCommand(a), setup.CertifyCommand(a), operator.RecoverCommand(a)},
		cluster.Commands(a))...)
}
