// SPDX-License-Identifier: Apache-2.0

package mesh

// Refused is the error of a coordinator's words.
var Refused = refused

// Most is how many connections a node holds at most.
func (n *Node) Most() int { return n.held.most }

// The curves of the forms of a ClientHello.
var (
	FullCurves  = fullCurves
	OnlyCurves  = onlyCurves
	SmallCurves = smallCurves
)
