// SPDX-License-Identifier: Apache-2.0

// Package cli is what the groups of demarc's commands share: one run of the command, what it prints, its exit codes, its flags and files.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
)

// Exit codes.
const (
	ExitOK      = 0
	ExitFailed  = 1
	ExitUsage   = 2
	ExitRefused = 3 // consent or verification says no
)

// ErrUsage marks a wrong command line. ErrPrinted marks an error that the command has printed itself.
var (
	ErrUsage   = errors.New("usage")
	ErrPrinted = errors.New("printed")
)

// Usage makes the error of a wrong command line.
func Usage(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrUsage, fmt.Sprintf(format, args...))
}

// App is one run of the command.
type App struct {
	In   io.Reader
	Out  io.Writer
	Errs io.Writer

	Output  string        // text or json
	Timeout time.Duration // of a call, all its tries together
	Context string        // the operator's file
	Socket  string        // of the appliance, or of the management plane
}

// Topic is the commands of one kind of user.
type Topic struct {
	ID, Title string
	Commands  []*cobra.Command
}

// Run runs one command line and returns its exit code. topics makes the commands; "help" and "completion" go to the last topic.
func Run(ctx context.Context, args []string, in io.Reader, out, errs io.Writer, topics func(*App) []Topic) int {
	a := &App{In: in, Out: out, Errs: errs}
	root := a.root(args)
	var last string
	for _, t := range topics(a) {
		root.AddGroup(&cobra.Group{ID: t.ID, Title: t.Title})
		for _, c := range t.Commands {
			c.GroupID = t.ID
			root.AddCommand(c)
		}
		last = t.ID
	}
	root.SetHelpCommandGroupID(last)
	root.SetCompletionCommandGroupID(last)
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errs)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return ExitOK
	}
	if !errors.Is(err, ErrPrinted) {
		a.printError(err)
	}
	var breach audit.Breach
	switch {
	case errors.Is(err, ErrUsage):
		return ExitUsage
	case errors.As(err, &breach), fault.Of(err) == fault.Denied:
		return ExitRefused
	}
	return ExitFailed
}

func (a *App) root(args []string) *cobra.Command {
	root := &cobra.Command{
		Use:   "demarc",
		Short: "Deploy into your customers' environments without crossing the trust boundary",
		Long: "demarc is for three kinds of people.\n\n" +
			"  A vendor's operator speaks to the vendor's control plane, with the operator's file (--context).\n" +
			"  A customer speaks to the customer's own appliance, over its socket (--socket). The vendor can't call any of it.\n" +
			"  An auditor needs no connection: verify works with nothing but a bundle and pinned keys.\n\n" +
			"Exit codes: 0 done, 1 failed, 2 the command line is wrong, 3 refused by consent or by verification.",
		Example: "  demarc appliance list --context operator.yaml\n  demarc posture set allowlist --allow 192.0.2.0/24\n" +
			"  demarc verify evidence.json --pin acme.example/control-plane=vendor-log.pub",
		SilenceErrors: true, SilenceUsage: true, Version: build(), Args: known, RunE: helpless,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if a.Output != "text" && a.Output != "json" {
				return Usage("--output %q: use text or json", a.Output)
			}
			if a.Timeout <= 0 {
				return Usage("--timeout %s: use a time above zero", a.Timeout)
			}
			return nil
		},
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		if wantsJSON(args) { // what comes after the wrong flag was not parsed
			a.Output = "json"
		}
		return Usage("%v (see %s --help)", err, c.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringVarP(&a.Output, "output", "o", "text", "text or json")
	f.DurationVar(&a.Timeout, "timeout", 30*time.Second, "of a call, all its tries together")
	f.StringVar(&a.Context, "context", os.Getenv("DEMARC_CONTEXT"), "the operator's file, by default $DEMARC_CONTEXT")
	f.StringVar(&a.Socket, "socket", os.Getenv("DEMARC_SOCKET"), "the appliance's socket, by default $DEMARC_SOCKET")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return root
}

// wantsJSON reports whether a command line that does not parse asks for JSON.
func wantsJSON(args []string) bool {
	for i, s := range args {
		switch s {
		case "--":
			return false
		case "-ojson", "-o=json", "--output=json":
			return true
		case "-o", "--output":
			return i+1 < len(args) && args[i+1] == "json"
		}
	}
	return false
}

// Group is a command that only holds others: alone it is a mistake, and shows its help.
func Group(use, short string, sub ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: known, RunE: helpless}
	c.AddCommand(sub...)
	return c
}

// known refuses a word that is no command.
func known(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return Usage("%s has no command %q (see %s --help)", c.CommandPath(), args[0], c.CommandPath())
	}
	return nil
}

// helpless shows the help on standard error: nothing was done.
func helpless(c *cobra.Command, _ []string) error {
	c.SetOut(c.ErrOrStderr())
	return errors.Join(Usage("no command"), ErrPrinted, c.Help())
}

// Exactly is cobra.ExactArgs with our exit code.
func Exactly(n int, names string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != n {
			return Usage("%s takes %s (see --help)", c.CommandPath(), names)
		}
		return nil
	}
}

// OneOf takes one argument, which is one of these words.
func OneOf(what string, words ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != 1 {
			return Usage("%s takes %s (see --help)", c.CommandPath(), what)
		}
		if !slices.Contains(words, args[0]) {
			return Usage("%s: %.64q is not %s: use %s", c.CommandPath(), args[0], what, strings.Join(words, ", "))
		}
		return nil
	}
}

// Bounded is the context of a command with its timeout.
func (a *App) Bounded(c *cobra.Command) (context.Context, context.CancelFunc) {
	return context.WithTimeout(c.Context(), a.Timeout)
}

func build() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}
