// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"time"
)

// prometheus lets a real Prometheus scrape every role, where one is installed.
func (s *story) prometheus() {
	bin, err := exec.LookPath("prometheus")
	if err != nil {
		s.note("no prometheus is installed here: the parser of its own library read them")
		return
	}
	var jobs strings.Builder
	for _, role := range s.metricsOf() {
		fmt.Fprintf(&jobs, "  - {job_name: %s, scrape_interval: 1s, static_configs: [{targets: [%q]}]}\n", role, s.metrics[role])
	}
	conf := s.write("scrape_configs:\n"+jobs.String(), "prometheus", "prometheus.yml")
	addr := s.free()
	log, err := os.Create(s.path("prometheus", "log"))
	s.must(err, "prometheus")
	defer log.Close()
	cmd := exec.Command(bin, "--config.file="+conf, "--web.listen-address="+addr, "--storage.tsdb.path="+s.path("prometheus", "data"))
	cmd.Stdout, cmd.Stderr = log, log
	s.must(cmd.Start(), "prometheus")
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	defer func() { _ = cmd.Process.Kill(); <-done }()
	s.wait("Prometheus has every role up", 30*time.Second, func() bool {
		_, body, err := s.get(http.DefaultClient, "http://"+addr+"/api/v1/query?query=sum(up)")
		return err == nil && strings.Contains(body, fmt.Sprintf(`"%d"]`, len(s.metrics)))
	})
	s.note("a real Prometheus (%s) scrapes all %d roles: sum(up) = %d", bin, len(s.metrics), len(s.metrics))
}

func readSigner(file string) (ed25519.PrivateKey, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, errors.New("no PEM")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	ed, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, errors.New("not Ed25519")
	}
	return ed, nil
}
