// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
)

// Exit codes.
const (
	exitOK      = 0
	exitFailed  = 1
	exitUsage   = 2
	exitRefused = 3 // consent or verification says no
)

// errUsage marks what the caller wrote wrongly, errTold what the command has printed itself.
var (
	errUsage = errors.New("usage")
	errTold  = errors.New("told")
)

func usage(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errUsage, fmt.Sprintf(format, args...))
}

// app is one run of the command.
type app struct {
	in      io.Reader
	out     io.Writer
	errs    io.Writer
	output  string
	timeout time.Duration

	context string // operator's file
	socket  string // of the appliance, or of the management plane
}

// run carries out one command line and gives its exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	a := &app{in: in, out: out, errs: errs}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errs)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	if !errors.Is(err, errTold) {
		a.complain(err)
	}
	var breach audit.Breach
	switch {
	case errors.Is(err, errUsage):
		return exitUsage
	case errors.As(err, &breach), fault.Of(err) == fault.Denied:
		return exitRefused
	}
	return exitFailed
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "demarc",
		Short: "Deploy into your customers' environments without crossing the trust boundary",
		Long: "demarc is for three kinds of people.\n\n" +
			"  A vendor's operator speaks to the vendor's control plane, with the operator's file (--context).\n" +
			"  A customer speaks to the customer's own appliance, over its socket (--socket). The vendor can't call any of it.\n" +
			"  An auditor needs no connection: verify works with nothing but a bundle and pinned keys.\n\n" +
			"Exit codes: 0 done, 1 failed, 2 the command line is wrong, 3 refused by consent or by verification.",
		Example:       "  demarc appliance list --context operator.yaml\n  demarc posture set allowlist --allow 192.0.2.0/24\n  demarc verify evidence.json --pin acme.example/control-plane=vendor-log.pub",
		SilenceErrors: true, SilenceUsage: true, Version: build(), Args: known, RunE: helpless,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if a.output != "text" && a.output != "json" {
				return usage("--output %q: use text or json", a.output)
			}
			if a.timeout <= 0 {
				return usage("--timeout %s: use a time above zero", a.timeout)
			}
			return nil
		},
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usage("%v (see %s --help)", err, c.CommandPath()) })
	f := root.PersistentFlags()
	f.StringVarP(&a.output, "output", "o", "text", "text or json")
	f.DurationVar(&a.timeout, "timeout", 30*time.Second, "of a call, all its tries together")
	f.StringVar(&a.context, "context", os.Getenv("DEMARC_CONTEXT"), "the operator's file, by default $DEMARC_CONTEXT")
	f.StringVar(&a.socket, "socket", os.Getenv("DEMARC_SOCKET"), "the appliance's socket, by default $DEMARC_SOCKET")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	for _, g := range []struct {
		id, title string
		commands  []*cobra.Command
	}{
		{"vendor", "The vendor's operator types:", []*cobra.Command{a.controlPlane(), a.status(), a.customer(), a.appliance(), a.release(), a.operation(), a.probe(), a.ca(), a.operator(), a.mesh(), a.evidence(), a.management()}},
		{"customer", "The customer types:", append([]*cobra.Command{a.key(), a.secret(), a.local(), a.consent()}, a.customersVerbs()...)},
		{"anyone", "Anyone types:", []*cobra.Command{a.verify(), a.platform()}},
	} {
		root.AddGroup(&cobra.Group{ID: g.id, Title: g.title})
		for _, c := range g.commands {
			c.GroupID = g.id
			root.AddCommand(c)
		}
	}
	root.SetHelpCommandGroupID("anyone")
	root.SetCompletionCommandGroupID("anyone")
	return root
}

// group is a command that only holds others: by itself it is a mistake, and says what there is.
func group(use, short string, sub ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: known, RunE: helpless}
	c.AddCommand(sub...)
	return c
}

// known refuses a word that is no command.
func known(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage("%s has no command %q (see %s --help)", c.CommandPath(), args[0], c.CommandPath())
	}
	return nil
}

// helpless shows the help on standard error: what was asked for was not done.
func helpless(c *cobra.Command, _ []string) error {
	c.SetOut(c.ErrOrStderr())
	return errors.Join(usage("no command"), errTold, c.Help())
}

// exactly is cobra.ExactArgs with our exit code.
func exactly(n int, names string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != n {
			return usage("%s takes %s (see --help)", c.CommandPath(), names)
		}
		return nil
	}
}

// bounded gives the context of the command its time.
func (a *app) bounded(c *cobra.Command) (context.Context, context.CancelFunc) {
	return context.WithTimeout(c.Context(), a.timeout)
}

func build() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}
