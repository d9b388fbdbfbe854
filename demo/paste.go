// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// environment writes the file that makes a terminal ready for every command that the story prints.
func (s *story) environment() {
	s.env = s.write(strings.Join([]string{
		"# The environment of the demo, for a POSIX shell: . " + s.path("env"),
		"export D=" + word(s.dir, ""),
		"export PATH=" + word(s.bin, "") + `:"$PATH"`,
		`export DEMARC_CONTEXT="$D/acme/operator/operator.yaml"      # the vendor's operator`,
		`export DEMARC_SOCKET="$D/customer/appliance.sock"           # the customer's appliance; its file is $D/customer/appliance.yaml`,
		`export DEMARC_KEY="$D/customer/globex.key"                  # the customer's key`,
		`export DEMARC_PASSPHRASE_FILE="$D/customer/passphrase"      # of that key`, "",
	}, "\n"), "env")
	fmt.Printf("Every command below that begins with demarc can be pasted into another terminal, while this runs, after\n\n"+
		"  . %s\n\n", s.env)
}

// plainWord needs no quotes.
var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// word spells an argument for a shell, with $D in place of the demo's folder.
func word(a, dir string) string {
	parts, d := []string{a}, "$D"
	if dir != "" {
		parts = strings.Split(a, dir)
	}
	if !plainWord.MatchString(dir) {
		d = `"$D"`
	}
	whole := strings.Join(parts, "")
	if plainWord.MatchString(whole) || whole == "" && len(parts) > 1 {
		return strings.Join(parts, d)
	}
	for i, p := range parts {
		if p != "" || len(parts) == 1 {
			parts[i] = "'" + strings.ReplaceAll(p, "'", `'\''`) + "'"
		}
	}
	return strings.Join(parts, d)
}

// line is a command as it is printed and run.
func (s *story) line(args ...string) string {
	out := "demarc"
	for _, a := range args {
		out += " " + word(a, s.dir)
	}
	return out
}

// paste runs a line as somebody who has read the environment's file: in a shell that knows nothing else of the demo.
func (s *story) paste(line string) result {
	cmd := exec.CommandContext(s.ctx, "sh", "-c", ". "+word(s.env, "")+"\n"+line)
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "DEMARC_") && !strings.HasPrefix(e, "D=") {
			cmd.Env = append(cmd.Env, e)
		}
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.fail("%s: %v", line, err)
	}
	return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

// repeatable is what only reads: it can be pasted again, with the exit code that it had when it was printed last.
var repeatable = []string{"status", "appliance list", "appliance show", "access", "review", "posture show", "local status",
	"operation show", "operation output",
	"consent show", "verify", "management list"}

// again pastes each command that was printed and only reads, a second time.
func (s *story) again() {
	var done []string
	for _, p := range slices.Backward(s.printed) {
		reads := func(begins string) bool { return strings.HasPrefix(p.line+" ", "demarc "+begins+" ") }
		if slices.Contains(done, p.line) || !slices.ContainsFunc(repeatable, reads) {
			continue
		}
		done = append(done, p.line)
		if r := s.paste(p.line); r.code != p.code {
			s.fail("pasted again, %q ends with %d, and did with %d: %s", p.line, r.code, p.code, r.errs)
		}
	}
	if len(done) < len(repeatable) {
		s.fail("only %d commands that were printed can be repeated: %q", len(done), done)
	}
	s.note("each of the %d commands above that only read was pasted again into a shell that knew nothing but the file named at the top",
		len(done))
}

// tries is what the end of the demo invites to.
func (s *story) tries() []string {
	out := []string{"demarc appliance list", "demarc local status", "demarc local log", "demarc access", "demarc posture set closed",
		"demarc posture set public"}
	for _, role := range s.metricsOf() {
		out = append(out, "curl -fsS http://"+s.metrics[role]+"/metrics      # "+role)
	}
	return append(out, `ls "$D/logs"`)
}

// invite tells what to try.
func (s *story) invite() {
	fmt.Printf("\nEverything stays up until Ctrl-C. Open http://%s/ in a browser. In another terminal:\n\n  . %s\n", s.webAddr, s.env)
	for _, t := range s.tries() {
		fmt.Println("  " + t)
	}
}

// invited pastes what the end invites to, where nobody stays to do it.
func (s *story) invited() {
	for _, t := range s.tries() {
		if _, err := exec.LookPath("curl"); err != nil && strings.HasPrefix(t, "curl ") {
			continue // it is of the machine, and the pages were read above
		}
		if r := s.paste(t); r.code != 0 {
			s.fail("the end invites to %q, which ends with %d: %s", t, r.code, r.errs)
		}
	}
}
