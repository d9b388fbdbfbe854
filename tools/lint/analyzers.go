// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/ashanbrown/forbidigo/v2/pkg/analyzer"
	"github.com/polyfloyd/go-errorlint/errorlint"
	"go-simpler.org/sloglint"
	"golang.org/x/tools/go/analysis"
)

// analyzers are run by go vet, which hands each package to this program and remembers what was clean.
func analyzers() ([]*analysis.Analyzer, error) {
	forbid := analyzer.NewAnalyzer()
	for flag, values := range map[string][]string{
		"analyze_types": {"true"},
		"p": {
			`{p: "^time\\.Sleep$", pkg: "^time$", msg: "wait for the condition, or select on a timer and the context"}`,
			`{p: "^context\\.(Background|TODO)$", pkg: "^context$", msg: "use the context of the call, or of what owns the goroutine"}`,
		},
	} {
		for _, v := range values {
			if err := forbid.Flags.Set(flag, v); err != nil {
				return nil, fmt.Errorf("forbidigo -%s: %w", flag, err)
			}
		}
	}
	return []*analysis.Analyzer{
		forbid,
		errorlint.NewAnalyzer(),
		sloglint.New(&sloglint.Options{
			NoGlobalLogger:   "all",
			StaticMessage:    true,
			MessageStyle:     "lowercased",
			NoMixedArguments: true,
			KeyNamingCase:    "snake",
			ForbiddenKeys:    []string{"error", "e", "reason_err", "time", "level", "msg", "source"},
		}),
	}, nil
}
