// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/daemon/appliance"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/management"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft"
	"github.com/demarc-dev/demarc/telemetry"
)

// Exit codes, the same as those of demarc.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
	exitGone   = 4 // this node was removed for good: the systemd unit does not start it again (RestartPreventExitStatus)
)

// errUsage marks what the caller wrote wrongly.
var errUsage = errors.New("usage")

// run carries out one command line.
func run(ctx context.Context, args []string, out, errs io.Writer) int {
	root := command(out, errs)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	fmt.Fprintf(errs, "demarcd: %v\n", err) // this is the operator's own machine: the cause is printed too
	return exitOf(err)
}

// exitOf is the exit code of an error.
func exitOf(err error) int {
	switch {
	case errors.Is(err, errUsage):
		return exitUsage
	case errors.Is(err, raft.ErrRemoved):
		return exitGone
	}
	return exitFailed
}

func command(out, errs io.Writer) *cobra.Command {
	root := &cobra.Command{
		Use:   "demarcd",
		Short: "The daemon of demarc: a node of a control plane, an appliance, or a management plane, by its file",
		Long: "demarcd runs one role, which its file names: control-plane, appliance or management-plane.\n" +
			"Annotated examples of the files are in the folder configs of the source.",
		Example:       "  demarcd check -c appliance.yaml\n  demarcd run -c appliance.yaml",
		SilenceErrors: true, SilenceUsage: true,
		Version: build(),
	}
	root.SetOut(out)
	root.SetErr(errs)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return fmt.Errorf("%w: %w (see %s --help)", errUsage, err, c.CommandPath())
	})
	root.AddCommand(runCommand(errs), checkCommand(out))
	return root
}

func file(c *cobra.Command) *string {
	path := c.Flags().StringP("config", "c", "", "the file of this daemon")
	for _, key := range configs.Keys() {
		c.Flags().String(key, "", "goes before "+key+" of the file and of the environment")
	}
	_ = c.MarkFlagFilename("config", "yaml", "yml")
	return path
}

func load(path string, flags *pflag.FlagSet) (configs.Config, error) {
	if path == "" {
		return nil, fmt.Errorf("%w: name the file with -c FILE", errUsage)
	}
	return configs.Load(path, flags)
}

func runCommand(errs io.Writer) *cobra.Command {
	c := &cobra.Command{Use: "run", Short: "Run the role of a file until SIGINT or SIGTERM",
		Example: "  demarcd run -c control-plane.yaml --log-format json", Args: noArgs}
	path := file(c)
	level := c.Flags().String("log-level", "info", "debug, info, warn or error")
	format := c.Flags().String("log-format", "text", "text or json")
	c.RunE = func(c *cobra.Command, _ []string) error {
		var l slog.Level
		if err := l.UnmarshalText([]byte(*level)); err != nil {
			return fmt.Errorf("%w: --log-level %q: use debug, info, warn or error", errUsage, *level)
		}
		if *format != "text" && *format != "json" {
			return fmt.Errorf("%w: --log-format %q: use text or json", errUsage, *format)
		}
		cfg, err := load(*path, c.Flags())
		if err != nil {
			return err
		}
		log := telemetry.NewLogger(errs, l, *format)
		daemon.Memory()
		parts, err := partsOf(c.Context(), cfg, log)
		if err != nil {
			return err
		}
		log.Info("demarcd runs", "build", build(), "file", *path)
		return daemon.Run(c.Context(), log, parts...)
	}
	return c
}

// partsOf makes the parts of the file's role.
func partsOf(ctx context.Context, cfg configs.Config, log *slog.Logger) ([]daemon.Part, error) {
	switch cfg := cfg.(type) {
	case *configs.Control:
		return controlplane.Parts(cfg, build(), log)
	case *configs.Appliance:
		return appliance.Parts(ctx, cfg, build(), log)
	case *configs.Management:
		return management.Parts(cfg, build(), log)
	}
	return nil, fault.New("demarcd.parts", fault.Internal, "a role without parts")
}

func checkCommand(out io.Writer) *cobra.Command {
	c := &cobra.Command{Use: "check", Short: "Check a file and the vendor's keys that an appliance's file names, and print the " +
		"configuration as it holds, without secrets", Example: "  demarcd check -c appliance.yaml", Args: noArgs}
	path := file(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, err := load(*path, c.Flags())
		if err != nil {
			return err
		}
		if c, ok := cfg.(*configs.Appliance); ok {
			if err := appliance.Check(c); err != nil {
				return err
			}
		}
		b, err := cfg.Effective()
		if err != nil {
			return err
		}
		_, err = out.Write(b)
		return err
	}
	return c
}

func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%w: %s takes no arguments", errUsage, c.CommandPath())
	}
	return nil
}

// build names this build, as the module system knows it.
func build() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	version := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && version == "(devel)" {
			version = s.Value[:min(12, len(s.Value))]
		}
	}
	if len(version) > 64 {
		version = version[:64]
	}
	return version
}
