// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"crypto/x509"
	"log/slog"
	"strings"
	"testing"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
)

// TestFirstMeetingSaysWhatToDo: an appliance that never enrolled, and whose bundle file is older than the vendor's CA, has
// nothing to trust a newer one by. It says which file to replace, and with what.
func TestFirstMeetingSaysWhatToDo(t *testing.T) {
	a := &Appliance{cfg: &configs.Appliance{Name: "eu-1", TrustDomain: vendorDomain}, book: newStore(t), log: slog.New(slog.DiscardHandler)}
	foreign := x509.UnknownAuthorityError{Cert: &x509.Certificate{}}
	err := a.lost(t.Context(), "https", &seen{}, fault.Because(foreign, "mesh", fault.Denied, "the certificate was issued by X"))
	for _, want := range []string{"the certificate was issued by X", "newest bundle", "bundle_file", "restart"} {
		if !strings.Contains(fault.Text(err), want) {
			t.Errorf("no %q in %q", want, fault.Text(err))
		}
	}
	err = a.lost(t.Context(), "https", &seen{}, fault.New("mesh", fault.Expired, "the certificate ran out"))
	if text := fault.Text(err); !strings.Contains(text, "clock must be right") || strings.Contains(text, "bundle_file") ||
		fault.Of(err) != fault.Expired {
		t.Errorf("%q, %s", text, fault.Of(err))
	}
}
