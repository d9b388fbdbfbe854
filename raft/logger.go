// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"context"
	"log/slog"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// hclogger lets hashicorp's logger write into slog.
func hclogger(l *slog.Logger) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Name: "raft", Level: hclog.Info, Output: lineWriter{l}, DisableTime: true})
}

// levels are those of hclog. Its INFO is for debugging here.
var levels = map[string]slog.Level{
	"[ERROR]": slog.LevelError, "[WARN]": slog.LevelWarn, "[DEBUG]": slog.LevelDebug, "[INFO]": slog.LevelDebug,
}

type lineWriter struct{ l *slog.Logger }

// Write takes one line of hclog: "[WARN]  raft: what: key=value".
func (w lineWriter) Write(b []byte) (int, error) {
	line := strings.TrimSpace(string(b))
	level := slog.LevelInfo
	for word, is := range levels {
		if rest, ok := strings.CutPrefix(line, word); ok {
			line, level = strings.TrimSpace(rest), is
		}
	}
	w.l.Log(context.Background(), level, line)
	return len(b), nil
}
