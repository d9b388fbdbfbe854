// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"log/slog"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/mesh"
)

// Tailnet gives the node of a tailnet section. Its credentials are read from their files whenever it joins.
func Tailnet(t configs.Tailnet, log *slog.Logger) mesh.TailnetConfig {
	files := mesh.CredentialFiles{AuthKey: t.AuthKeyFile, ClientSecret: t.OAuthClientFile}
	if w := t.Workload; w != nil {
		files.ClientID, files.IDToken, files.Audience = w.ClientID, w.IDTokenFile, w.Audience
	}
	return mesh.TailnetConfig{ControlURL: t.ControlURL, Credentials: files.Read, Hostname: t.Hostname, Dir: t.Dir, Tags: t.Tags, Logger: log}
}
