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
func (w lineWriter) Write(b []byte) (int, error) {
	const message = "hashicorp/raft"
	line := strings.TrimSpace(string(b))
	level, rest, ok := strings.Cut(line, "]")
	if ok && strings.HasPrefix(level, "[") {
		line = strings.TrimSpace(rest)
	}
	switch level {
	case "[ERROR":
		w.l.Error(message, "line", line)
	case "[WARN":
		w.l.Warn(message, "line", line)
	case "[DEBUG", "[INFO":
		w.l.Debug(message, "line", line)
	default:
		w.l.Info(message, "line", line)
	}
	return len(b), nil
}
