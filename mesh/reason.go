// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"errors"
	"net"
	"slices"
	"strings"
	"syscall"

	"github.com/demarc-dev/demarc/fault"
)

// Reason is why a road does not work, out of a closed set. Its spelling is on the wire and on disk: never edited, never reused. It
// says nothing that a stranger or the network chose, so it may be told where a text may not.
type Reason string

// The reasons.
const (
	Unreached      Reason = "unreached"       // nobody answers at its addresses, or the line broke
	ConnRefused    Reason = "conn_refused"    // the host at its address answers, and nothing listens there
	NameUnknown    Reason = "name_unknown"    // the name of its address does not resolve
	ProxyUnreached Reason = "proxy_unreached" // the proxy itself does not answer
	// a node of the vendor's, which was proven, refuses this appliance: it is banned, not registered, or not who it must be
	VendorRefuses    Reason = "vendor_refuses"
	VendorUnready    Reason = "vendor_unready"    // a node of the vendor's, which was proven, does not take the channel now
	NoProof          Reason = "no_proof"          // the platform gives no proof of this appliance's identity
	ClockOff         Reason = "clock_off"         // a certificate is not valid at this host's time
	OwnDisk          Reason = "own_disk"          // the appliance's own book takes nothing
	Settings         Reason = "settings"          // the file, or a file that it names, can't be used
	ProxyRefuses     Reason = "proxy_refuses"     // the proxy wants a user and password, refuses them, or forbids the address
	TLSOpened        Reason = "tls_opened"        // somebody on the path opens TLS, or answers in the vendor's place
	HelloTooLarge    Reason = "hello_too_large"   // a box on the path swallows a first message of TLS that does not fit one packet
	TailnetUnreached Reason = "tailnet_unreached" // the tailnet's coordinator does not answer
	TailnetKey       Reason = "tailnet_key"       // the tailnet refuses the credentials: wrong, expired, used up, or not for these tags
	TailnetApproval  Reason = "tailnet_approval"  // the tailnet's administrator has not approved the node
	TailnetExpired   Reason = "tailnet_expired"   // the node's own key has expired, and the credentials do not renew it
	TailnetLogs      Reason = "tailnet_logs"      // the tailnet wants logs of its nodes, which are never sent
	Other            Reason = "other"
)

// meaning is what a reason says to who may be on either side of the boundary, and what helps.
type meaning struct {
	is       Reason
	says, do string
	human    bool // it does not go away by itself
}

var reasons = []meaning{
	{Unreached, "nobody answers at its addresses", "a firewall may drop, or the addresses may be wrong; it is tried again by itself", false},
	{ConnRefused, "its address refuses the connection: the host answers, and nothing listens there",
		"ask the vendor whether the control plane runs, and compare the port; it is tried again by itself", false},
	{NameUnknown, "the name of its address does not resolve", "see that this host's resolver answers, and that the name is right; it is " +
		"tried again by itself", false},
	{ProxyUnreached, "the proxy does not answer", "compare proxy.url with what the proxy's administrator says; it is tried again by itself",
		false},
	{VendorRefuses, "the vendor's control plane refuses this appliance",
		"the vendor's operators see why and can change it: demarc appliance list, and their log, at the vendor", true},
	{VendorUnready, "the vendor's control plane answers, and does not take the channel now",
		"it is tried again by itself; if it lasts, the vendor's operators see why in demarc control-plane members", false},
	{NoProof, "the platform gives no proof of this appliance's identity",
		"correct the proof section of the file, or what it names (docs/identity.md); it is tried again by itself", true},
	{ClockOff, "a certificate is not valid at this host's time", "compare this host's clock with the true time: is its NTP running?", true},
	{OwnDisk, "the appliance's own disk takes nothing", "make space, or have the disk repaired (docs/disk.md); it goes on by itself", true},
	{Settings, "the appliance's file, or a file that it names, can't be used",
		"correct the file; where it names the file of a credential, that is read again at the next try, anything else after a restart", true},
	{ProxyRefuses, "the proxy does not let it through", "correct proxy.auth_file and restart the appliance, or have the proxy's " +
		"administrator allow CONNECT to the vendor's address", true},
	{TLSOpened, "somebody on the path opens TLS, or answers in the vendor's place",
		"have the address let through unopened, or list another road (docs/roads.md, TLS inspection)", true},
	{HelloTooLarge,
		"a box on the path swallows a first message of TLS that does not fit one packet: it goes on without ML-KEM, or not at all " +
			"where pq: required forbids that",
		"have the owner of the box let such messages through (docs/roads.md, pq)", true},
	{TailnetUnreached, "the tailnet's coordinator does not answer",
		"see that control_url is reached from this host; it is tried again by itself", false},
	{TailnetKey, "the tailnet refuses the credentials of this node: they are wrong, expired, used up, or not for its tags",
		"make a new key and write it into the file that the tailnet section names: it is read at the next try, without a restart", true},
	{TailnetApproval, "the tailnet's administrator has not approved this node",
		"have it approved in the tailnet's admin console, or use a key that approves; it is tried again by itself", true},
	{TailnetExpired, "the key of this node has expired, and the credentials do not renew it",
		"make a new key and write it into the file that the tailnet section names, or have the node's expiry disabled: it is read at the next " +
			"try, without a restart", true},
	{TailnetLogs, "the tailnet wants its nodes to send logs, and this one never does",
		"have the tailnet's administrator switch that off for this node, or use another road", true},
	{Other, "it does not work", "the appliance's own log says why", false},
}

// Reasons lists the closed set.
func Reasons() []Reason {
	var out []Reason
	for _, r := range reasons {
		out = append(out, r.is)
	}
	return out
}

// Known tells whether r is in the closed set.
func (r Reason) Known() bool { return slices.Contains(Reasons(), r) }

// Sentence says what a reason means, and what to do. Of one that is not known it says so.
func (r Reason) Sentence() (says, do string) {
	for _, x := range reasons {
		if x.is == r {
			return x.says, x.do
		}
	}
	return "it does not work, for a reason that this build does not know", "upgrade this program"
}

// NeedsHuman tells that a reason does not go away by itself.
func (r Reason) NeedsHuman() bool {
	return slices.ContainsFunc(reasons, func(x meaning) bool { return x.is == r && x.human })
}

// marked gives an error a reason.
type marked struct {
	reason Reason
	error
}

// Unwrap gives the error.
func (m marked) Unwrap() error { return m.error }

// For gives err a reason, which stands before those of its causes.
func For(r Reason, err error) error {
	if err == nil {
		return nil
	}
	return marked{r, err}
}

// ReasonOf gives the reason of an error of a road; "" for nil.
func ReasonOf(err error) Reason {
	var m marked
	switch {
	case err == nil:
		return ""
	case errors.As(err, &m):
		return m.reason
	}
	kind := fault.Of(err)
	if kind == fault.Unavailable || kind == fault.Busy || kind == fault.Internal { // a bare error of the network has no kind
		var name *net.DNSError
		switch {
		case errors.As(err, &name):
			return NameUnknown
		case errors.Is(err, syscall.ECONNREFUSED):
			return ConnRefused
		}
	}
	switch kind {
	case fault.Unavailable, fault.Busy:
		return Unreached
	case fault.Invalid:
		return Settings
	}
	return Other
}

// refusal reads what a tailnet's coordinator, or the API that makes keys, said when it kept a node out. Their words are not part of any
// protocol; those of Tailscale and of Headscale are told apart here.
func refusal(words string) Reason {
	w := strings.ToLower(words)
	has := func(any ...string) bool {
		return slices.ContainsFunc(any, func(s string) bool { return strings.Contains(w, s) })
	}
	switch {
	case has("logging to be enabled"):
		return TailnetLogs
	case has("authkey", "auth key", "api key", "invalid key", "key not found", "expired", "already been used", "already used", "tags", "tag:",
		"401", "403", "unauthorized", "forbidden"):
		return TailnetKey
	}
	return Other
}
