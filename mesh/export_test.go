// SPDX-License-Identifier: Apache-2.0

package mesh

// Refused is the error of a coordinator's words.
var Refused = refused
