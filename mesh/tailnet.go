// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/envknob"
	"tailscale.com/feature/buildfeatures"
	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tsnet"

	"github.com/demarc-dev/demarc/fault"
)

// TailnetConfig is how a node joins a tailnet: Tailscale's, or that of another control server.
type TailnetConfig struct {
	ControlURL string   // "" is Tailscale's own
	AuthKey    string   // used until the node is enrolled; its state in Dir serves afterwards
	Hostname   string   // of the node
	Dir        string   // of the node's state
	Ephemeral  bool     // the tailnet forgets the node when it leaves
	Addresses  []string // that the route may dial, host:port; none: it dials nothing
	Doors      bool     // the node may listen; else it accepts nothing from the tailnet
	Tags       []string // asked for, tag:NAME each; the policy says whether the credentials may hand them out
	Wait       time.Duration
	Logger     *slog.Logger
}

// Peer is who is behind an address of the tailnet, as the tailnet says: a hint for applications, never a proof.
type Peer struct {
	Login string // of a person; empty for a tagged device
	Name  string
	Node  string
	Tags  []string
}

// Node is this process's own node on a tailnet, and the route over it. Safe for concurrent use.
type Node struct {
	cfg    TailnetConfig
	server *tsnet.Server
	client *local.Client
	addrs  []netip.Addr
}

// quiet sees to it that no log leaves the process and that no gateway is asked to open a port. The library takes both from
// the environment of the process alone, and reads it without a lock: so it is written once, before the first node.
var quiet = sync.OnceFunc(func() {
	envknob.SetNoLogsNoSupport()
	envknob.Setenv("TS_DISABLE_PORTMAPPER", "true")
})

// Join brings a node up; ctx bounds the wait. The node lives until Close.
func Join(ctx context.Context, cfg TailnetConfig) (*Node, error) {
	const op = "mesh.Join"
	if buildfeatures.HasPeerAPIServer {
		// tsnet would open a TCP listener of its own on every address of the host, for services between peers that nobody
		// here uses. No setting keeps it shut, only this tag does; a process that promises to listen to nobody must not start it.
		return nil, fault.New(op, fault.Unavailable, "this build would listen on the host for the tailnet: build with the tag ts_omit_peerapiserver, as make does")
	}
	if cfg.Dir == "" || cfg.Hostname == "" {
		return nil, fault.New(op, fault.Invalid, "a tailnet node needs a host name and a folder for its state")
	}
	if len(cfg.Addresses) > 0 {
		if err := checkAddresses(NameTailscale, cfg.Addresses); err != nil {
			return nil, err
		}
	}
	if cfg.Wait <= 0 {
		cfg.Wait = 10 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	quiet()
	debug := func(format string, args ...any) { cfg.Logger.Debug("tailnet", "text", fmt.Sprintf(format, args...)) }
	s := &tsnet.Server{Dir: cfg.Dir, Hostname: cfg.Hostname, ControlURL: cfg.ControlURL, AuthKey: cfg.AuthKey, Ephemeral: cfg.Ephemeral, AdvertiseTags: cfg.Tags, Logf: debug, UserLogf: debug}
	n := &Node{cfg: cfg, server: s}
	if err := n.up(ctx); err != nil {
		_ = s.Close() // it never came up
		return nil, err
	}
	return n, nil
}

func (n *Node) up(ctx context.Context) error {
	const op = "mesh.Join"
	if err := n.server.Start(); err != nil {
		return fault.Because(err, op, fault.Unavailable, "the tailnet node does not start")
	}
	client, err := n.server.LocalClient()
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	n.client = client
	// Before it is up: a node that may not listen never has a moment in which it accepts.
	prefs := &ipn.MaskedPrefs{ShieldsUpSet: true, Prefs: ipn.Prefs{ShieldsUp: !n.cfg.Doors}}
	if _, err := client.EditPrefs(ctx, prefs); err != nil {
		return fault.Because(err, op, fault.Internal, "the tailnet node does not take its settings")
	}
	status, err := n.server.Up(ctx)
	if err != nil {
		return n.notUp(err)
	}
	n.addrs = slices.Clone(status.TailscaleIPs)
	return nil
}

// notUp says why a node is not up, as far as the node knows.
func (n *Node) notUp(cause error) error {
	const op = "mesh.Join"
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	status, err := n.client.StatusWithoutPeers(ctx)
	switch {
	case err != nil:
		return fault.At(op, fault.Unavailable, cause)
	case strings.Contains(strings.ToLower(cause.Error()), "authkey"): // in the control server's own words
		return fault.Because(cause, op, fault.Denied, "the tailnet does not let the node in: its auth key may be spent, expired or wrong")
	case status.BackendState == ipn.NeedsMachineAuth.String():
		return fault.Because(cause, op, fault.Denied, "the tailnet waits for its administrator to approve the node")
	}
	return fault.Because(cause, op, fault.Unavailable, "the tailnet node is not up (%.32s): %.200s", status.BackendState, strings.Join(status.Health, "; "))
}

// Name names the route.
func (n *Node) Name() string { return NameTailscale }

// Addrs gives the node's own addresses on the tailnet.
func (n *Node) Addrs() []netip.Addr { return slices.Clone(n.addrs) }

// Dial connects to addr, or to the first of the configured addresses that answers, over the tailnet alone: a host that is no
// peer of the tailnet is not dialled, neither through the host's network nor after a question to its resolver.
func (n *Node) Dial(ctx context.Context, addr string) (net.Conn, error) {
	return dialList(ctx, NameTailscale, addr, n.cfg.Addresses, n.cfg.Wait, func(ctx context.Context, a string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(a)
		if err != nil {
			return nil, fault.At("mesh.Dial", fault.Invalid, err)
		}
		ip, err := n.await(ctx, host)
		if err != nil {
			return nil, err
		}
		return n.server.Dial(ctx, "tcp", net.JoinHostPort(ip.String(), port))
	})
}

// await gives a peer's address once the node knows the peer: a dial before that would stall for seconds.
func (n *Node) await(ctx context.Context, host string) (netip.Addr, error) {
	tick := time.NewTicker(25 * time.Millisecond)
	defer tick.Stop()
	for {
		status, err := n.client.Status(ctx)
		if err == nil {
			for _, p := range status.Peer {
				if ip, ok := match(p, host); ok {
					return ip, nil
				}
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return netip.Addr{}, fault.Because(err, "mesh.Dial", fault.Unavailable, "route tailscale: the tailnet has no peer %.64q, or does not let this node see it", host)
		}
	}
}

// match tells whether host is one of the peer's addresses, its full name on the tailnet or the first label of it.
func match(p *ipnstate.PeerStatus, host string) (netip.Addr, bool) {
	if len(p.TailscaleIPs) == 0 || p.Expired {
		return netip.Addr{}, false
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip, slices.Contains(p.TailscaleIPs, ip)
	}
	full := strings.TrimSuffix(p.DNSName, ".")
	short, _, _ := strings.Cut(full, ".")
	host = strings.TrimSuffix(host, ".")
	return p.TailscaleIPs[0], full != "" && (strings.EqualFold(host, full) || strings.EqualFold(host, short))
}

// Listen opens a listener on the node's own addresses: no socket on the host.
func (n *Node) Listen(_ context.Context, addr string) (net.Listener, error) {
	const op = "mesh.Listen"
	if !n.cfg.Doors {
		return nil, fault.New(op, fault.Denied, "this node carries the channel to the vendor: it accepts nothing from the tailnet")
	}
	l, err := n.server.Listen("tcp", addr)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the tailnet node can't listen at %.64s", addr)
	}
	return l, nil
}

// WhoIs tells who is behind a connection of the tailnet.
func (n *Node) WhoIs(ctx context.Context, remote netip.AddrPort) (Peer, error) {
	const op = "mesh.WhoIs"
	who, err := n.client.WhoIs(ctx, remote.String())
	if err != nil || who.Node == nil {
		return Peer{}, fault.Because(err, op, fault.NotFound, "the tailnet knows nobody at %s", remote.Addr())
	}
	p := Peer{Node: strings.TrimSuffix(who.Node.Name, "."), Tags: slices.Clone(who.Node.Tags)}
	if len(p.Tags) == 0 && who.UserProfile != nil {
		p.Login, p.Name = who.UserProfile.LoginName, who.UserProfile.DisplayName
	}
	return p, nil
}

// Close takes the node off the tailnet and closes its listeners and connections.
func (n *Node) Close() error {
	return fault.At("mesh.Close", fault.Internal, n.server.Close())
}
