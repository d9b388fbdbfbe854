// SPDX-License-Identifier: Apache-2.0

//go:build !race

package ledgertest

// each is of how many fields the test of leaves takes one.
const each = 1
