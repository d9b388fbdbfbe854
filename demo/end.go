// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/demarc-dev/demarc/audit"
)

// evidence is step 8: both logs verify offline; tampered copies do not.
func (s *story) evidence() {
	s.title(8, "Both audit logs are exported and verified offline; copies that were tampered with are refused")
	vendorFile, customerFile := s.path("vendor.json"), s.path("customer.json")
	pins := []string{"--pin", domain + "/control-plane=" + s.path("acme", "log.pub"), "--pin",
		domain + "/appliance/eu-1=" + s.path("customer", "data", "log.pub"),
		"--operator-key", s.path("acme", "operator", "request.pub"), "--customer-key",
		domain + "/appliance/eu-1=" + s.path("customer", "globex.key.pub"), "--witness-lag", "20s"}
	// Once is not enough: this long into the story each side must have seen nearly all of what the other wrote.
	s.wait("each side has countersigned what the other wrote until now", 60*time.Second, func() bool {
		for file, args := range map[string][]string{vendorFile: {"evidence", "export"}, customerFile: {"local", "evidence"}} {
			_ = os.Remove(file)
			if s.quiet(append(args, "--out", file)...).code != 0 || s.quiet(append([]string{"verify", file}, pins...)...).code != 0 {
				return false
			}
		}
		return true
	})
	s.onRecord(vendorFile)
	s.ok(append([]string{"verify", vendorFile}, pins...)...)
	s.ok(append([]string{"verify", customerFile}, pins...)...)
	s.tamper("one byte changed", "edited", customerFile, pins, func(b *audit.Bundle) {
		e := b.Logs[0].Entries
		e[len(e)/2] = flip(e[len(e)/2])
	})
	s.tamper("one entry dropped", "omitted", vendorFile, pins, func(b *audit.Bundle) {
		l := &b.Logs[0]
		l.Entries = append(l.Entries[:3:3], l.Entries[4:]...)
		if len(l.Hashes) > 4 {
			l.Hashes = append(l.Hashes[:3:3], l.Hashes[4:]...)
		}
	})
	s.tamper("one document left out", "omitted", customerFile, pins, func(b *audit.Bundle) {
		b.Documents = b.Documents[:len(b.Documents)-1]
	})
	s.fork(customerFile, pins)
	for _, f := range []string{vendorFile, customerFile} {
		if bytes.Contains(s.read(f), []byte(canary)) {
			s.fail("the value of a secret is in %s", f)
		}
	}
}

// onRecord finds each refusal of step 2 in the vendor's log.
func (s *story) onRecord(file string) {
	b, err := audit.ParseBundle(s.read(file))
	s.must(err, file)
	var refused []string
	for _, leaf := range b.Logs[0].Entries {
		e, err := audit.ParseEntry([]byte(leaf))
		s.must(err, "entry")
		if e.Kind == "refused/1" || e.Fault != "" {
			refused = append(refused, string(e.Body)+e.Detail)
		}
	}
	for _, want := range []string{"audience", "is registered", "ran out", "used before", "at most"} {
		if !strings.Contains(strings.Join(refused, "\n"), want) {
			s.fail("the refusal with %q is not on record", want)
		}
	}
	s.note("each refusal of step 2 is on record in the vendor's log: %d entries", len(refused))
}

// flip changes one letter of a body.
func flip(text string) string {
	i := strings.LastIndexAny(text, "0123456789abcdef")
	b := []byte(text)
	b[i] ^= 1
	return string(b)
}

// tamper writes a changed copy and expects verify to find it.
func (s *story) tamper(what, breach, file string, pins []string, change func(*audit.Bundle)) {
	b, err := audit.ParseBundle(s.read(file))
	s.must(err, file)
	change(&b)
	out, err := json.Marshal(b)
	s.must(err, "bundle")
	name := s.write(string(out), strings.ReplaceAll(what, " ", "-")+".json")
	s.note("%s:", what)
	s.refused(3, "REFUSED ("+breach+")", append([]string{"verify", name}, pins...)...)
}

// fork lets the owner of the log sign another history of the same size: only a witness finds that.
func (s *story) fork(file string, pins []string) {
	b, err := audit.ParseBundle(s.read(file))
	s.must(err, file)
	signer, err := readSigner(s.path("customer", "data", "signing.key"))
	s.must(err, "signing key")
	l := &b.Logs[0]
	var log audit.Log
	for i, e := range l.Entries {
		if i == 2 {
			e = flip(e)
		}
		log = log.AppendLeaf([]byte(e))
	}
	ns, err := audit.NoteSigner(l.Origin, signer)
	s.must(err, "signer")
	cp, err := audit.Checkpoint(l.Origin, log.Size(), log.Root(), ns)
	s.must(err, "checkpoint")
	l.Checkpoints = append(l.Checkpoints, string(cp))
	out, err := json.Marshal(b)
	s.must(err, "bundle")
	s.note("a forked checkpoint, signed by the log's own key:")
	s.refused(3, "", append([]string{"verify", s.write(string(out), "fork.json")}, pins...)...)
}

// metrics is step 9: each role tells Prometheus, and the management plane sees counts and health.
func (s *story) metricsOf() []string {
	var roles []string
	for r := range s.metrics {
		roles = append(roles, r)
	}
	sort.Strings(roles)
	return roles
}

func (s *story) scrape() {
	s.title(9, "Each role's metrics are scraped; the management plane sees the control plane's health and nothing more")
	for _, role := range s.metricsOf() {
		addr := s.metrics[role]
		code, body, err := s.get(http.DefaultClient, "http://"+addr+"/metrics")
		if err != nil || code != http.StatusOK {
			s.fail("%s: %d, %v", role, code, err)
		}
		p := expfmt.NewTextParser(model.UTF8Validation)
		families, err := p.TextToMetricFamilies(strings.NewReader(body))
		s.must(err, "the metrics of "+role)
		own := 0
		for name := range families {
			if strings.HasPrefix(name, "demarc_") {
				own++
			}
		}
		ready, _, err := s.get(http.DefaultClient, "http://"+addr+"/readyz")
		if own == 0 || err != nil || ready != http.StatusOK {
			s.fail("%s: %d metrics of its own, readyz %d, %v", role, own, ready, err)
		}
		s.note("%s at %s: %d metrics, of them %d demarc_*, readyz %d", role, addr, len(families), own, ready)
	}
	s.prometheus()
	s.wait("the management plane has heard", 30*time.Second, func() bool {
		return strings.Contains(s.quiet("management", "list", "--socket", s.managed).out, "ok")
	})
	out := s.ok("management", "list", "--socket", s.managed)
	for _, word := range []string{"globex", "eu-1", "notes", canary} {
		if strings.Contains(out, word) {
			s.fail("the management plane knows %q", word)
		}
	}
}

// outage is step 10: the control plane dies whole, and comes back.
func (s *story) outage() {
	s.title(10, "The control plane is killed whole: the application and its doors go on. It comes back: so does the appliance")
	for _, n := range s.nodes {
		s.stop(n.name, syscall.SIGKILL)
	}
	s.note("cp-1, cp-2 and cp-3 were killed with SIGKILL")
	s.wait("the appliance notices", 30*time.Second, func() bool {
		var st struct {
			Connected bool `json:"connected"`
		}
		return s.ask(&st, "local", "status") && !st.Connected
	})
	s.enters("127.0.0.2", true)
	s.ok("local", "status")
	for _, n := range s.nodes {
		s.startNode(n)
	}
	took := s.wait("the appliance is back without help", 90*time.Second, func() bool {
		a := s.seen("eu-1")
		return a.Online && a.State == "deployed"
	})
	s.note("back after %s, with nothing lost", took.Round(time.Millisecond))
	s.ok("appliance", "list")
	s.ok("probe", "--appliance", "eu-1", "--count", "20", "--rate", "100", "--timeout", "60s")
}

// sockets reads from the kernel which TCP sockets of a process listen, and which UDP sockets it has.
func sockets(pid int) (listeners, datagrams []string, err error) {
	inodes := map[string]bool{}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return nil, nil, err
	}
	for _, fd := range fds {
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name()))
		if inode, ok := strings.CutPrefix(to, "socket:["); err == nil && ok {
			inodes[strings.TrimSuffix(inode, "]")] = true
		}
	}
	for _, table := range []struct {
		name, state string
		to          *[]string
	}{{"tcp", "0A", &listeners}, {"tcp6", "0A", &listeners}, {"udp", "", &datagrams}, {"udp6", "", &datagrams}} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", pid, table.name))
		if err != nil {
			continue // no such family on this machine
		}
		for in := bufio.NewScanner(f); in.Scan(); {
			col := strings.Fields(in.Text())
			if len(col) < 10 || !inodes[col[9]] || (table.state != "" && col[3] != table.state) {
				continue
			}
			*table.to = append(*table.to, kernelAddr(col[1]))
		}
		f.Close()
	}
	return listeners, datagrams, nil
}

// kernelAddr spells an address of /proc/net: words in host order, in hex.
func kernelAddr(s string) string {
	host, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(host)
	n, perr := strconv.ParseUint(port, 16, 16)
	if err != nil || perr != nil || len(b)%4 != 0 {
		return s
	}
	for i := 0; i < len(b); i += 4 {
		b[i], b[i+1], b[i+2], b[i+3] = b[i+3], b[i+2], b[i+1], b[i]
	}
	return net.JoinHostPort(net.IP(b).String(), strconv.FormatUint(n, 10))
}
