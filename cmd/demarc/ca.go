// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
)

func (a *app) ca() *cobra.Command {
	status := a.online(&cobra.Command{Use: "status", Short: "Show the CAs, and who does not hold the newest bundle", Args: exactly(0, "no arguments"), Example: "  demarc ca status"},
		func(ctx context.Context, v *vendor, _ []string) error {
			m, err := v.authorities(ctx)
			if err != nil {
				return err
			}
			return a.emit(m, func(w io.Writer) {
				fmt.Fprintf(w, "bundle\t%d\n", m.GetBundleNumber())
				for _, c := range m.GetAuthorities() {
					fmt.Fprintf(w, "ca\t%s\t%s\tuntil %s\tof %d appliances, %d operators\t%s\n", c.GetId(), c.GetStage(), time.Unix(c.GetNotAfterUnix(), 0).UTC().Format(time.DateOnly), c.GetAppliances(), c.GetOperators(), c.GetName())
				}
				for _, x := range m.GetMissing() {
					fmt.Fprintf(w, "missing\t%s %s\tholds %d\t%s\n", x.GetKind(), x.GetName(), x.GetHolds(), todo(x))
				}
			})
		})
	var life *time.Duration
	prepare := a.online(&cobra.Command{Use: "prepare", Short: "Make another CA and announce it; it issues nothing yet", Args: exactly(0, "no arguments"), Example: "  demarc ca prepare"},
		func(ctx context.Context, v *vendor, _ []string) error {
			id := draw()
			m, err := ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.PrepareAuthorityResponse, error) {
				return wire(c.PrepareAuthority(ctx, connect.NewRequest(&controlv1.PrepareAuthorityRequest{RequestId: id, LifeSeconds: int64(*life / time.Second)})))
			})
			if err != nil {
				return err
			}
			if v.trust != nil { // the node that answered may not have met the bundle yet that it announced
				v.trust.heard(strconv.FormatUint(m.GetBundleNumber(), 10))
				v.settle(ctx)
			}
			return a.emit(m, func(w io.Writer) {
				fmt.Fprintf(w, "CA %s is prepared, in bundle %d: activate it once nobody is missing who is waited for (demarc ca status)\n", m.GetId(), m.GetBundleNumber())
			})
		})
	life = spanVar(prepare.Flags(), "life", 0, time.Second, 20*365*24*time.Hour, "how long the CA lives, for instance 17520h; five years where absent")
	var without []string
	activate := a.online(&cobra.Command{Use: "activate ID", Short: "Have the prepared CA issue; refused while a node, a connected appliance or an operator does not hold it", Args: exactly(1, "the id of a CA, the beginning of one, or the word prepared"),
		Long: "activate has the prepared CA issue. It is refused, with names, while a node, an appliance that is connected, or an operator with a valid\n" +
			"certificate who called within 30 days does not hold that CA. An operator takes it with any command. One who can't be waited for is named\n" +
			"with --without: their command line asks for the vendor's signed bundle when they come back.",
		Example: "  demarc ca activate prepared\n  demarc ca activate sha256:1f0c --without cat"},
		func(ctx context.Context, v *vendor, args []string) error {
			ca, err := v.authority(ctx, args[0])
			if err != nil {
				return err
			}
			id := draw()
			_, err = ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.ActivateAuthorityResponse, error) {
				return wire(c.ActivateAuthority(ctx, connect.NewRequest(&controlv1.ActivateAuthorityRequest{RequestId: id, Id: ca, Without: without})))
			})
			if err != nil {
				return err
			}
			return a.say(map[string]string{"active": ca}, "CA %s issues now", ca)
		})
	activate.Flags().StringSliceVar(&without, "without", nil, "operators who are not waited for")
	var compromised bool
	retire := a.online(&cobra.Command{Use: "retire ID", Short: "End the trust in a CA; refused while its certificates are in use", Args: exactly(1, "the id of a CA, the beginning of one, or the word tainted"),
		Long: "retire ends the trust in a CA: tainted is the one that issued before. It is refused while its certificates are in use.\n" +
			"With --compromised it waits for nobody:\n" +
			"no certificate of that CA passes any more, and every connection that showed one ends at once, at each node. Appliances prove their\n" +
			"platform identity again and nodes make their next certificate, by themselves. An operator whose certificate is of that CA logs in again\n" +
			"(demarc operator login), or is invited again by an admin (demarc operator invite).",
		Example: "  demarc ca retire tainted\n  demarc ca retire sha256:9b3e --compromised"},
		func(ctx context.Context, v *vendor, args []string) error {
			ca, err := v.authority(ctx, args[0])
			if err != nil {
				return err
			}
			id := draw()
			_, err = ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.RetireAuthorityResponse, error) {
				return wire(c.RetireAuthority(ctx, connect.NewRequest(&controlv1.RetireAuthorityRequest{RequestId: id, Id: ca, Compromised: compromised})))
			})
			if err != nil {
				return err
			}
			return a.say(map[string]string{"retired": ca}, "CA %s is trusted by nobody any more", ca)
		})
	retire.Flags().BoolVar(&compromised, "compromised", false, "its key may be known to others: at once, whoever uses its certificates proves itself again")
	return group("ca", "The CAs of the trust domain", status, prepare, activate, retire)
}

func (v *vendor) authorities(ctx context.Context) (*controlv1.ListAuthoritiesResponse, error) {
	return ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.ListAuthoritiesResponse, error) {
		return wire(c.ListAuthorities(ctx, connect.NewRequest(&controlv1.ListAuthoritiesRequest{})))
	})
}

// todo says what one does who does not hold the newest bundle.
func todo(x *controlv1.Missing) string {
	switch {
	case x.GetKind() == "operator" && x.GetOnline():
		return "called " + time.Unix(x.GetSeenUnix(), 0).UTC().Format(time.DateOnly) + ": have them run any command, for instance demarc status"
	case x.GetKind() == "operator":
		return "did not call lately, holds nothing up: takes it with the next command"
	case x.GetKind() == "appliance" && !x.GetOnline():
		return "offline, holds nothing up: takes it when it comes back"
	case x.GetKind() == "appliance":
		return "connected: takes it by itself, wait"
	}
	return "takes it by itself: start it if it is down"
}

// authority completes the beginning of an id, or the stage of a CA, if it fits one CA.
func (v *vendor) authority(ctx context.Context, begin string) (string, error) {
	const op = "demarc.ca"
	m, err := v.authorities(ctx)
	if err != nil {
		return "", err
	}
	var found []string
	for _, c := range m.GetAuthorities() {
		if c.GetStage() == begin || strings.HasPrefix(c.GetId(), begin) || strings.HasPrefix(strings.TrimPrefix(c.GetId(), "sha256:"), begin) {
			found = append(found, c.GetId())
		}
	}
	if len(found) != 1 {
		return "", fault.New(op, fault.NotFound, "%d CAs have the stage %[2]q or an id that begins with %[2]q: see demarc ca status", len(found), begin)
	}
	return found[0], nil
}

func (a *app) operator() *cobra.Command {
	renew := a.online(&cobra.Command{Use: "renew", Short: "Replace the operator's certificate and key, in place", Args: exactly(0, "no arguments"),
		Long: "renew replaces the certificate and the key, in place. The old certificate passes until the new one is used for the first time. The bundle, the CAs by\n" +
			"which the control plane is recognised, needs no command: every command keeps it up to date.", Example: "  demarc operator renew --context operator.yaml"},
		func(ctx context.Context, v *vendor, _ []string) error {
			until, err := v.renew(ctx)
			if err != nil {
				return err
			}
			return a.say(map[string]any{"operator": v.Name, "until_unix": until.Unix()}, "the certificate of %s is good until %s", v.Name, until.UTC().Format(time.DateOnly))
		})
	return group("operator", "The vendor's operators, and yourself as one", append(a.operators(), renew)...)
}

// renew asks for a certificate of a fresh key. The new files are whole on disk before the first one takes its place: where
// that is cut short, those with .new at the end are the pair.
func (v *vendor) renew(ctx context.Context) (time.Time, error) {
	const op = "demarc.renew"
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return time.Time{}, fault.At(op, fault.Internal, err)
	}
	csr, err := identity.NewCSR(key, rand.Reader)
	if err != nil {
		return time.Time{}, err
	}
	m, err := ask(ctx, v, func(ctx context.Context, c controlv1connect.ControlClient) (*controlv1.RenewOperatorResponse, error) {
		return wire(c.RenewOperator(ctx, connect.NewRequest(&controlv1.RenewOperatorRequest{Csr: csr})))
	})
	if err != nil {
		return time.Time{}, err
	}
	leaf, err := x509.ParseCertificate(m.GetCertificate())
	if err != nil {
		return time.Time{}, fault.Because(err, op, fault.Invalid, "the control plane answered with no certificate")
	}
	if pub, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(key.Public()) {
		return time.Time{}, fault.New(op, fault.Invalid, "the certificate is not of the key that asked for it")
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return time.Time{}, fault.At(op, fault.Internal, err)
	}
	return leaf.NotAfter, replace(map[string][]byte{
		v.Key:         pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		v.Certificate: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw}),
	})
}

// loadPair reads a certificate and its key. If they do not match, a renewal was killed while [replace] put them in their places: what lies
// beside them completes the pair, and is put there now.
func loadPair(cert, key string) (tls.Certificate, error) {
	cert, key = filepath.Clean(cert), filepath.Clean(key)
	leaf, err := tls.LoadX509KeyPair(cert, key)
	for try := 0; err != nil && try < 10; try++ { // a renewal beside this process is between two renames for less than that
		time.Sleep(20 * time.Millisecond)
		leaf, err = tls.LoadX509KeyPair(cert, key)
	}
	if err == nil {
		return leaf, nil
	}
	for _, p := range [][2]string{{cert + ".new", key}, {cert, key + ".new"}, {cert + ".new", key + ".new"}} {
		leaf, none := tls.LoadX509KeyPair(p[0], p[1])
		if none != nil {
			continue
		}
		for i, to := range []string{cert, key} {
			if p[i] == to {
				continue
			}
			if err := os.Rename(p[i], to); err != nil && !errors.Is(err, fs.ErrNotExist) { // not there: the renewal goes on beside this process, and did it
				return leaf, fault.Because(err, "demarc.loadPair", fault.Unavailable, "a renewal was cut short, and %s can't be put in the place of %s", p[i], to)
			}
		}
		return leaf, nil
	}
	return leaf, err
}

// replace writes files beside the old ones, readable by their owner only, and puts them in their place when all are there.
func replace(files map[string][]byte) error {
	const op = "demarc.replace"
	for path, b := range files {
		f, err := os.OpenFile(filepath.Clean(path)+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return fault.Because(err, op, fault.Unavailable, "%s.new can't be written", path)
		}
		_, err = f.Write(b)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			_ = os.Remove(f.Name())
			return fault.Because(err, op, fault.Unavailable, "%s.new can't be written: %s", path, fault.Disk(err))
		}
	}
	for path := range files {
		if err := os.Rename(filepath.Clean(path)+".new", filepath.Clean(path)); err != nil && !errors.Is(err, fs.ErrNotExist) { // not there: see loadPair
			return fault.Because(err, op, fault.Unavailable, "%s can't be replaced", path)
		}
	}
	return nil
}
