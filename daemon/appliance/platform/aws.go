// SPDX-License-Identifier: Apache-2.0

package platform

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/config"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

// signed signs the one request with the role that the SDK finds: environment, shared files, web identity (IRSA), the
// container's endpoint (ECS, EKS Pod Identity), the instance's (IMDSv2).
func signed(ctx context.Context, p *configs.AWSProof, audience string, at time.Time) (*identity.SignedIdentity, error) {
	const op = "platform.aws"
	opts := []func(*config.LoadOptions) error{config.WithEC2IMDSRegion()} // where nothing else names one
	if p != nil && p.Region != "" {
		opts = []func(*config.LoadOptions) error{config.WithRegion(p.Region)}
	}
	c, err := config.LoadDefaultConfig(ctx, opts...)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the AWS SDK can't be set up: see the shared files and AWS_* of the appliance")
	}
	if c.Region == "" {
		return nil, fault.New(op, fault.Invalid, "no AWS region is set: name proof.aws.region in the appliance's file")
	}
	got, err := c.Credentials.Retrieve(ctx)
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "the AWS SDK finds no credentials of a role for the appliance")
	}
	if got.SessionToken == "" {
		return nil, fault.New(op, fault.Invalid, "the AWS credentials of the appliance are a user's keys: give it a role")
	}
	return sign(ctx, got, c.Region, audience, at)
}

func sign(ctx context.Context, creds aws.Credentials, region, audience string, at time.Time) (*identity.SignedIdentity, error) {
	const op = "platform.aws"
	q, err := identity.NewSTSRequest(region, audience)
	if err != nil {
		return nil, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+q.Host+"/", strings.NewReader(q.Body))
	if err != nil {
		return nil, fault.At(op, fault.Internal, err)
	}
	for _, h := range q.Headers {
		r.Header.Set(h.Name, h.Value)
	}
	sum := sha256.Sum256([]byte(q.Body))
	if err := v4.NewSigner().SignHTTP(ctx, creds, r, hex.EncodeToString(sum[:]), "sts", region, at.UTC()); err != nil {
		return nil, fault.Because(err, op, fault.Internal, "the request can't be signed")
	}
	auth := r.Header.Get("Authorization")
	_, sig, _ := strings.Cut(auth, "Signature=")
	s := &identity.SignedIdentity{Region: region, Date: r.Header.Get("X-Amz-Date"), AccessKeyID: creds.AccessKeyID,
		SessionToken: creds.SessionToken}
	if s.Signature, err = hex.DecodeString(sig); err != nil || s.Authorization() != auth {
		return nil, fault.Because(err, op, fault.Internal, "the AWS SDK signed another request than the control plane will write")
	}
	return s, nil
}
