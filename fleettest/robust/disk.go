// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/demarc-dev/demarc/fleettest/process"
)

// disk is an ext4 file system in a file, on a loop device: it can be filled up, and frozen, in which it takes no write and no
// sync until it is thawed. The node's program is the shipped one and knows nothing of it.
type disk struct {
	image, at string

	mu     sync.Mutex
	frozen bool
}

const diskBytes = 512 << 20

// newDisk makes the file system and mounts it.
func newDisk(image, at string) (*disk, error) {
	f, err := os.Create(image)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(diskBytes), f.Close(), os.MkdirAll(at, 0o700)); err != nil {
		return nil, err
	}
	if err := process.Command("mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=8", image); err != nil {
		return nil, err
	}
	d := &disk{image: image, at: at}
	return d, d.mount()
}

func (d *disk) mount() error { return process.Command("mount", "-o", "loop,noatime", d.image, d.at) }

// freezer is FIFREEZE and FITHAW of ioctl_fs(2).
const (
	fiFreeze = 0xC0045877
	fiThaw   = 0xC0045878
)

// freeze stops or resumes all writes. To thaw what is not frozen is no error.
func (d *disk) freeze(on bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.frozen == on {
		return nil
	}
	fd, err := unix.Open(d.at, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	req := uint(fiThaw)
	if on {
		req = fiFreeze
	}
	if err := unix.IoctlSetInt(fd, req, 0); err != nil {
		return fmt.Errorf("freeze %v of %s: %w", on, d.at, err)
	}
	d.frozen = on
	return nil
}

// slow freezes and thaws in turn until stop is closed: a write waits up to the length of a freeze.
func (d *disk) slow(stop <-chan struct{}) error {
	for {
		for on, wait := range map[bool]time.Duration{true: 250 * time.Millisecond, false: 15 * time.Millisecond} {
			if err := d.freeze(on); err != nil {
				return err
			}
			select {
			case <-stop:
				return d.freeze(false)
			case <-time.After(wait):
			}
		}
	}
}

func (d *disk) ballast() string { return filepath.Join(d.at, "ballast") }

// fill takes all free space, or gives it back.
func (d *disk) fill(on bool) error {
	if !on {
		err := os.Remove(d.ballast())
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	f, err := os.Create(d.ballast())
	if err != nil {
		return err
	}
	defer f.Close()
	var at int64
	for _, step := range []int64{16 << 20, 1 << 20, 64 << 10, 4 << 10} {
		for unix.Fallocate(int(f.Fd()), 0, at, step) == nil {
			at += step
		}
	}
	if at == 0 {
		return errors.New("the disk could not be filled")
	}
	return nil
}

// wipe removes all that a folder holds, and leaves it: it may be a mount.
func wipe(dir string) error {
	all, err := os.ReadDir(dir)
	for _, e := range all {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

func (d *disk) close() error {
	err := errors.Join(d.freeze(false), d.fill(false))
	for range 50 {
		if uerr := unix.Unmount(d.at, 0); uerr == nil || errors.Is(uerr, unix.EINVAL) {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return errors.Join(err, unix.Unmount(d.at, unix.MNT_DETACH))
}
