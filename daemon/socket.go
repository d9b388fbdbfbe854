// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// socketLook is how often it is looked whether a socket's file is still there.
const socketLook = time.Second

// Socket is a Unix socket that only its owner may open, and that comes back if its file is removed.
type Socket struct {
	path string

	mu     sync.Mutex // guards what follows
	ln     *net.UnixListener
	file   os.FileInfo
	closed bool
}

// Listen binds the socket before the first part starts. A socket that a dead process left is replaced; one that answers is
// not. The folder is made, readable by its owner only, if it is not there.
func Listen(path string) (*Socket, error) {
	s := &Socket{path: path}
	return s, s.bind()
}

// bind makes the file, and listens.
func (s *Socket) bind() error {
	const op = "daemon.Socket"
	dir := filepath.Dir(s.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't make the folder of the socket: %s", fault.Disk(err))
	}
	if fi, err := os.Lstat(s.path); err == nil {
		if fi.Mode()&os.ModeSocket == 0 {
			return fault.New(op, fault.Conflict, "%s is there and is not a socket", s.path)
		}
		if c, err := net.DialTimeout("unix", s.path, time.Second); err == nil {
			c.Close()
			return fault.New(op, fault.Conflict, "another process answers on %s: stop it first", s.path)
		}
	}
	// Until it has its mode, nobody knows its name. It needs no block of the disk, so that it works on a full one too.
	tmp := filepath.Join(dir, ".s"+rand.Text()[:8])
	defer os.Remove(tmp)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't listen on a socket at %s: its path may be longer than the system allows", s.path)
	}
	ln.SetUnlinkOnClose(false)
	var fi os.FileInfo
	if err = os.Chmod(tmp, 0o600); err == nil {
		err = os.Rename(tmp, s.path)
	}
	if err == nil {
		fi, err = os.Lstat(s.path)
	}
	if err != nil {
		return errors.Join(fault.Because(err, op, fault.Unavailable, "can't put the socket at %s", s.path), ln.Close())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errors.Join(net.ErrClosed, ln.Close(), os.Remove(s.path))
	}
	s.ln, s.file = ln, fi
	return nil
}

// lost reports whether the file is gone, or is another one.
func (s *Socket) lost() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	fi, err := os.Lstat(s.path)
	return !s.closed && (errors.Is(err, os.ErrNotExist) || err == nil && !os.SameFile(fi, s.file))
}

// Close stops listening, and removes the file if it is this socket's.
func (s *Socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	err := s.ln.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	if fi, gone := os.Lstat(s.path); gone == nil && os.SameFile(fi, s.file) {
		err = errors.Join(err, os.Remove(s.path))
	}
	return err
}

// HTTP serves a handler on the socket until the part's context ends, as [HTTP] does. If the socket's file is removed, by a
// cleaner of old files for instance, it is made again within seconds: the owner is never locked out.
func (s *Socket) HTTP(name string, h http.Handler, log *slog.Logger) Part {
	srv := server(name, nil, h, log)
	return Func(name, func(ctx context.Context, ready func()) error {
		var wg sync.WaitGroup
		defer wg.Wait()
		ended := make(chan struct{}, 1) // a listener gave up
		take := func() {
			s.mu.Lock()
			ln := s.ln
			s.mu.Unlock()
			wg.Go(func() {
				if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
					select {
					case ended <- struct{}{}:
					default:
					}
				}
			})
		}
		take()
		ready()
		tick := time.NewTicker(socketLook)
		defer tick.Stop()
		for failed := false; ctx.Err() == nil; {
			again := false
			select {
			case <-ctx.Done():
			case <-ended:
				again = true
			case <-tick.C:
				again = failed || s.lost()
			}
			if !again {
				continue
			}
			old := s.ln
			if err := s.bind(); err != nil {
				if !failed {
					log.Error("the socket is gone and can't be made again yet", "path", s.path, "err", err)
				}
				failed = true
				continue
			}
			_ = old.Close() // calls under way go on
			log.Warn("the socket was removed: it is there again", "path", s.path)
			failed = false
			take()
		}
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
		defer cancel()
		if err := srv.Shutdown(stop); err != nil {
			_ = srv.Close() // what did not end by itself
		}
		return s.Close()
	})
}
