// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"os"
	"time"

	"connectrpc.com/connect"

	"github.com/demarc-dev/demarc/api"
	managementv1 "github.com/demarc-dev/demarc/api/management/v1"
	"github.com/demarc-dev/demarc/api/management/v1/managementv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
)

func trimmed(b []byte) string { return string(bytes.TrimSpace(b)) }

// reportWait bounds one message to the management plane.
const reportWait = 5 * time.Second

// tellManagement sends the one closed message while this node leads. The management plane being away is nobody's trouble. It recognises this
// node by the bundle that the log's key signed: if it holds an older one, or refuses this node, it is handed the newest, over a connection
// that shows no certificate, since its CA may be one that is not known there yet.
func (n *node) tellManagement(ctx context.Context, ready func()) error {
	const op = "controlplane.management"
	link := n.cfg.Management
	ca, err := os.ReadFile(link.CAFile)
	pool := x509.NewCertPool()
	if err != nil || !pool.AppendCertsFromPEM(ca) {
		return fault.Because(err, op, fault.Invalid, "management.ca_file holds no certificate: %s", link.CAFile)
	}
	tr := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return n.files.Leaf() }}}
	defer tr.CloseIdleConnections()
	client := managementv1connect.NewManagementClient(&http.Client{Transport: tr, Timeout: reportWait}, link.URL, connect.WithReadMaxBytes(4<<10))
	bare := &http.Transport{ForceAttemptHTTP2: true, DisableKeepAlives: true, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool}}
	defer bare.CloseIdleConnections()
	hands := managementv1connect.NewManagementClient(&http.Client{Transport: bare, Timeout: reportWait}, link.URL, connect.WithReadMaxBytes(4<<10))
	ready()
	wait := time.Second
	var tried uint64 // the newest bundle that it was told of
	for {
		if !n.awaitNews(ctx, wait, tried) {
			return nil
		}
		if n.Leader() != n.cfg.Name {
			wait = time.Second
			continue
		}
		wait, tried = 10*time.Second, n.book.View().Bundle()
		res, err := client.Report(ctx, connect.NewRequest(n.report()))
		if ctx.Err() == nil && (err != nil || res.Msg.GetBundleHeld() < n.book.View().Bundle()) {
			if handed := n.handBundle(ctx, hands); handed != nil && ctx.Err() == nil {
				n.log.Warn("the management plane did not take the CAs", "err", handed)
			} else if handed == nil && err != nil {
				res, err = client.Report(ctx, connect.NewRequest(n.report()))
			}
		}
		if err != nil {
			if ctx.Err() == nil {
				n.log.Warn("the management plane was not told", "err", api.FromWire(op, err))
			}
			continue
		}
		if s := res.Msg.GetNextSeconds(); s > 0 && s < 3600 {
			wait = time.Duration(s) * time.Second
		}
	}
}

// awaitNews waits for the next report: so long, or until this node leads and its book has a bundle that the management plane was not told
// of, so that a CA which was retired counts there no longer than here. It reports whether ctx goes on.
func (n *node) awaitNews(ctx context.Context, wait time.Duration, told uint64) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		changed := n.book.Changed()
		if told > 0 && n.book.View().Bundle() > told && n.Leader() == n.cfg.Name {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case <-changed:
		}
	}
}

// handBundle gives the management plane the newest bundle, signed.
func (n *node) handBundle(ctx context.Context, to managementv1connect.ManagementClient) error {
	const op = "controlplane.management"
	ctx, cancel := context.WithTimeout(ctx, 2*reportWait)
	defer cancel()
	if err := n.Read(ctx); err != nil {
		return err
	}
	sealed, err := n.server.authority.SignedBundle()
	if err != nil {
		return err
	}
	_, err = to.Bundle(ctx, connect.NewRequest(&managementv1.BundleRequest{Sealed: sealed}))
	return api.FromWire(op, err)
}

// report makes the message: counts and health, and there is no field for anything else.
func (n *node) report() *managementv1.ReportRequest {
	st := n.raft.State()
	out := &managementv1.ReportRequest{Build: n.build, Node: n.cfg.Name, Health: "ok", NodesVoting: uint32(st.Voters), NodesReachable: uint32(st.Reachable)}
	if st.Reachable < st.Voters {
		out.Health = "degraded"
	}
	page := n.book.View()
	for _, a := range page.Appliances() {
		switch a.Status {
		case book.Registered:
			out.AppliancesRegistered++
		case book.Enrolled:
			out.AppliancesEnrolled++
		case book.Banned:
			out.AppliancesBanned++
		}
		if page.Here(a) {
			out.AppliancesOnline++
		}
	}
	return out
}
