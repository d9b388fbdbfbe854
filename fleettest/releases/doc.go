// SPDX-License-Identifier: Apache-2.0

// Package releases plays, with real processes on loopback, a control plane that loses nodes while releases go out.
package releases
