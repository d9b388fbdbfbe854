// SPDX-License-Identifier: Apache-2.0

// Package runbooks runs the runbooks of docs word for word against real processes on loopback: see its test.
package runbooks
