// SPDX-License-Identifier: Apache-2.0

package main

import "github.com/spf13/cobra"

func (a *app) mesh() *cobra.Command {
	return group("mesh", "The roads between appliances and the control plane", a.privateLink())
}
