// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"os"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/appliance/book"
	"github.com/demarc-dev/demarc/fault"
)

// Check reads what an appliance's file names, and reports the first thing that is wrong with the vendor's keys. It changes
// nothing.
func Check(cfg *configs.Appliance) error {
	s, err := siteOf(cfg)
	if err != nil {
		return err
	}
	return s.Check()
}

// siteOf reads the part of the file that decisions rest on.
func siteOf(cfg *configs.Appliance) (book.Site, error) {
	s := book.Site{TrustDomain: cfg.TrustDomain, Runtime: cfg.Runtime.Kind}
	var err error
	if s.ReleaseKeys, err = readAll(cfg.ControlPlane.ReleaseKeys); err != nil {
		return s, err
	}
	for _, o := range cfg.ControlPlane.Operators {
		keys, err := readAll(o.Keys)
		if err != nil {
			return s, err
		}
		s.Operators = append(s.Operators, book.Operator{Name: o.Name, Keys: keys})
	}
	return s, nil
}

func readAll(paths []string) ([][]byte, error) {
	var out [][]byte
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil || len(b) > 64<<10 {
			return nil, fault.Because(err, "appliance.readAll", fault.Invalid, "the key file can't be read: %s", p)
		}
		out = append(out, b)
	}
	return out, nil
}
