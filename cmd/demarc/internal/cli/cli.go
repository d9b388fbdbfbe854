// SPDX-License-Identifier: Apache-2.0

// Package cli is the tree of commands that people type.
//
// Exit codes: 0 done; 1 failed; 2 the command line was wrong; 3 refused, by consent, by a door or by the verifier.
// With --output json, what is printed is one JSON document with stable names; an error is one too, on standard error.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/audit"
	"github.com/demarc-dev/demarc/fault"
)

// The closed set of exit codes.
const (
	exitOK      = 0
	exitFailed  = 1
	exitUsage   = 2
	exitRefused = 3
)

// app is one run of the command.
type app struct {
	in       io.Reader
	out, err io.Writer
	format   string
	timeout  time.Duration
	now      func() time.Time
	getenv   func(string) string
}

// Main runs one command line and gives the exit code.
func Main(ctx context.Context, args []string, in io.Reader, out, errw io.Writer) int {
	a := &app{in: in, out: out, err: errw, format: "text", now: time.Now, getenv: os.Getenv}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errw)
	err := root.ExecuteContext(ctx)
	if err != nil && !errors.Is(err, errTold) {
		a.complain(err)
	}
	return code(err)
}

// usageError is a command line that is wrong.
type usageError struct{ text string }

func (u usageError) Error() string { return u.text }

func usage(format string, args ...any) error { return usageError{fmt.Sprintf(format, args...)} }

// errTold is joined to an error that the command has printed itself.
var errTold = errors.New("told")

func code(err error) int {
	var u usageError
	var b audit.Breach
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &u):
		return exitUsage
	case errors.As(err, &b), fault.Of(err) == fault.Denied:
		return exitRefused
	}
	return exitFailed
}

const (
	groupVendor   = "vendor"
	groupCustomer = "customer"
	groupAnyone   = "anyone"
)

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "demarc",
		Short: "Deploy, observe and operate an application inside a customer's own environment, as far as the customer allows",
		Long: `demarc is the command of three people.

A vendor's operator talks to the vendor's own control plane. Every call proves itself with the operator's
certificate: --context FILE or DEMARC_CONTEXT names the operator.yaml that "demarc control-plane init" wrote.

A customer talks to the appliance in the customer's own environment, through its Unix socket on that host:
--socket PATH or DEMARC_SOCKET. What needs consent is signed here, with the customer's key, and checked there.

An auditor needs no connection: demarc verify.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddGroup(&cobra.Group{ID: groupVendor, Title: "The vendor's operator types:"},
		&cobra.Group{ID: groupCustomer, Title: "The customer types:"},
		&cobra.Group{ID: groupAnyone, Title: "Anyone types:"})
	f := root.PersistentFlags()
	f.StringVarP(&a.format, "output", "o", "text", "text or json")
	f.DurationVar(&a.timeout, "timeout", 30*time.Second, "how long a call may take, all retries together")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if a.format != "text" && a.format != "json" {
			return usage("--output %s: use text or json", a.format)
		}
		if a.timeout <= 0 {
			return usage("--timeout %s: use a time above zero", a.timeout)
		}
		return nil
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usage("%s; see %s --help", err, c.CommandPath())
	})
	for group, cmds := range map[string][]*cobra.Command{
		groupVendor:   a.vendor(),
		groupCustomer: a.customer(),
		groupAnyone:   {a.verify()},
	} {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	root.SetHelpCommandGroupID(groupAnyone)
	root.SetCompletionCommandGroupID(groupAnyone)
	strict(root)
	return root
}

// strict makes each group of commands refuse words that it does not know, and each command say so where its arguments
// are wrong.
func strict(c *cobra.Command) {
	for _, sub := range c.Commands() {
		strict(sub)
	}
	if check := c.Args; check != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return usage("%s; usage: %s", err, c.UseLine())
			}
			return nil
		}
	}
	if c.Runnable() || !c.HasSubCommands() {
		return
	}
	c.Args = cobra.ArbitraryArgs
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usage("%s has no command %q; see %s --help", c.CommandPath(), args[0], c.CommandPath())
		}
		c.SetOut(c.ErrOrStderr())
		_ = c.Help()
		return errors.Join(usage("no command"), errTold)
	}
}

// group is a command that only holds others.
func group(use, short, long string, cmds ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Long: long}
	c.AddCommand(cmds...)
	return c
}
