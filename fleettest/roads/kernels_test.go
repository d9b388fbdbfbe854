// SPDX-License-Identifier: Apache-2.0

package roads

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/demarc-dev/demarc/mesh"
)

// TestKernelsFindADeadPath: two connections lead from one kernel's stack to the other's, as channels do. The path then drops all, both
// ways. Each of the four ends is told by its kernel within the 21 s of docs/channel.md, whether nothing was on its way or what was sent is
// not acknowledged; and it is told as silence.
func TestKernelsFindADeadPath(t *testing.T) {
	needs(t)
	n, err := newTopology(len(faults)+3, none)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.close(); err != nil {
			t.Error(err)
		}
	}()
	at := net.JoinHostPort(controlDirect, "9999")
	var ln net.Listener
	if err := inside(n.control, func() (err error) { ln, err = net.Listen("tcp", at); return err }); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ends := map[string]net.Conn{}
	for _, what := range []string{"idle", "busy"} {
		var c net.Conn
		if err := inside(n.appliance, func() (err error) { c, err = net.DialTimeout("tcp", at, 5*time.Second); return err }); err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		up, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer up.Close()
		ends[what+", at the appliance"], ends[what+", at the node"] = c, up
	}
	for name, c := range ends {
		mesh.KeepAlive(c)
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	for name, c := range ends {
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	for _, way := range [][]string{{"INPUT", "-i"}, {"OUTPUT", "-o"}} {
		if err := command("ip", "netns", "exec", n.appliance, "iptables", "-w", "10", "-A", way[0], way[1], "link0", "-j", "DROP"); err != nil {
			t.Fatal(err)
		}
	}
	dead := time.Now()
	const within = 21 * time.Second // 20 s, and the kernel's timers are coarse
	var all sync.WaitGroup
	for name, c := range ends {
		if name[:4] == "busy" {
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		_ = c.SetReadDeadline(dead.Add(3 * within)) // it is not met: then the kernel has said nothing
		all.Go(func() {
			_, err := c.Read(make([]byte, 1))
			took := time.Since(dead)
			fmt.Printf("%-24s told after %s: %v\n", name, took.Round(100*time.Millisecond), err)
			var late net.Error
			if !errors.As(err, &late) || !late.Timeout() {
				t.Errorf("%s: %v is not told as silence", name, err)
			}
			if took < 5*time.Second || took > within+time.Second { // the machine may be busy
				t.Errorf("%s: told after %s, want %s at most", name, took, within)
			}
		})
	}
	all.Wait()
}
