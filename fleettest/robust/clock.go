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
// reaches its wall clock. For clock jumps demarcd is linked a second time, from the same compiled packages, with two additions:
// time.Now of the standard library adds as many seconds as stand in a field that time.UTC has and does not use, and package main
// has a goroutine that keeps that field equal to a file. The clock that only runs forward, by which timers run, is left alone.
const (
	clockFile = "robust.clock" // in the working directory: 8 bytes, little endian
	clockLag  = 50 * time.Millisecond
	nowLine   = "\tsec, nsec, mono := runtimeNow()\n"
	// The addition is on the line that is there already and declares nothing: so the package looks the same to those that were
	// compiled against the true one, and the linker takes it.
	nowMore   = "; sec += utcLoc.cacheEnd\n"
	shifterGo = `package main

import (
	"encoding/binary"
	"os"
	"sync/atomic"
	"time"
	"unsafe"
)

type robustLocation struct {
	name                 string
	zone, tx             []byte
	extend               string
	cacheStart, cacheEnd int64
	cacheZone            *byte
}

func init() {
	shift := &(*robustLocation)(unsafe.Pointer(time.UTC)).cacheEnd
	set := func() {
		if b, err := os.ReadFile("` + clockFile + `"); err == nil && len(b) == 8 {
			atomic.StoreInt64(shift, int64(binary.LittleEndian.Uint64(b)))
		}
	}
	set()
	go func() {
		for range time.Tick(50 * time.Millisecond) {
			set()
		}
	}()
}
`
)

// buildShifted builds the program in a folder so that its wall clock can be moved.
func buildShifted(out, pkg string) error {
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("go env: %w", err)
	}
	file := filepath.Join(strings.TrimSpace(string(root)), "src", "time", "time.go")
	now, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if bytes.Count(now, []byte(nowLine)) != 1 {
		return errors.New("time.Now of this Go reads its clock in another way: clock jumps can't be made, run with -without clock")
	}
	now = bytes.Replace(now, []byte(nowLine), []byte(strings.TrimSuffix(nowLine, "\n")+nowMore), 1)
	dir, err := os.MkdirTemp("", "robust")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	main, err := filepath.Abs(pkg)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	archive := filepath.Join(dir, "time.a")
	lay := func(name, over string, text []byte) (string, error) { // gives the file for -overlay
		to := filepath.Join(dir, name+".go")
		b, err := json.Marshal(map[string]map[string]string{"Replace": {over: to}})
		return filepath.Join(dir,
			name+".json"), errors.Join(err, os.WriteFile(to, text, 0o600), os.WriteFile(filepath.Join(dir, name+".json"), b, 0o600))
	}
	std, err := lay("time", file, now)
	if err != nil {
		return err
	}
	own, err := lay("main", filepath.Join(main, "robust_clock.go"), []byte(shifterGo))
	if err != nil {
		return err
	}
	for _, args := range [][]string{
		{"build", "-trimpath", "-overlay", std, "-o", archive, "time"},
		{"build", "-trimpath", "-overlay", own, "-toolexec", self + " " + linkWord + " " + archive, "-o", out, pkg},
	} {
		if b, err := exec.Command("go", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w: %s", strings.Join(args, " "), err, b)
		}
	}
	return nil
}

// linkWord makes this program a -toolexec of the go command: "link-with ARCHIVE TOOL ARGS".
const linkWord = "link-with"

// linkWith runs a tool of the toolchain. The linker is given another archive of package time.
func linkWith(archive string, tool []string) error {
	for i, a := range tool {
		if filepath.Base(tool[0]) != "link" || a != "-importcfg" || i+1 == len(tool) {
			continue
		}
		b, err := os.ReadFile(tool[i+1])
		if err != nil {
			return err
		}
		lines := strings.Split(string(b), "\n")
		for j, l := range lines {
			if strings.HasPrefix(l, "packagefile time=") {
				lines[j] = "packagefile time=" + archive
			}
		}
		if err := os.WriteFile(tool[i+1], []byte(strings.Join(lines, "\n")), 0o600); err != nil {
			return err
		}
	}
	c := exec.Command(tool[0], tool[1:]...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	return c.Run()
}

// setClock moves the wall clock of the process that works in this folder.
func setClock(dir string, by time.Duration) error {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(int64(by/time.Second)))
	tmp := filepath.Join(dir, clockFile+".new")
	return errors.Join(os.WriteFile(tmp, b[:], 0o600), os.Rename(tmp, filepath.Join(dir, clockFile)))
}
