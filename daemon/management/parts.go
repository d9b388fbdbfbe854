// SPDX-License-Identifier: Apache-2.0

package management

import (
	"crypto/tls"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/seal"
	"github.com/demarc-dev/demarc/telemetry"
)

// Parts makes the parts of a management plane. Its sockets are bound here, so that an address in use is an error at once.
func Parts(cfg *configs.Management, build string, log *slog.Logger) ([]daemon.Part, error) {
	const op = "management.Parts"
	var peers []Peer
	for _, c := range cfg.ControlPlanes {
		b, err := os.ReadFile(c.LogKeyFile)
		if err != nil {
			return nil, fault.Because(err, op, fault.Invalid, "the log key of %q can't be read: %s", c.Name, c.LogKeyFile)
		}
		key, err := seal.ParseKey(b)
		if err != nil {
			return nil, fault.Because(err, op, fault.Invalid, "log_key_file of %q: %s: %s", c.Name, c.LogKeyFile, fault.Text(err))
		}
		peers = append(peers, Peer{c.Name, c.TrustDomain, key})
	}
	s, err := New(Options{Peers: peers, Dir: cfg.Dir, Now: time.Now, Log: log})
	if err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(cfg.Certificate.File, cfg.Certificate.Key)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the certificate can't be read: %v", err)
	}
	reg := telemetry.New(configs.RoleManagement, build)
	reg.Gauge("demarc_control_planes", "Control planes that the file names.", func() float64 { return float64(len(peers)) })
	reg.Gauge("demarc_control_planes_heard",
		"Control planes that reported within the last minute.", func() float64 { return float64(s.heard(time.Minute)) })

	ln, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "listen: %v", err)
	}
	own, err := daemon.Listen(cfg.Socket)
	if err != nil {
		_ = ln.Close()
		return nil, err
	}
	in, conf := s.Listen(ln, &cert)
	parts := []daemon.Part{own.HTTP("socket", s.OwnerHandler(), log),
		daemon.HTTP("door", in, conf, s.Handler(), log)}
	if cfg.Metrics.Listen != "" {
		reads, err := net.Listen("tcp", cfg.Metrics.Listen)
		if err != nil {
			_, _ = ln.Close(), own.Close()
			return nil, fault.Because(err, op, fault.Unavailable, "metrics.listen: %v", err)
		}
		parts = append(parts, daemon.HTTP("metrics", reads, nil, reg.Handler(), log))
	}
	return append(parts, daemon.NewNotify(reg.Health, log)), nil
}

// heard counts the control planes that reported within d.
func (s *Server) heard(d time.Duration) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, x := range s.last {
		if s.Now().Sub(x.at) <= d {
			n++
		}
	}
	return n
}
