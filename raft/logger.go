// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"log/slog"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// hclogger lets hashicorp's logger write into slog.
func hclogger(l *slog.Logger) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Name: "raft", Level: hclog.Info, Output: lineWriter{l}, DisableTime: true})
}

type lineWriter struct{ l *slog.Logger }

// Write takes one line of hclog: "[WARN]  raft: what: key=value". Its INFO is for debugging here.
// The line is the message: lines that repeat are bounded by their message, and tests look for it.
func (w lineWriter) Write(b []byte) (int, error) {
	line := strings.TrimSpace(string(b))
	level, rest, ok := strings.Cut(line, "]")
	if ok && strings.HasPrefix(level, "[") {
		line = strings.TrimSpace(rest)
	}
	switch level {
	case "[ERROR":
		w.l.Error(line)
	case "[WARN":
		w.l.Warn(line)
	case "[DEBUG", "[INFO":
		w.l.Debug(line)
	default:
		w.l.Info(line)
	}
	return len(b), nil
}
