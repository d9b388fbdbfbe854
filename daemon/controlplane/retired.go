// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
)

// admitted gives the appliance of a channel, or the reason why it may have none with the certificate that it showed.
func (l *live) admitted(page book.State) (book.Appliance, error) {
	a, err := page.Appliance(l.name)
	if err != nil {
		return book.Appliance{}, err
	}
	if err := page.RefusesIssuer("controlplane.admit", l.issuer); err != nil {
		return book.Appliance{}, err
	}
	return a, a.Accepts(l.serial)
}
