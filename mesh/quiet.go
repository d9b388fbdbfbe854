// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"errors"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/net/http/httpproxy"
	"tailscale.com/envknob"
	"tailscale.com/ipn"
	"tailscale.com/logtail"
	"tailscale.com/net/tshttpproxy"

	"github.com/demarc-dev/demarc/fault"
)

// silence sees to it that no log leaves the process or is kept for that on disk, and that no gateway is asked to open a port.
// The library takes these from the environment of the process alone, and reads it without a lock: so it is
// written once, before the first node. And the library would take credentials and its control server from there, which come
// from the operator's file and from nowhere else.
var silence = sync.OnceValue(func() error {
	for _, name := range []string{"TS_AUTHKEY", "TS_AUTH_KEY", "TS_CLIENT_SECRET", "TS_CLIENT_ID", "TS_ID_TOKEN", "TS_AUDIENCE",
		"TS_CONTROL_URL", "TSNET_FORCE_LOGIN"} {
		_ = os.Unsetenv(name) // it fails for no name of this form
	}
	envknob.SetNoLogsNoSupport()
	envknob.Setenv("TS_DISABLE_PORTMAPPER", "true")
	logtail.Disable()
	envknob.Setenv("TS_USE_CONTROL_DIAL_PLAN", "false") // else a coordinator names addresses where it is asked for, too
	return tshttpproxy.SetProxyFunc(only(httpproxy.FromEnvironment().ProxyFunc(), sending))
})

// coordinators are the places of the control servers that nodes of this process were ever told of: scheme, host, port and path of what
// the library asks there.
var coordinators sync.Map

// spot is one place that a request may go to. Its host is in lower case, without a final dot.
type spot struct{ scheme, host, port, path string }

// spots are what the library asks a control server for: its key; the protocol of the two, at the file's port and at those that the library
// tries besides (its ts2021.NewClient); and the bare root, by which a coordinator sees that a node is there.
func spots(u *url.URL) []spot {
	host, port := hostOf(u), portOf(u)
	const noise = "/ts2021"
	out := []spot{{u.Scheme, host, port, strings.TrimSuffix(u.Path, "/") + "/key"}, {u.Scheme, host, port, "/"}, {u.Scheme, host, port, noise}}
	switch {
	case u.Scheme == "http":
		out = append(out, spot{"https", host, "443", noise})
	case u.Port() == "":
		out = append(out, spot{"http", host, "80", noise})
	}
	return out
}

func hostOf(u *url.URL) string { return strings.ToLower(strings.TrimSuffix(u.Hostname(), ".")) }

func portOf(u *url.URL) string {
	if p := u.Port(); p != "" {
		return p
	}
	return map[string]string{"http": "80", "https": "443"}[u.Scheme]
}

// quiet makes the library keep to what the operator's file names, before a node of this control server starts.
func quiet(controlURL string) error {
	const op = "mesh.Join"
	if controlURL == "" {
		controlURL = ipn.DefaultControlURL
	}
	u, err := url.Parse(controlURL)
	if err != nil || u.Hostname() == "" || u.Scheme != "https" && u.Scheme != "http" || u.User != nil ||
		u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.Opaque != "" {
		return fault.New(op, fault.Invalid, "the control URL of the tailnet is no URL of the form https://host[:port]")
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil && (ip.Unmap().IsLinkLocalUnicast() || ip == awsMetadata6) {
		return fault.New(op, fault.Invalid, "the control URL of the tailnet is the address of a cloud's metadata, or another of this link alone")
	}
	for _, s := range spots(u) {
		coordinators.Store(s, true)
	}
	return fault.At(op, fault.Internal, silence())
}

// awsMetadata6 is where AWS has the metadata of a machine in IPv6. 169.254.169.254 is of the link.
var awsMetadata6 = netip.MustParseAddr("fd00:ec2::254")

// errStranger stops a request before anything is dialled.
var errStranger = errors.New("nothing that this tailnet's file names: not asked")

// only lets the library's requests over HTTP go to [spots] of coordinators, over the proxy of the environment where it names one. Else the
// library asks a list of public hosts, built into it, for the coordinator's address when the resolver fails, and a coordinator
// could have a node send what it likes to any URL of the customer's network: HEAD, with a query and credentials in it, or POST. Each hop
// of a redirect is looked at anew.
//
// Besides, the library asks which proxy leads to a relay, of a bare https://host/, and then speaks to the relay by itself. What asks tells
// the two apart: a request that is about to be sent asks from within net/http.
func only(proxy func(*url.URL) (*url.URL, error), sends func() bool) func(*url.URL) (*url.URL, error) {
	return func(u *url.URL) (*url.URL, error) {
		if u.User != nil || u.Fragment != "" || u.Opaque != "" || u.RawPath != "" {
			return nil, errStranger
		}
		_, known := coordinators.Load(spot{u.Scheme, hostOf(u), portOf(u), u.Path})
		bare := u.RawQuery == "" && !u.ForceQuery
		switch {
		case known && (bare || strings.HasSuffix(u.Path, "/key") && keyQuery.MatchString(u.RawQuery)):
			return proxy(u)
		case bare && u.Scheme == "https" && u.Path == "/" && !sends():
			return proxy(u)
		}
		return nil, errStranger
	}
}

// keyQuery is what the library adds when it asks for the key of a control server: the version of the protocol.
var keyQuery = regexp.MustCompile(`^v=[0-9]{1,9}$`)

// sending reports whether its caller's caller was asked by net/http for a request that is about to be sent.
func sending() bool {
	pcs := make([]uintptr, 32) // the frames nearest to here
	n := runtime.Callers(2, pcs)
	frames := runtime.CallersFrames(pcs[:n])
	for {
		f, more := frames.Next()
		if strings.HasPrefix(f.Function, "net/http.(*Transport).") {
			return true
		}
		if !more {
			return n == 0 // not known: as if
		}
	}
}

// sweep removes what the library's logger made in a node's folder: an identifier for logs, and two files for lines that wait for
// an upload. The node goes on without them; it makes them anew at each start.
func sweep(dir string) error {
	for _, name := range []string{"tailscaled.log.conf", "tailscaled.log1.txt", "tailscaled.log2.txt"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fault.Because(err, "mesh.Join", fault.Unavailable, "the folder of the tailnet node's state can't be swept")
		}
	}
	return nil
}
