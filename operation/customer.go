// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"time"

	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/seal"
)

// Endorsement lets another key of the customer in. A key that is pinned already signs it.
type Endorsement struct {
	Appliance fleet.ApplianceID `json:"appliance"`
	Key       seal.KeyID        `json:"key"`
}

// PayloadType names the document.
func (Endorsement) PayloadType() string { return "application/vnd.demarc.endorse+json;v=1" }

// Receipt says how long it took from the customer's word to the last act refused. The appliance signs it after a revocation.
type Receipt struct {
	Appliance  fleet.ApplianceID `json:"appliance"`
	Document   fleet.Digest      `json:"document"` // the revocation
	At         time.Time         `json:"at"`
	TookMicros int64             `json:"took_micros"`
	Stopped    []string          `json:"stopped,omitempty"`
}

// PayloadType names the document.
func (Receipt) PayloadType() string { return "application/vnd.demarc.receipt+json;v=1" }
