// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// peer is three members of etcd with TLS and certificates on both sides, for clients and between members.
type peer struct {
	clients []string // host:port
	procs   []*exec.Cmd
}

func startEtcd(bin, dir string) (*peer, error) {
	if err := certificates(dir); err != nil {
		return nil, err
	}
	p := &peer{}
	var peers, cluster []string
	for i := range 3 {
		p.clients, peers = append(p.clients, free()), append(peers, free())
		cluster = append(cluster, fmt.Sprintf("e%d=https://%s", i, peers[i]))
	}
	for i := range 3 {
		c, err := startProc(filepath.Join(bin, "etcd"), "--name", fmt.Sprintf("e%d", i), "--data-dir", filepath.Join(dir, fmt.Sprintf("e%d", i)),
			"--listen-client-urls", "https://"+p.clients[i], "--advertise-client-urls", "https://"+p.clients[i],
			"--listen-peer-urls", "https://"+peers[i], "--initial-advertise-peer-urls", "https://"+peers[i],
			"--initial-cluster", strings.Join(cluster, ","), "--initial-cluster-state", "new", "--log-level", "error", "--quota-backend-bytes",
			"8000000000",
			"--client-cert-auth", "--trusted-ca-file", dir+"/ca.pem", "--cert-file", dir+"/server.pem", "--key-file", dir+"/server.key",
			"--peer-client-cert-auth", "--peer-trusted-ca-file", dir+"/ca.pem", "--peer-cert-file", dir+"/server.pem", "--peer-key-file",
			dir+"/server.key")
		if err != nil {
			return p, err
		}
		p.procs = append(p.procs, c)
	}
	for _, a := range p.clients {
		if err := answers(a); err != nil {
			return p, err
		}
	}
	return p, nil
}

func (p *peer) stop() {
	for _, c := range p.procs {
		kill(c)
	}
}

// leader finds the client address of the member that leads: etcd tells in its metrics.
func (p *peer) leader(dir string) (string, error) {
	pair, err := tls.LoadX509KeyPair(dir+"/client.pem", dir+"/client.key")
	if err != nil {
		return "", err
	}
	roots, err := readPool(dir + "/ca.pem")
	if err != nil {
		return "", err
	}
	for limit := time.Now().Add(30 * time.Second); time.Now().Before(limit); time.Sleep(100 * time.Millisecond) {
		for _, a := range p.clients {
			if gauge("https://"+a+"/metrics", &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots}, "etcd_server_is_leader") == 1 {
				return a, nil
			}
		}
	}
	return "", errors.New("etcd has no leader")
}

func certificates(dir string) error {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(24 * time.Hour),
		IsCA:     true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return err
	}
	if err := writePEM(dir+"/ca.pem", "CERTIFICATE", der); err != nil {
		return err
	}
	for n, name := range []string{"server", "client"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		leaf := &x509.Certificate{SerialNumber: big.NewInt(int64(n + 2)), Subject: pkix.Name{CommonName: name}, NotBefore: ca.NotBefore,
			NotAfter:    ca.NotAfter,
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
		der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
		if err != nil {
			return err
		}
		k, err := x509.MarshalECPrivateKey(key)
		if err != nil {
			return err
		}
		if err := errors.Join(writePEM(dir+"/"+name+".pem", "CERTIFICATE", der), writePEM(dir+"/"+name+".key", "EC PRIVATE KEY", k)); err != nil {
			return err
		}
	}
	return nil
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
