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
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/telemetry"
)

// Parts makes the parts of a management plane. Its sockets are bound here, so that an address in use is an error at once.
func Parts(cfg *configs.Management, build string, log *slog.Logger) ([]daemon.Part, error) {
	const op = "management.Parts"
	var peers []Peer
	for _, c := range cfg.ControlPlanes {
		b, err := os.ReadFile(c.BundleFile)
		if err != nil {
			return nil, fault.Because(err, op, fault.Invalid, "the bundle of %q can't be read: %s", c.Name, c.BundleFile)
		}
		cas, err := identity.ParseBundle(b, c.TrustDomain)
		if err != nil {
			return nil, fault.At(op, "", err)
		}
		peers = append(peers, Peer{c.Name, c.TrustDomain, cas})
	}
	s, err := New(peers, time.Now)
	if err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(cfg.Certificate.File, cfg.Certificate.Key)
	if err != nil {
		return nil, fault.Because(err, op, fault.Invalid, "the certificate can't be read: %v", err)
	}
	reg := telemetry.New(configs.RoleManagement, build)
	reg.Gauge("demarc_control_planes", "Control planes that the file names.", func() float64 { return float64(len(peers)) })
	reg.Gauge("demarc_control_planes_heard", "Control planes that reported within the last minute.", func() float64 { return float64(s.heard(time.Minute)) })

	door, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "listen: %v", err)
	}
	own, err := daemon.Socket(cfg.Socket)
	if err != nil {
		_ = door.Close()
		return nil, err
	}
	parts := []daemon.Part{daemon.HTTP("socket", own, nil, s.OwnerHandler(), log),
		daemon.HTTP("door", door, identity.Server(identity.Fixed(&cert, s.Roots()), s.Admit, true, "h2"), s.Handler(), log)}
	if cfg.Metrics.Listen != "" {
		ln, err := net.Listen("tcp", cfg.Metrics.Listen)
		if err != nil {
			_, _ = door.Close(), own.Close()
			return nil, fault.Because(err, op, fault.Unavailable, "metrics.listen: %v", err)
		}
		parts = append(parts, daemon.HTTP("metrics", ln, nil, reg.Handler(), log))
	}
	return append(parts, daemon.NewNotify(reg.Health, log)), nil
}

// heard counts the control planes that reported within d.
func (s *Server) heard(d time.Duration) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, x := range s.last {
		if s.now().Sub(x.at) <= d {
			n++
		}
	}
	return n
}
