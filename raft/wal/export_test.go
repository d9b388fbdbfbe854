// SPDX-License-Identifier: Apache-2.0

package wal

// Broken is why the log takes nothing more, nil while it does.
func (l *Log) Broken() error {
	l.write.Lock()
	defer l.write.Unlock()
	return l.broken
}
