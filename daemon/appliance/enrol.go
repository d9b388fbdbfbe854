// SPDX-License-Identifier: Apache-2.0

package appliance

import (
	"bytes"
	"context"
	"time"

	"connectrpc.com/connect"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// enrol proves the platform identity and keeps the certificate that it is given. It gives the key of the vendor's log.
func (a *Appliance) enrol(ctx context.Context, c *link) ([]byte, error) {
	const op = "appliance.enrol"
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	client := c.bootstrap(256 << 10)
	ch, err := client.Challenge(ctx, connect.NewRequest(&boundaryv1.ChallengeRequest{}))
	if err != nil {
		return nil, refusedBy(op, err)
	}
	if td := ch.Msg.GetTrustDomain(); td != a.cfg.TrustDomain {
		return nil, fault.New(op, fault.Denied, "the control plane is of the trust domain %.64q, the customer's file says %q", td,
			a.cfg.TrustDomain)
	}
	key, request, err := a.creds.PendingKey()
	if err != nil {
		return nil, err
	}
	audience, err := identity.Audience(a.cfg.TrustDomain, ch.Msg.GetNonce(), request)
	if err != nil {
		return nil, err
	}
	proof, err := a.proof(ctx, audience, time.Unix(ch.Msg.GetServerTimeUnix(), 0))
	if err != nil {
		return nil, err
	}
	own, err := seal.KeyOf(a.signer.Public())
	if err != nil {
		return nil, err
	}
	res, err := client.Enrol(ctx, connect.NewRequest(&boundaryv1.EnrolRequest{Appliance: a.cfg.Name, Nonce: ch.Msg.GetNonce(), Csr: request,
		Token: proof.Token, Aws: awsToWire(proof.AWS), LogKey: own.PEM()}))
	if err != nil {
		return nil, refusedBy(op, err)
	}
	cas, number := res.Msg.GetBundle(), res.Msg.GetBundleNumber()
	if pinned := a.book.View().VendorLogKey; pinned != nil {
		if !bytes.Equal(pinned, res.Msg.GetLogKey()) {
			return nil, fault.New(op, fault.Denied, "the vendor's log has another key than at the first enrolment: its evidence would not continue")
		}
		// From here on CAs count only with the signature of that key. Who holds the key of a CA and no more, even of one that
		// was retired, could have this appliance trust itself alone, under a number that no later bundle reaches.
		cas, number = nil, 0
	}
	if err := a.creds.StoreCertificate(key, res.Msg.GetCertificate(), cas, number); err != nil {
		return nil, err
	}
	return res.Msg.GetLogKey(), nil
}
