// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/feature/buildfeatures"
	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tsnet"

	"github.com/demarc-dev/demarc/fault"
)

// TailnetConfig is how a node joins a tailnet: Tailscale's, or that of another control server.
type TailnetConfig struct {
	ControlURL  string // "" is Tailscale's own
	Credentials func() (Credentials, error)
	Hostname    string   // of the node
	Dir         string   // of the node's state; one node at a time
	Ephemeral   bool     // the tailnet forgets the node when it leaves
	Addresses   []string // that the route may dial, host:port; none: it dials nothing
	Doors       bool     // the node may listen; else it accepts nothing from the tailnet
	Tags        []string // asked for, tag:NAME each; the policy says whether the credentials may hand them out
	Wait        time.Duration
	MaxHeld     int // connections at once, dialled and taken in together; 0 is [MaxHeld]
	Logger      *slog.Logger
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

	stop    context.CancelFunc // of watch
	watched chan struct{}      // closed when watch has ended
	local   *http.Transport    // of client
	gone    chan struct{}      // closed when the tailnet wants credentials again
	held    held
	mu      sync.Mutex // over the next two
	doors   []net.Listener
	closed  bool
}

// busy are the folders of nodes that are up, or on their way up or down.
var busy sync.Map

// errLogin is of a node that has a state, and still can't be up without credentials.
var errLogin = errors.New("the tailnet asks for credentials")

// Join brings a node up; ctx bounds the wait. The node lives until Close. A node that is enrolled already comes back without
// its credentials, so that a spent key or an issuer that is away does not keep it out; only where the tailnet asks for them
// again, because the node's key has expired for instance, and for a new node, they are read.
func Join(ctx context.Context, cfg TailnetConfig) (*Node, error) {
	const op = "mesh.Join"
	if buildfeatures.HasPeerAPIServer {
		// tsnet would open a TCP listener of its own on every address of the host, for services between peers that nobody
		// here uses. No setting keeps it shut, only this tag does; a process that promises to listen to nobody must not start it.
		return nil, fault.New(op, fault.Unavailable, "this build would listen on the host for the tailnet: build with the tag "+
			"ts_omit_peerapiserver, as make does")
	}
	if buildfeatures.HasC2N {
		// The library would answer its coordinator's questions about the process: stack traces, a heap profile, counters. Nobody
		// here asks them, no setting keeps them out, and the customer would not see that they were asked.
		return nil, fault.New(op, fault.Unavailable, "this build would tell the tailnet's coordinator of this process: build with the tag "+
			"ts_omit_c2n, as make does")
	}
	if cfg.Dir == "" || cfg.Hostname == "" || cfg.Credentials == nil {
		return nil, fault.New(op, fault.Invalid, "a tailnet node needs a host name, credentials and a folder for its state")
	}
	if len(cfg.Addresses) > 0 {
		if err := checkAddresses(NameTailscale, cfg.Addresses); err != nil {
			return nil, err
		}
	}
	if cfg.Wait <= 0 {
		cfg.Wait = 10 * time.Second
	}
	if cfg.MaxHeld <= 0 {
		cfg.MaxHeld = MaxHeld
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the folder of the tailnet node's state can't be made")
	}
	if err := quiet(cfg.ControlURL); err != nil {
		return nil, err
	}
	again := false
	if _, err := os.Stat(filepath.Join(cfg.Dir, "tailscaled.state")); err == nil {
		n, err := bring(ctx, cfg, Credentials{})
		if !errors.Is(err, errLogin) {
			return n, err
		}
		again = true
		cfg.Logger.Info("the tailnet asks for credentials again", "hostname", cfg.Hostname)
	}
	c, err := cfg.Credentials()
	if err == nil {
		err = c.check(cfg.Tags)
	}
	if err != nil {
		return nil, For(Settings, err)
	}
	n, err := bring(ctx, cfg, c)
	if again && ReasonOf(err) == TailnetKey {
		err = For(TailnetExpired, fault.Because(err, op, fault.Denied,
			"the key of this node has expired or was taken away, and the tailnet refuses the credentials to renew it: %s", fault.Text(err)))
	}
	return n, err
}

// bring starts one node. Start and Close of the library's node never overlap: the one that races leaks the whole stack. Start
// has no bound where it asks an issuer for a key, so where ctx ends first, the node is closed as soon as Start comes back,
// and its folder is taken until then.
func bring(ctx context.Context, cfg TailnetConfig, c Credentials) (*Node, error) {
	const op = "mesh.Join"
	if _, taken := busy.LoadOrStore(cfg.Dir, true); taken {
		return nil, fault.New(op, fault.Unavailable, "another tailnet node is still using the folder of this one")
	}
	debug := func(format string, args ...any) { cfg.Logger.Debug("tailnet", "text", fmt.Sprintf(format, args...)) }
	s := &tsnet.Server{Dir: cfg.Dir, Hostname: cfg.Hostname, ControlURL: cfg.ControlURL, Ephemeral: cfg.Ephemeral, AdvertiseTags: cfg.Tags,
		Logf: debug, UserLogf: debug}
	c.put(s, cfg.Ephemeral)
	n := &Node{cfg: cfg, server: s, watched: make(chan struct{}), gone: make(chan struct{}), held: held{most: cfg.MaxHeld}}
	started := make(chan error, 1)
	go func() { started <- s.Start() }()
	var err error
	select {
	case err = <-started:
	case <-ctx.Done():
		go func() {
			<-started
			_ = n.end()
		}()
		return nil, For(TailnetUnreached, fault.Because(ctx.Err(), op, fault.Unavailable, "the tailnet node does not start: whoever makes its "+
			"key does not answer"))
	}
	if err != nil {
		err = unstarted(err)
	} else if err = sweep(cfg.Dir); err == nil {
		err = n.up(ctx, c == Credentials{})
	}
	if err != nil {
		_ = n.end() // it never came up
		return nil, err
	}
	life, stop := context.WithCancel(context.Background())
	n.stop = stop
	go n.watch(life)
	return n, nil
}

// endWait is how long the end of a node may take.
const endWait = 20 * time.Second

// unstarted says why the library's node does not start: the API that makes keys may have refused to make one.
func unstarted(cause error) error {
	const op = "mesh.Join"
	if refusal(cause.Error()) == TailnetKey {
		return For(TailnetKey,
			fault.Because(cause, op, fault.Denied, "the tailnet node does not start: whoever makes its key refuses to: %.300v", cause))
	}
	return For(TailnetUnreached, fault.Because(cause, op, fault.Unavailable, "the tailnet node does not start: %.300v", cause))
}

// end closes the node's connections, then the library's node, and gives its folder back. Where the library does not end, the
// folder stays taken.
func (n *Node) end() error {
	ended := make(chan error, 1)
	go func() {
		n.quiesce()
		err := n.server.Close()
		if n.local != nil {
			n.local.CloseIdleConnections()
		}
		busy.Delete(n.cfg.Dir)
		ended <- err
	}()
	select {
	case err := <-ended:
		return err
	case <-time.After(endWait):
		return fault.New("mesh.Close", fault.Unavailable, "the tailnet node does not end: its folder is taken until it does, or until the "+
			"program ends")
	}
}

// up waits until the node is up.
func (n *Node) up(ctx context.Context, bare bool) error {
	const op = "mesh.Join"
	client, err := n.server.LocalClient()
	if err != nil {
		return fault.At(op, fault.Internal, err)
	}
	if client.Transport == nil && client.Dial != nil { // one whose idle connections end with the node
		n.local = &http.Transport{DialContext: client.Dial}
		client.Transport = n.local
	}
	n.client = client
	// Before it is up: a node that may not listen never has a moment in which it accepts.
	prefs := &ipn.MaskedPrefs{ShieldsUpSet: true, Prefs: ipn.Prefs{ShieldsUp: !n.cfg.Doors}}
	if _, err := client.EditPrefs(ctx, prefs); err != nil {
		return fault.Because(err, op, fault.Internal, "the tailnet node does not take its settings")
	}
	if err := n.lets(ctx, bare); err != nil {
		return err
	}
	status, err := n.server.Up(ctx)
	if err != nil {
		return n.notUp(err)
	}
	n.addrs = slices.Clone(status.TailscaleIPs)
	return nil
}

// approvalWait is for how long a node may be without approval before its join ends: coordinators that approve by themselves do it
// within one more answer.
const approvalWait = 5 * time.Second

// lets waits for the tailnet to let the node in, or to say why it does not. One that has no credentials to show does not wait for
// somebody who would log it in.
func (n *Node) lets(ctx context.Context, bare bool) error {
	bus, err := n.client.WatchIPNBus(ctx, ipn.NotifyInitialState)
	if err != nil {
		return n.notUp(err)
	}
	defer func() { _ = bus.Close() }()
	var patience *time.Timer
	for {
		m, err := bus.Next()
		switch {
		case err != nil:
			return n.notUp(err)
		case m.State != nil && *m.State == ipn.Running:
			return nil
		case bare && (m.ErrMessage != nil || m.BrowseToURL != nil && *m.BrowseToURL != "" || m.State != nil && *m.State == ipn.NeedsLogin):
			return errLogin
		case m.ErrMessage != nil:
			return refused(*m.ErrMessage)
		case m.State == nil:
		case *m.State == ipn.NeedsMachineAuth && patience == nil:
			patience = time.AfterFunc(approvalWait, func() { _ = bus.Close() }) // ends Next
			defer patience.Stop()
		case *m.State != ipn.NeedsMachineAuth && patience != nil && patience.Stop():
			patience = nil
		}
	}
}

// refused is the error of a node that the coordinator turned away, in its own words: they are quoted and short.
func refused(words string) error {
	const op = "mesh.Join"
	switch r := refusal(words); r {
	case TailnetLogs:
		return For(r, fault.New(op, fault.Denied, "the tailnet wants its nodes to send logs, which this one never does: it says %.200q", words))
	case TailnetKey:
		return For(r, fault.New(op, fault.Denied, "the tailnet does not let the node in: its auth key may be wrong, expired, used up, or not "+
			"for its tags: it says %.200q", words))
	}
	return For(Other, fault.New(op, fault.Denied, "the tailnet does not let the node in: it says %.200q", words))
}

// watch looks for the end of the node's key. Then it shuts what the node listens on, so that whoever serves there joins again.
func (n *Node) watch(ctx context.Context) {
	defer close(n.watched)
	for ctx.Err() == nil {
		if n.expires(ctx) {
			n.cfg.Logger.Warn("the tailnet asks for credentials: the node's key has expired, or was taken away", "hostname", n.cfg.Hostname)
			close(n.gone)
			n.shut()
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// expires tells that the node needs to log in; false is that the node's own bus broke off.
func (n *Node) expires(ctx context.Context) bool {
	bus, err := n.client.WatchIPNBus(ctx, ipn.NotifyInitialState)
	if err != nil {
		return false
	}
	defer func() { _ = bus.Close() }()
	for {
		m, err := bus.Next()
		if err != nil {
			return false
		}
		if m.State != nil && *m.State == ipn.NeedsLogin {
			return true
		}
	}
}

// shut closes what the node listens on.
func (n *Node) shut() {
	n.mu.Lock()
	doors := n.doors
	n.doors = nil
	n.mu.Unlock()
	for _, l := range doors {
		_ = l.Close()
	}
}

// Gone is closed when the tailnet wants credentials again: close the node then, and join anew.
func (n *Node) Gone() <-chan struct{} { return n.gone }

// notUp says why a node is not up, as far as the node knows.
func (n *Node) notUp(cause error) error {
	const op = "mesh.Join"
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	status, err := n.client.StatusWithoutPeers(ctx)
	switch {
	case err != nil:
		return For(TailnetUnreached, fault.At(op, fault.Unavailable, cause))
	case status.BackendState == ipn.NeedsMachineAuth.String():
		return For(TailnetApproval, fault.Because(cause, op, fault.Denied, "the tailnet waits for its administrator to approve the node"))
	}
	return For(TailnetUnreached, fault.Because(cause, op, fault.Unavailable, "the tailnet node is not up (%.32s): %.200s", status.BackendState,
		strings.Join(status.Health, "; ")))
}

// Name names the route.
func (n *Node) Name() string { return NameTailscale }

// Addrs gives the node's own addresses on the tailnet.
func (n *Node) Addrs() []netip.Addr { return slices.Clone(n.addrs) }

// Dial connects to addr, or to the first of the configured addresses that answers, over the tailnet alone: a host that is no
// peer of the tailnet is not dialled, neither through the host's network nor after a question to its resolver.
func (n *Node) Dial(ctx context.Context, addr string) (net.Conn, error) {
	select {
	case <-n.gone:
		return nil, For(TailnetExpired, fault.New("mesh.Dial", fault.Denied, "route tailscale: the key of this node has expired: it must join "+
			"again"))
	default:
	}
	if err := n.held.room(); err != nil {
		return nil, err
	}
	return dialList(ctx, NameTailscale, addr, n.cfg.Addresses, n.cfg.Wait, func(ctx context.Context, a string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(a)
		if err != nil {
			return nil, fault.At("mesh.Dial", fault.Invalid, err)
		}
		ip, err := n.await(ctx, host)
		if err != nil {
			return nil, err
		}
		c, err := n.server.Dial(ctx, "tcp", net.JoinHostPort(ip.String(), port))
		if err != nil {
			return nil, err
		}
		return n.held.take(c)
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
			return netip.Addr{}, fault.Because(err, "mesh.Dial", fault.Unavailable,
				"route tailscale: the tailnet has no peer %.64q, or does not let this node see it", host)
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
	inner, err := n.server.Listen("tcp", addr)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the tailnet node can't listen at %.64s", addr)
	}
	l := &door{inner, &n.held}
	n.mu.Lock()
	n.doors = append(n.doors, l)
	n.mu.Unlock()
	select {
	case <-n.gone:
		n.shut() // the watch may have been there before this listener
	default:
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

// Close takes the node off the tailnet and closes its listeners and connections. A second call does nothing.
func (n *Node) Close() error {
	n.mu.Lock()
	again := n.closed
	n.closed = true
	n.mu.Unlock()
	if again {
		return nil
	}
	n.stop()
	<-n.watched
	return fault.At("mesh.Close", "", n.end())
}
