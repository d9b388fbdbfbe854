// SPDX-License-Identifier: Apache-2.0

package cli

import "github.com/spf13/cobra"

// vendor is what the vendor's operator types.
func (a *app) vendor() []*cobra.Command {
	return []*cobra.Command{a.controlPlane()}
}

// customer is what the customer types.
func (a *app) customer() []*cobra.Command {
	return []*cobra.Command{a.key(), a.secret()}
}
