// SPDX-License-Identifier: Apache-2.0

// Package upgrade runs the programs of the previous build beside those of this one, as real processes on loopback: see its test.
package upgrade
