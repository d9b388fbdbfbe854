// SPDX-License-Identifier: Apache-2.0

// Package client calls a control plane as one of its operators, and an appliance as its customer.
//
// It promises that a node is recognised by its certificate and never by its address, that a call is tried at one node after another until
// one answers or the time is over, and that asking twice does a thing once: a request carries its own id. If an answer may have been lost,
// the error is [fault.Unsure]. The CAs by which nodes are recognised are kept up to date on disk, each bundle signed by the vendor's log.
//
//	o, err := client.ReadOperator("operator.yaml")
//	c, err := client.Open(o, client.Options{Timeout: 30 * time.Second})
//	defer c.Close()
//	m, err := client.Call(ctx, c, client.Node.Status, &controlv1.StatusRequest{})
package client
