// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/identity/identitytest"
)

// measured is what one turn tells; the other side's program writes the same.
type measured struct {
	Changes float64 `json:"changes"`
	Seconds float64 `json:"seconds"`
	P50     float64 `json:"p50"` // seconds
	P99     float64 `json:"p99"`

	cpu float64 // seconds that the three processes computed
}

const (
	appliances = 1000
	bodyBytes  = 256
)

// dial makes an operator's client with a connection of its own.
func dial(dir, addr string) (controlv1connect.ControlClient, error) {
	roots, err := readPool(filepath.Join(dir, "bundle.pem"))
	if err != nil {
		return nil, err
	}
	ann, err := tls.LoadX509KeyPair(filepath.Join(dir, "operator", "cert.pem"), filepath.Join(dir, "operator", "cert.key"))
	if err != nil {
		return nil, err
	}
	t := &http.Transport{ForceAttemptHTTP2: true, MaxIdleConns: 1,
		TLSClientConfig: identity.Client(identity.Fixed(&ann, roots), identity.WantNode(domain), "h2")}
	return controlv1connect.NewControlClient(&http.Client{Transport: t}, "https://"+addr), nil
}

func name(i int) string { return fmt.Sprintf("a-%05d", i%appliances) }

// change is one of an operator: 256 bytes of body in the log, its record in the audit log included.
func change(i int, request string) *connect.Request[controlv1.BanApplianceRequest] {
	empty, _ := json.Marshal(map[string]string{"name": name(i), "reason": ""})
	return connect.NewRequest(
		&controlv1.BanApplianceRequest{RequestId: request, Name: name(i), Reason: strings.Repeat("r", bodyBytes-len(empty))})
}

// register fills the book with what the changes are about.
func register(dir, addr string) error {
	c, err := dial(dir, addr)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if _, err := c.RegisterCustomer(ctx,
		connect.NewRequest(&controlv1.RegisterCustomerRequest{RequestId: "customer", Name: "globex"})); err != nil {
		return err
	}
	issuer, err := identitytest.NewIssuer("https://issuer.bench.example")
	if err != nil {
		return err
	}
	expect, err := json.Marshal(issuer.Expect("demarc", "appliance"))
	if err != nil {
		return err
	}
	errs := make([]error, appliances)
	var wg sync.WaitGroup
	slots := make(chan struct{}, 32)
	for i := range appliances {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			_, errs[i] = c.RegisterAppliance(ctx,
				connect.NewRequest(&controlv1.RegisterApplianceRequest{RequestId: name(i), Name: name(i), Customer: "globex", Expect: expect}))
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// load makes changes for a while.
func load(dir string, addrs []string, clients, seconds int, turn string) (measured, error) {
	var m measured
	conns := make([]controlv1connect.ControlClient, clients)
	ctx := context.Background()
	for i := range conns {
		var err error
		if conns[i], err = dial(dir, addrs[i%len(addrs)]); err != nil {
			return m, err
		}
		if _, err := conns[i].BanAppliance(ctx, change(i, fmt.Sprintf("%s-warm-%d", turn, i))); err != nil {
			return m, err
		}
	}
	took := make([][]float64, clients)
	errs := make([]error, clients)
	var wg sync.WaitGroup
	begun := time.Now()
	end := begun.Add(time.Duration(seconds) * time.Second)
	for i, c := range conns {
		wg.Go(func() {
			for n := 0; time.Now().Before(end); n++ {
				t := time.Now()
				if _, errs[i] = c.BanAppliance(ctx, change(i*7919+n, fmt.Sprintf("%s-%d-%d", turn, i, n))); errs[i] != nil {
					return
				}
				took[i] = append(took[i], time.Since(t).Seconds())
			}
		})
	}
	wg.Wait()
	m.Seconds = time.Since(begun).Seconds()
	var all []float64
	for i := range took {
		if errs[i] != nil {
			return m, errs[i]
		}
		all = append(all, took[i]...)
	}
	slices.Sort(all)
	m.Changes, m.P50, m.P99 = float64(len(all)), all[len(all)/2], all[len(all)*99/100]
	return m, nil
}
