// SPDX-License-Identifier: Apache-2.0

// Command load puts values into etcd from a number of clients, each with a connection of its own, and tells how long each
// put took. See bench/raft.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func main() {
	var (
		clients   = flag.Int("clients", 1, "clients")
		seconds   = flag.Int("seconds", 5, "how long")
		bytes     = flag.Int("bytes", 256, "of a value")
		keys      = flag.Int("keys", 1000, "different keys")
		endpoints = flag.String("endpoints", "", "host:port, separated by commas; client n uses one")
		dir       = flag.String("certs", "", "folder of ca.pem, client.pem and client.key")
	)
	flag.Parse()
	if err := run(*clients, *seconds, *bytes, *keys, strings.Split(*endpoints, ","), *dir); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run(clients, seconds, bytes, keys int, endpoints []string, dir string) error {
	pair, err := tls.LoadX509KeyPair(dir+"/client.pem", dir+"/client.key")
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(dir + "/ca.pem")
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	conns := make([]*clientv3.Client, clients)
	value := strings.Repeat("v", bytes)
	for i := range conns {
		conns[i], err = clientv3.New(clientv3.Config{Endpoints: []string{endpoints[i%len(endpoints)]}, DialTimeout: 20 * time.Second,
			TLS: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots}})
		if err != nil {
			return err
		}
		if _, err := conns[i].Put(context.Background(), "warm", value); err != nil {
			return err
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
				if _, errs[i] = c.Put(context.Background(), fmt.Sprintf("key-%05d", (i*7919+n)%keys), value); errs[i] != nil {
					return
				}
				took[i] = append(took[i], time.Since(t).Seconds())
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(begun).Seconds()
	var all []float64
	for i := range took {
		if errs[i] != nil {
			return errs[i]
		}
		all = append(all, took[i]...)
	}
	sort.Float64s(all)
	return json.NewEncoder(os.Stdout).Encode(
		map[string]float64{"changes": float64(len(all)), "seconds": elapsed, "p50": all[len(all)/2], "p99": all[len(all)*99/100]})
}
