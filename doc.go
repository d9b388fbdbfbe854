// SPDX-License-Identifier: Apache-2.0

// Package demarc is the module's root. It holds no code, only the tests that keep the house in order.
package demarc
