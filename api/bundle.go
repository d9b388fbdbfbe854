// SPDX-License-Identifier: Apache-2.0

package api

// BundleHeader is the header by which an operator's command and a node tell each other, on each call over a proven connection, the number
// of the signed bundle of CAs: in the request the one that the command holds (0 if it does not know), in the answer the newest that the
// node knows. A command that holds an older one asks for the signed bundle; what it then says is its acknowledgement.
const BundleHeader = "Demarc-Bundle"
