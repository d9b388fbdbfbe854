// SPDX-License-Identifier: Apache-2.0

package roads

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// sockets are those of a namespace that take in what strangers send, as the kernel's tables have them: listeners over TCP, and all of UDP.
func sockets(ns string) (tcp, udp []string, err error) {
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6"} {
		out, err := exec.Command("ip", "netns", "exec", ns, "cat", "/proc/net/"+table).Output()
		if err != nil {
			return nil, nil, err
		}
		for line := range strings.Lines(string(out)) {
			f := strings.Fields(line)
			if len(f) < 4 || f[0] == "sl" {
				continue
			}
			at, err := socketAddr(f[1])
			if err != nil {
				return nil, nil, err
			}
			switch {
			case strings.HasPrefix(table, "udp") && f[2][len(f[2])-4:] == "0000": // not connected to one peer, as a question to the resolver is
				udp = append(udp, at)
			case strings.HasPrefix(table, "tcp") && f[3] == "0A":
				tcp = append(tcp, at)
			}
		}
	}
	slices.Sort(tcp)
	return tcp, udp, nil
}

// socketAddr reads HEX:PORT of the kernel's tables. An address of IPv6 is spelled as its host part alone when it is unspecified.
func socketAddr(s string) (string, error) {
	host, p, ok := strings.Cut(s, ":")
	at, err := strconv.ParseUint(p, 16, 16)
	if err != nil || !ok {
		return "", fmt.Errorf("no socket: %q", s)
	}
	if len(host) != 8 {
		return fmt.Sprintf("[%s]:%d", host, at), nil
	}
	n, err := strconv.ParseUint(host, 16, 32)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s:%d", net.IPv4(byte(n), byte(n>>8), byte(n>>16), byte(n>>24)), at), nil
}

// rss gives the resident memory of the demarcd in a namespace, in KiB.
func rss(ns string) (int, error) {
	out, err := exec.Command("ip", "netns", "pids", ns).Output()
	if err != nil {
		return 0, err
	}
	most := 0
	for _, pid := range strings.Fields(string(out)) {
		b, err := os.ReadFile("/proc/" + pid + "/status")
		if err != nil {
			continue // it has ended
		}
		if m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(b); m != nil {
			n, err := strconv.Atoi(string(m[1]))
			if err != nil {
				return 0, err
			}
			most = max(most, n)
		}
	}
	return most, nil
}

// unnamed are the files that the programs of a namespace hold open and that have no name any more, and whether anything was ever
// written to them: what was written and taken away again tells by its time.
func unnamed(ns string) (map[string]bool, error) {
	out, err := exec.Command("ip", "netns", "pids", ns).Output()
	if err != nil {
		return nil, err
	}
	files := map[string]bool{}
	for _, pid := range strings.Fields(string(out)) {
		open, err := filepath.Glob("/proc/" + pid + "/fd/*")
		if err != nil {
			return nil, err
		}
		for _, fd := range open {
			name, err := os.Readlink(fd)
			if err != nil || !strings.HasSuffix(name, " (deleted)") {
				continue // it was closed meanwhile, or has a name
			}
			var st unix.Statx_t
			const want = unix.STATX_SIZE | unix.STATX_MTIME | unix.STATX_BTIME
			if unix.Statx(unix.AT_FDCWD, fd, 0, want, &st) != nil {
				continue
			}
			if st.Mask&want != want {
				return nil, fmt.Errorf("%s: this file system does not tell when a file was made", name)
			}
			files[strings.TrimSuffix(name, " (deleted)")] = st.Size > 0 || st.Mtime != st.Btime
		}
	}
	return files, nil
}
