// SPDX-License-Identifier: Apache-2.0

// Package roads runs real demarcd processes in network namespaces of its own, with two roads between them, and breaks the road in
// use while counted messages flow. It uses nothing but the programs' files and commands. It needs root, ip and iptables: make test-roads.
package roads
