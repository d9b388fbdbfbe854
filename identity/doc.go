// SPDX-License-Identifier: Apache-2.0

// Package identity is certificates (SPIFFE IDs), CA slots, and the verifiers of platform identity.
//
// The promise: a principal is read from one place only, the leaf of a chain that was verified in this very
// handshake, and a certificate that says two things, or says them for a trust domain that its issuer does not
// own, says nothing. A platform's token proves one key for one nonce of one trust domain, and nothing else.
//
// # Certificates
//
// A leaf carries exactly one URI SAN, spiffe://<trust domain>/{node,operator,appliance}/<name>. A CA certificate
// carries exactly one, spiffe://<trust domain>, is name-constrained to that domain, and signs leaves only. Nodes
// serve and call; operators and appliances only call (extended key usage). Whoever pools the CAs of several trust
// domains is safe: the leaf's domain must be that of the root of its own chain.
//
// # Files and words
//
//	bundle      PEM, "CERTIFICATE" blocks only, at most 16, each a CA of one trust domain
//	sealed key  line 1 "demarc-ca-key/1", line 2 base64 of nonce (12) and AES-256-GCM of the PKCS #8 key;
//	            additional data: line 1 and the digest of the CA certificate
//	nonce       "n1." and base64url of expiry (8, Unix seconds, big endian), random (16), HMAC-SHA256 (32)
//	audience    demarc://<trust domain>/enrol?nonce=<nonce>&key=<base64url of SHA-256 of the CSR's public key, PKIX>
//
// There is no clock, no randomness and no network in here: now and rand are arguments. A handshake takes the time
// from its [Source] where that has a clock, else crypto/tls takes the host's.
package identity
