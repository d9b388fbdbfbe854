// SPDX-License-Identifier: Apache-2.0

//go:build race

package ledgertest

// each is of how many fields the test of leaves takes one. There is nothing in it for the race detector, under which it takes minutes.
const each = 8
