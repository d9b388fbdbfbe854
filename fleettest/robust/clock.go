// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// A Go program reads the clock without a system call and without the C library, so neither libfaketime nor a time namespace
// reaches its wall clock. For runs with clock jumps demarcd is built with one file of the standard library laid over: time.Now
// adds as many seconds as stand in a file that the test writes. Nothing of demarc's own source differs, and the clock that only
// runs forward, by which timers run, is left alone.
const (
	nowLine  = "\tsec, nsec, mono := runtimeNow()\n"
	shiftEnv = "ROBUST_CLOCK"
	shiftGo  = `package time

import (
	"sync/atomic"
	"syscall"
	"unsafe"
)

var shift *int64

func init() {
	name, ok := syscall.Getenv("` + shiftEnv + `")
	if !ok {
		return
	}
	fd, err := syscall.Open(name, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		panic("` + shiftEnv + `: " + err.Error())
	}
	b, err := syscall.Mmap(fd, 0, 8, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		panic("` + shiftEnv + `: " + err.Error())
	}
	shift = (*int64)(unsafe.Pointer(&b[0]))
}

func shifted(sec int64) int64 {
	if shift == nil {
		return sec
	}
	return sec + atomic.LoadInt64(shift)
}
`
)

// buildShifted builds demarcd so that its wall clock can be moved.
func buildShifted(out, pkg string) error {
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("go env: %w", err)
	}
	src := filepath.Join(strings.TrimSpace(string(root)), "src", "time")
	now, err := os.ReadFile(filepath.Join(src, "time.go"))
	if err != nil {
		return err
	}
	if bytes.Count(now, []byte(nowLine)) != 1 {
		return errors.New("time.Now of this Go reads its clock in another way: clock jumps can't be made, run with -without clock")
	}
	dir, err := os.MkdirTemp("", "robust")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	now = bytes.Replace(now, []byte(nowLine), []byte(nowLine+"\tsec = shifted(sec)\n"), 1)
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {
		filepath.Join(src, "time.go"): filepath.Join(dir, "time.go"), filepath.Join(src, "shift.go"): filepath.Join(dir, "shift.go")}})
	if err != nil {
		return err
	}
	for name, b := range map[string][]byte{"time.go": now, "shift.go": []byte(shiftGo), "overlay.json": overlay} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			return err
		}
	}
	c := exec.Command("go", "build", "-trimpath", "-overlay", filepath.Join(dir, "overlay.json"), "-o", out, pkg)
	if b, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("go build with a clock that can be moved: %w: %s", err, b)
	}
	return nil
}

// setClock moves the wall clock of the processes that were started with this file.
func setClock(file string, by time.Duration) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600) // the same file: it is in their memory
	if err != nil {
		return err
	}
	defer f.Close()
	var b [8]byte
	binary.NativeEndian.PutUint64(b[:], uint64(int64(by/time.Second)))
	_, err = f.WriteAt(b[:], 0)
	return err
}
