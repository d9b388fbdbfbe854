// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"maps"
	"testing"

	"github.com/demarc-dev/demarc/ingress"
	"github.com/demarc-dev/demarc/manifest"
)

// TestAddressesOnTheTailnet: ports of the posture private have addresses of their own, and the customer's file names them where it wants
// others (FAULTS.md E6).
func TestAddressesOnTheTailnet(t *testing.T) {
	port := func(name, protocol string, number int) manifest.Port {
		return manifest.Port{Name: name, Protocol: protocol, Port: number}
	}
	for name, tc := range map[string]struct {
		ports []manifest.Port
		file  map[string]string
		want  map[string]string
	}{
		"one HTTP port":   {[]manifest.Port{port("web", ingress.HTTP, 8080)}, nil, map[string]string{"web": ":80"}},
		"one that is 443": {[]manifest.Port{port("web", ingress.HTTP, 443)}, nil, map[string]string{"web": ":443"}},
		"HTTP and TCP": {[]manifest.Port{port("web", ingress.HTTP, 8080), port("db", ingress.TCP, 5432)}, nil,
			map[string]string{"web": ":80", "db": ":5432"}},
		"two HTTP ports": {[]manifest.Port{port("web", ingress.HTTP, 8080), port("admin", ingress.HTTP, 9090)}, nil,
			map[string]string{"admin": ":80", "web": ":8080"}},
		"the file decides": {[]manifest.Port{port("web", ingress.HTTP, 8080), port("admin", ingress.HTTP, 9090)},
			map[string]string{"web": ":80"}, map[string]string{"admin": ":9090", "web": ":80"}},
		"the file, another one": {[]manifest.Port{port("db", ingress.TCP, 5432)}, map[string]string{"db": ":15432", "gone": ":80"},
			map[string]string{"db": ":15432"}},
	} {
		if got := tailnetAddrs(tc.ports, tc.file); !maps.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}
