// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"text/tabwriter"
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

// errUsage marks what the caller wrote wrongly.
var errUsage = errors.New("usage")

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
	fmt.Fprintf(errs, "demarc: %s\n", sentence(err))
	var breach audit.Breach
	switch {
	case errors.Is(err, errUsage):
		return exitUsage
	case errors.As(err, &breach), fault.Of(err) == fault.Denied:
		return exitRefused
	}
	return exitFailed
}

// sentence is what a person reads. The causes of an internal fault are shown too: this is the person's own machine.
func sentence(err error) string {
	text := fault.Text(err)
	if errors.Is(err, errUsage) || fault.Of(err) == fault.Internal || strings.HasPrefix(text, "the call failed") {
		return err.Error()
	}
	return string(fault.Of(err)) + ": " + text
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "demarc",
		Short: "Deploy into your customers' environments without crossing the trust boundary",
		Long: "demarc is for three kinds of people.\n\n" +
			"  Vendor    control-plane, status, customer, appliance, release, operation, probe, evidence\n" +
			"            speak to the vendor's control plane; they need the operator's file (--context).\n" +
			"  Customer  key, secret work on files; local, consent, grant, revoke, access, posture, transport, review, approve\n" +
			"            speak to the customer's own appliance over its socket (--socket). The vendor can't call any of it.\n" +
			"  Auditor   verify works offline, with nothing but a bundle and pinned keys.",
		Example:       "  demarc appliance list --context operator.yaml\n  demarc posture set allowlist --allow 192.0.2.0/24\n  demarc verify evidence.json --pin acme.example/control-plane=vendor-log.pub",
		SilenceErrors: true, SilenceUsage: true, Version: build(),
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if a.output != "text" && a.output != "json" {
				return usage("--output %q: use text or json", a.output)
			}
			return nil
		},
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usage("%v (see %s --help)", err, c.CommandPath()) })
	f := root.PersistentFlags()
	f.StringVarP(&a.output, "output", "o", "text", "text or json")
	f.DurationVar(&a.timeout, "timeout", 30*time.Second, "for the whole command")
	f.StringVar(&a.context, "context", os.Getenv("DEMARC_CONTEXT"), "the operator's file, by default $DEMARC_CONTEXT")
	f.StringVar(&a.socket, "socket", os.Getenv("DEMARC_SOCKET"), "the appliance's socket, by default $DEMARC_SOCKET")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(a.controlPlane(), a.status(), a.customer(), a.appliance(), a.release(), a.operation(), a.probe(), a.evidence(), a.management(),
		a.key(), a.secret(), a.local(), a.consent(), a.verify())
	root.AddCommand(a.customersVerbs()...)
	return root
}

// group is a command that only holds others.
func group(use, short string, sub ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: func(c *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usage("%s has no command %q (see %s --help)", c.CommandPath(), args[0], c.CommandPath())
		}
		return nil
	}, RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(sub...)
	return c
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

// emit prints a document: as JSON, or as text writes it.
func (a *app) emit(v any, text func(w io.Writer)) error {
	if a.output == "json" {
		e := json.NewEncoder(a.out)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	w := tabwriter.NewWriter(a.out, 0, 4, 2, ' ', 0)
	text(w)
	return w.Flush()
}

// say is emit for a short word that has no document of its own.
func (a *app) say(v any, format string, args ...any) error {
	return a.emit(v, func(w io.Writer) { fmt.Fprintf(w, format+"\n", args...) })
}

func build() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}
