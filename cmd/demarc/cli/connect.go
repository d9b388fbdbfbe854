// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/api/local/v1/localv1connect"
	"github.com/demarc-dev/demarc/client"
)

// Online makes a command that calls the control plane.
func (a *App) Online(c *cobra.Command, do func(ctx context.Context, v *client.Client, args []string) error) *cobra.Command {
	c.RunE = func(c *cobra.Command, args []string) error {
		v, err := a.Client()
		if err != nil {
			return err
		}
		defer v.Close()
		return do(c.Context(), v, args)
	}
	return c
}

// Client opens the client of the operator's file.
func (a *App) Client() (*client.Client, error) {
	if a.Context == "" {
		return nil, Usage("name the operator's file with --context FILE or DEMARC_CONTEXT")
	}
	o, err := client.ReadOperator(a.Context)
	if err != nil {
		return nil, err
	}
	return client.Open(o, client.Options{Timeout: a.Timeout, Warn: a.Note})
}

// Local makes a command that calls the customer's own appliance.
func (a *App) Local(c *cobra.Command, do func(ctx context.Context, l localv1connect.LocalClient, args []string) error) *cobra.Command {
	c.RunE = func(c *cobra.Command, args []string) error {
		if a.Socket == "" {
			return Usage("name the appliance's socket with --socket PATH or DEMARC_SOCKET")
		}
		ctx, cancel := a.Bounded(c)
		defer cancel()
		return do(ctx, client.Local(a.Socket), args)
	}
	return c
}
