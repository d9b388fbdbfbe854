// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"context"
	"crypto/tls"
	"time"

	"github.com/demarc-dev/demarc/daemon"
	"github.com/demarc-dev/demarc/mesh"
)

const (
	joinWait  = time.Minute // bounds one try to join
	rejoinMax = time.Minute // between two tries
)

// tailnetDoor serves the same door on the vendor's tailnet. Its trouble is never the node's: it is tried again, and where the
// tailnet node's key has expired, with the credentials that the files hold then.
func (n *node) tailnetDoor(ctx context.Context, ready func(), port string, conf *tls.Config) error {
	ready()
	for wait := time.Second; ; wait = min(2*wait, rejoinMax) {
		opened, err := n.serveTailnet(ctx, port, conf)
		if ctx.Err() != nil {
			return nil
		}
		if opened {
			wait = time.Second
		}
		n.log.Warn("the door on the tailnet is shut", "err", err, "again in", wait)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// serveTailnet joins once and serves until the node's key expires or ctx ends.
func (n *node) serveTailnet(ctx context.Context, port string, conf *tls.Config) (opened bool, err error) {
	cfg := daemon.Tailnet(*n.cfg.Tailnet, n.log)
	cfg.Doors, cfg.Credentials = true, n.credentials(cfg.Credentials)
	join, cancel := context.WithTimeout(ctx, joinWait)
	defer cancel()
	tn, err := mesh.Join(join, cfg)
	if err != nil {
		return false, err
	}
	defer func() { _ = tn.Close() }() // the library's own words at the end help nobody
	ln, err := tn.Listen(ctx, ":"+port)
	if err != nil {
		return false, err
	}
	n.log.Info("the door on the tailnet is open", "hostname", cfg.Hostname, "addresses", tn.Addrs(), "port", port)
	return true, n.server.Listener("tailnet", ln, conf, n.log).Run(ctx, func() {})
}

// credentials are those of the files, or the secret of the book that the node's file names. They are opened anew for each join.
func (n *node) credentials(files func() (mesh.Credentials, error)) func() (mesh.Credentials, error) {
	if n.cfg.TailnetSecret == "" {
		return files
	}
	return func() (mesh.Credentials, error) {
		b, err := n.server.authority.Secret(n.cfg.TailnetSecret)
		if err != nil {
			return mesh.Credentials{}, err
		}
		return mesh.CredentialOf(string(b)), nil
	}
}
