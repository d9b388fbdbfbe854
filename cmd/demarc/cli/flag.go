// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/pflag"

	"github.com/demarc-dev/demarc/fleet"
)

// ApprovalLife is how long an approval or a request is valid, and GrantLife a grant, if the flag is not set.
const (
	ApprovalLife = 24 * time.Hour
	GrantLife    = 24 * time.Hour
)

// span is the value of a flag that takes a time above zero. A value that could only mean "not at all" is refused where it is
// typed: zero and what is negative must never become "without an end".
type span struct{ is, least, most time.Duration }

// SpanVar adds a flag that takes least to most; least is at least a second, which is what documents and calls carry.
func SpanVar(f *pflag.FlagSet, name string, is, least, most time.Duration, usage string) *time.Duration {
	s := &span{is, max(least, time.Second), most}
	f.Var(s, name, usage)
	return &s.is
}

// ConsentVar adds a flag that takes how long a consent is valid, at most [fleet.MaxConsent].
func ConsentVar(f *pflag.FlagSet, name string, is time.Duration, usage string) *time.Duration {
	return SpanVar(f, name, is, time.Second, fleet.MaxConsent, usage+"; 90 days (2160h) at most")
}

// Set implements [pflag.Value].
func (s *span) Set(text string) error {
	d, err := time.ParseDuration(text)
	if err != nil || d < s.least || d > s.most {
		return fmt.Errorf("use a time from %s to %s, for instance 24h", s.least, s.most)
	}
	s.is = d
	return nil
}

// String implements [pflag.Value].
func (s *span) String() string { return s.is.String() }

// Type implements [pflag.Value].
func (s *span) Type() string { return "duration" }

// count is the value of a flag that takes a whole number from 1 on; the zero value is that the flag was not set.
type count struct{ is, most int }

// CountVar adds a flag that takes a whole number from 1 to most.
func CountVar(f *pflag.FlagSet, name string, most int, usage string) *int {
	c := &count{most: most}
	f.Var(c, name, usage)
	return &c.is
}

// Set implements [pflag.Value].
func (c *count) Set(text string) error {
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > c.most {
		return fmt.Errorf("use a whole number from 1 to %d", c.most)
	}
	c.is = n
	return nil
}

// String implements [pflag.Value].
func (c *count) String() string {
	if c.is == 0 {
		return ""
	}
	return strconv.Itoa(c.is)
}

// Type implements [pflag.Value].
func (c *count) Type() string { return "int" }
