// SPDX-License-Identifier: Apache-2.0

// Package roads is the live switch under faults: real processes in network namespaces of the test's own, two roads between
// them, numbered messages on their way, and one fault at a time.
//
// A fleet is a control plane in one namespace and an appliance in another. The road https leads through a proxy that asks for
// authentication, found by a name of a resolver of the test's own; the road privatelink is a cable beside it. Nothing leaves
// the two namespaces: they have no route but to each other.
//
// It needs root, ip and iptables, and runs where DEMARC_NETNS is set: `make test-roads` sets it.
package roads
