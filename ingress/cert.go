// SPDX-License-Identifier: Apache-2.0

package ingress

import (
	"crypto/tls"
	"os"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// Files is a certificate kept in two files. It is read again when either file changes; while the new pair does not
// fit together (one is written, the other not yet) the old one goes on. Safe for concurrent use.
type Files struct {
	certFile, keyFile string

	mu    sync.Mutex
	pair  *tls.Certificate
	stamp [2]stamp
}

type stamp struct {
	size int64
	mod  time.Time
}

// Load reads the pair once, so that a wrong path is known at the start.
func Load(certFile, keyFile string) (*Files, error) {
	f := &Files{certFile: certFile, keyFile: keyFile}
	if err := f.Reload(); err != nil {
		return nil, err
	}
	return f, nil
}

// Reload reads the pair if a file has changed since. On an error the old pair stays in use.
func (f *Files) Reload() error {
	const op = "ingress.Files"
	f.mu.Lock()
	defer f.mu.Unlock()
	var now [2]stamp
	for i, name := range []string{f.certFile, f.keyFile} {
		info, err := os.Stat(name)
		if err != nil {
			return fault.Because(err, op, fault.Unavailable, "the certificate of the doors can't be read: check ingress.tls.cert_file and "+
				"ingress.tls.key_file")
		}
		now[i] = stamp{info.Size(), info.ModTime()}
	}
	if f.pair != nil && now == f.stamp {
		return nil
	}
	pair, err := tls.LoadX509KeyPair(f.certFile, f.keyFile)
	if err != nil {
		return fault.Because(err, op, fault.Invalid, "the certificate of the doors and its key are not a pair: check ingress.tls.cert_file and "+
			"ingress.tls.key_file")
	}
	f.pair, f.stamp = &pair, now
	return nil
}

// Certificate is for Config.Certificate. A failed re-read is not an error of the handshake: the old pair serves.
func (f *Files) Certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	_ = f.Reload() // the old pair serves on; Reload tells whoever asks for health
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pair, nil
}

// Expires gives the end of the certificate that is in use.
func (f *Files) Expires() time.Time {
	_ = f.Reload() // as in Certificate
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pair.Leaf.NotAfter
}
