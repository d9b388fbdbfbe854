// SPDX-License-Identifier: Apache-2.0

package mesh

import (
	"errors"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/net/http/httpproxy"
	"tailscale.com/envknob"
	"tailscale.com/ipn"
	"tailscale.com/logtail"
	"tailscale.com/net/tshttpproxy"

	"github.com/demarc-dev/demarc/fault"
)

// silence sees to it that no log leaves the process or is kept for that on disk, and that no gateway is asked to open a port.
// The library takes the first and the last from the environment of the process alone, and reads it without a lock: so it is
// written once, before the first node. And the library would take credentials and its control server from there, which come
// from the operator's file and from nowhere else.
var silence = sync.OnceValue(func() error {
	for _, name := range []string{"TS_AUTHKEY", "TS_AUTH_KEY", "TS_CLIENT_SECRET", "TS_CLIENT_ID", "TS_ID_TOKEN", "TS_AUDIENCE", "TS_CONTROL_URL", "TSNET_FORCE_LOGIN"} {
		_ = os.Unsetenv(name) // it fails for no name of this form
	}
	envknob.SetNoLogsNoSupport()
	envknob.Setenv("TS_DISABLE_PORTMAPPER", "true")
	logtail.Disable()
	return tshttpproxy.SetProxyFunc(only(httpproxy.FromEnvironment().ProxyFunc()))
})

// coordinators are the hosts of the control servers that nodes of this process were ever told of.
var coordinators sync.Map

// quiet makes the library keep to what the operator's file names, before a node of this control server starts.
func quiet(controlURL string) error {
	const op = "mesh.Join"
	if controlURL == "" {
		controlURL = ipn.DefaultControlURL
	}
	u, err := url.Parse(controlURL)
	if err != nil || u.Hostname() == "" {
		return fault.New(op, fault.Invalid, "the control URL of the tailnet is no URL of the form https://host[:port]")
	}
	coordinators.Store(u.Hostname(), true)
	return fault.At(op, fault.Internal, silence())
}

// errStranger stops a request before anything is dialled.
var errStranger = errors.New("no host of this tailnet's: not asked")

// only lets the library's requests over HTTP go to coordinators, over the proxy of the environment where it names one. Else the
// library asks a list of public hosts, built into it, for the coordinator's address when the resolver fails, and a coordinator
// could have a node send HEAD to any URL of the customer's network. It is asked for relays too, always with the path /.
func only(proxy func(*url.URL) (*url.URL, error)) func(*url.URL) (*url.URL, error) {
	return func(u *url.URL) (*url.URL, error) {
		if _, ok := coordinators.Load(u.Hostname()); !ok && u.Path != "/" {
			return nil, errStranger
		}
		return proxy(u)
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
