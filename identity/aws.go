// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// SignedIdentity is what an appliance on AWS hands over: enough to write one request anew, whose signature (AWS
// Signature Version 4) covers nonce and key. Each field has one form. The session token is that of a role; the long-lived
// keys of a user have none and are not taken.
type SignedIdentity struct {
	Region       string
	Date         string // 20060102T150405Z
	AccessKeyID  string
	SessionToken string
	Signature    []byte // 32 bytes
}

// The parts of the request that never vary.
const (
	stsBody        = "Action=GetCallerIdentity&Version=2011-06-15"
	stsContentType = "application/x-www-form-urlencoded; charset=utf-8"
	stsSigned      = "content-length;content-type;host;x-amz-date;x-amz-security-token;x-demarc-audience"
	stsDate        = "20060102T150405Z"
	stsNamespace   = "https://sts.amazonaws.com/doc/2011-06-15/"

	// MaxSTSAnswer bounds the answer of STS, in bytes.
	MaxSTSAnswer = 16 << 10

	maxSessionToken = 8 << 10
	maxAudience     = 1 << 10

	// awsSkew is how far the date of a signature may be from the control plane's clock. STS itself allows 15 minutes.
	awsSkew = 5 * time.Minute
)

// partitions is every region whose STS may be asked. A region that is not here is unknown: nothing is derived from what
// an appliance says. Names: https://docs.aws.amazon.com/general/latest/gr/sts.html
var partitions = map[string]struct {
	suffix  string
	regions []string
}{
	"aws": {"amazonaws.com", []string{
		"af-south-1", "ap-east-1", "ap-east-2", "ap-northeast-1", "ap-northeast-2", "ap-northeast-3", "ap-south-1", "ap-south-2",
		"ap-southeast-1", "ap-southeast-2", "ap-southeast-3", "ap-southeast-4", "ap-southeast-5", "ap-southeast-6", "ap-southeast-7",
		"ca-central-1", "ca-west-1", "eu-central-1", "eu-central-2", "eu-north-1", "eu-south-1", "eu-south-2", "eu-west-1", "eu-west-2",
		"eu-west-3", "il-central-1", "me-central-1", "me-south-1", "me-west-1", "mx-central-1", "sa-east-1", "sa-west-1", "us-east-1",
		"us-east-2", "us-west-1", "us-west-2",
	}},
	"aws-cn":     {"amazonaws.com.cn", []string{"cn-north-1", "cn-northwest-1"}},
	"aws-us-gov": {"amazonaws.com", []string{"us-gov-east-1", "us-gov-west-1"}},
}

// STSHost is the host of a region's STS and the partition that it is in.
func STSHost(region string) (host, partition string, err error) {
	for name, p := range partitions {
		if slices.Contains(p.regions, region) {
			return "sts." + region + "." + p.suffix, name, nil
		}
	}
	return "", "", fault.New("identity.STSHost", fault.Invalid,
		"%q is no region whose STS is known here: name another region of the same partition", fault.Clip(region))
}

var (
	awsAccount = regexp.MustCompile(`^[0-9]{12}$`)
	awsRole    = regexp.MustCompile(
		`^arn:(aws|aws-cn|aws-us-gov):iam::([0-9]{12}):role/((?:[A-Za-z0-9+=,.@_-]+/)*)([A-Za-z0-9+=,.@_-]{1,64})$`)
	awsAssumed = regexp.MustCompile(
		`^arn:(aws|aws-cn|aws-us-gov):sts::([0-9]{12}):assumed-role/([A-Za-z0-9+=,.@_-]{1,64})/([A-Za-z0-9+=,.@_-]{2,64})$`)
	awsUserID    = regexp.MustCompile(`^(AROA[A-Z0-9]{12,124}):[A-Za-z0-9+=,.@_-]{2,64}$`)
	awsDate      = regexp.MustCompile(`^[0-9]{8}T[0-9]{6}Z$`)
	awsAccessKey = regexp.MustCompile(`^[A-Z0-9]{16,128}$`)
	awsToken     = regexp.MustCompile(`^[A-Za-z0-9+/=_-]+$`)
	awsAudience  = regexp.MustCompile(`^demarc://[a-z0-9.-]+/enrol\?nonce=[A-Za-z0-9%._-]+&key=[A-Za-z0-9_-]{43}$`)
)

// role is a role by what its assumed-role ARN says of it. That ARN has no path, so the path is not compared; within an
// account the names of roles are unique whatever their paths.
type role struct{ partition, account, name string }

func (e Expect) role() (role, error) {
	if !awsAccount.MatchString(e.Account) {
		return role{}, wrong("account", nil, " %q: give the 12 digits of the AWS account", fault.Clip(e.Account))
	}
	m := awsRole.FindStringSubmatch(e.RoleARN)
	if m == nil || len(e.RoleARN) > 2048 {
		return role{}, wrong("role_arn", nil, " %q: write it as arn:aws:iam::ACCOUNT:role/NAME, with the role's path if it has one",
			fault.Clip(e.RoleARN))
	}
	r := role{m[1], m[2], m[4]}
	if r.account != e.Account {
		return role{}, contradict("account", "role_arn", " name different accounts, %s and %s", e.Account, r.account)
	}
	for _, region := range e.Regions {
		if _, p, err := STSHost(region); err != nil || p != r.partition {
			return role{}, wrong("regions", err, " %q is none of the role's partition %s", fault.Clip(region), r.partition)
		}
	}
	return r, nil
}

// Header is one line of a request's head.
type Header struct{ Name, Value string }

// STSRequest is the one request that can be asked of STS: POST https://<Host>/ with this head and body, and no other.
type STSRequest struct {
	Host    string
	Region  string
	Headers []Header // of which all are signed; with the authorization where the request is signed
	Body    string
}

// NewSTSRequest is the request before its signature, for the appliance to sign. The signature must cover the host, the
// length and all its headers, x-amz-date and x-amz-security-token among them.
func NewSTSRequest(region, audience string) (STSRequest, error) {
	host, _, err := STSHost(region)
	if err != nil {
		return STSRequest{}, err
	}
	if len(audience) > maxAudience || !awsAudience.MatchString(audience) {
		return STSRequest{}, fault.New("identity.NewSTSRequest", fault.Invalid, "the audience is none that can stand in a header")
	}
	return STSRequest{Host: host, Region: region, Body: stsBody,
		Headers: []Header{{"Content-Type", stsContentType}, {"X-Demarc-Audience", audience}}}, nil
}

// Authorization is the header that a signature by these credentials gives. Both sides make it: the appliance to see that
// its SDK signed what the control plane will write, the control plane to write it.
func (s SignedIdentity) Authorization() string {
	return "AWS4-HMAC-SHA256 Credential=" + s.AccessKeyID + "/" + s.Date[:min(8, len(s.Date))] + "/" + s.Region +
		"/sts/aws4_request, SignedHeaders=" + stsSigned +
		", Signature=" + hex.EncodeToString(s.Signature)
}

// STSRequest writes the request anew from an appliance's fields, for this audience and what is registered. Nothing of the
// appliance's reaches STS but these fields, each in its one form.
//
// The kinds: invalid (a field that has not its form), denied (a region that is not registered), expired (the clock).
func (e Expect) STSRequest(s SignedIdentity, audience string, now time.Time) (STSRequest, error) {
	const op = "identity.STSRequest"
	r, err := e.role()
	if err != nil {
		return STSRequest{}, err
	}
	if e.Kind != KindAWS {
		return STSRequest{}, fault.New(op, fault.Invalid, "the appliance is registered with a proof of kind %s, not of AWS", fault.Clip(e.Kind))
	}
	req, err := NewSTSRequest(s.Region, audience)
	if err != nil {
		return STSRequest{}, err
	}
	date, err := time.Parse(stsDate, s.Date)
	switch _, partition, _ := STSHost(s.Region); {
	case err != nil || !awsDate.MatchString(s.Date):
		return STSRequest{}, fault.New(op, fault.Invalid, "the date of the signed request is not written as 20060102T150405Z")
	case !awsAccessKey.MatchString(s.AccessKeyID):
		return STSRequest{}, fault.New(op, fault.Invalid, "the access key id of the signed request has not the form of one")
	case s.SessionToken == "":
		return STSRequest{}, fault.New(op, fault.Invalid, "the signed request has no session token: use the credentials of a role, not a "+
			"user's keys")
	case len(s.SessionToken) > maxSessionToken || !awsToken.MatchString(s.SessionToken):
		return STSRequest{}, fault.New(op, fault.Invalid, "the session token of the signed request has not the form of one")
	case len(s.Signature) != 32:
		return STSRequest{}, fault.New(op, fault.Invalid, "the signature has %d bytes: 32 are needed", len(s.Signature))
	case partition != r.partition:
		return STSRequest{}, fault.New(op, fault.Denied, "the region %s is not of the registered role's partition %s", s.Region, r.partition)
	case len(e.Regions) > 0 && !slices.Contains(e.Regions, s.Region):
		return STSRequest{}, fault.New(op, fault.Denied, "the region %s is not registered: %s", s.Region, strings.Join(e.Regions, ", "))
	case date.Before(now.Add(-awsSkew)) || date.After(now.Add(awsSkew)):
		return STSRequest{}, fault.New(op, fault.Expired, "the request was signed at %s, and it is %s here: compare the clocks", stamp(date),
			stamp(now))
	}
	req.Headers = append(req.Headers, Header{"X-Amz-Date", s.Date}, Header{"X-Amz-Security-Token", s.SessionToken},
		Header{"Authorization", s.Authorization()})
	return req, nil
}

// VerifySTS reads the answer of STS, with its HTTP status, and tells whether the caller is the registered role.
func (e Expect) VerifySTS(req STSRequest, status int, answer []byte) (Proven, error) {
	const op = "identity.VerifySTS"
	r, err := e.role()
	if err != nil {
		return Proven{}, err
	}
	if status != 200 {
		return Proven{}, refusedBySTS(status, answer)
	}
	c, err := parseCaller(answer)
	if err != nil {
		return Proven{}, err
	}
	m, id := awsAssumed.FindStringSubmatch(c.ARN), awsUserID.FindStringSubmatch(c.UserID)
	switch {
	case m == nil || id == nil:
		return Proven{}, fault.New(op, fault.Denied, "AWS says that the caller is %q: use the credentials of a role", fault.Clip(c.ARN))
	case c.Account != r.account || m[2] != r.account:
		return Proven{}, fault.New(op, fault.Denied, "the caller is of the account %s, and %s is registered", m[2], r.account)
	case m[1] != r.partition:
		return Proven{}, fault.New(op, fault.Denied, "the caller is of the partition %s, and %s is registered", m[1], r.partition)
	case m[3] != r.name:
		return Proven{}, fault.New(op, fault.Denied, "the caller has the role %s, and %s is registered", m[3], r.name)
	}
	return Proven{Kind: e.Kind, Issuer: req.Host, Subject: c.ARN, UID: id[1]}, nil
}

// refusedBySTS keeps nothing of the answer but a code of letters.
func refusedBySTS(status int, answer []byte) error {
	const op = "identity.VerifySTS"
	var e struct {
		Code string `xml:"Error>Code"`
	}
	if len(answer) <= MaxSTSAnswer {
		_ = xml.Unmarshal(answer, &e) // what does not parse has no code
	}
	if !regexp.MustCompile(`^[A-Za-z]{1,64}$`).MatchString(e.Code) {
		e.Code = "no code"
	}
	switch {
	case status >= 500 || status == 429 || e.Code == "Throttling":
		return fault.New(op, fault.Unavailable, "STS answers %d (%s): try again", status, e.Code)
	case e.Code == "ExpiredToken", e.Code == "ExpiredTokenException", e.Code == "SignatureExpired", e.Code == "RequestExpired":
		return fault.New(op, fault.Expired, "STS refuses the signed request (%s): the role's credentials or the signature ran out", e.Code)
	}
	return fault.New(op, fault.Denied, "STS refuses the signed request: %d, %s", status, e.Code)
}

type caller struct{ ARN, UserID, Account string }

// parseCaller reads the answer of GetCallerIdentity: one document of the one form, with each field once and no
// declarations of its own.
func parseCaller(b []byte) (caller, error) {
	const op = "identity.VerifySTS"
	bad := func(why string) (caller, error) {
		return caller{}, fault.New(op, fault.Unavailable, "the answer of STS is not understood: %s", why)
	}
	if len(b) > MaxSTSAnswer {
		return bad("it has more than " + strconv.Itoa(MaxSTSAnswer) + " bytes")
	}
	const root = "GetCallerIdentityResponse"
	fields := map[string]string{}
	var path []string
	var text strings.Builder
	ended := false
	d := xml.NewDecoder(bytes.NewReader(b))
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return bad("it is no XML")
		}
		switch t := t.(type) {
		case xml.StartElement:
			if ended || len(path) >= 3 || t.Name.Space != stsNamespace || (len(path) == 0 && t.Name.Local != root) {
				return bad("it has an element that does not belong there")
			}
			path = append(path, t.Name.Local)
			text.Reset()
		case xml.EndElement:
			at := strings.Join(path, "/")
			if _, twice := fields[at]; twice {
				return bad("an element comes twice")
			}
			fields[at] = strings.TrimSpace(text.String())
			text.Reset()
			path = path[:len(path)-1]
			ended = len(path) == 0
		case xml.CharData:
			if len(path) == 0 && len(bytes.TrimSpace(t)) > 0 {
				return bad("it has text outside of its elements")
			}
			text.Write(t)
		case xml.Directive:
			return bad("it declares a document type")
		}
	}
	const at = root + "/GetCallerIdentityResult/"
	c := caller{fields[at+"Arn"], fields[at+"UserId"], fields[at+"Account"]}
	if !ended || c.ARN == "" || c.UserID == "" || c.Account == "" {
		return bad("it names no caller")
	}
	return c, nil
}
