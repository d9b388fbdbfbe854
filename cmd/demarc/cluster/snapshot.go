// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/client"
	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
)

const sealedNote = "A snapshot holds the whole book and its audit log: who your customers are and what was done. The keys of the CAs in " +
	"it are sealed\n" +
	"with the kek, and are of no use without it: keep the two apart, and keep both. Artifacts of releases are not in it."

func snapshotCommand(a *cli.App) *cobra.Command {
	save := a.Online(&cobra.Command{
		Use:   "save FILE",
		Short: "Save the book as it is now, from any node",
		Args:  cli.Exactly(1, "the file to write"),
		Long: "save streams a snapshot of the book to a new file, verifies it whole, and only then renames it to FILE.\n" +
			sealedNote,
		Example: "  demarc control-plane snapshot save acme.snap",
	},
		func(ctx context.Context, v *client.Client, args []string) error {
			return saveSnapshot(ctx, a, v, args[0])
		})
	inspect := &cobra.Command{
		Use:   "inspect FILE",
		Short: "Verify a snapshot, offline, and say what it holds",
		Args:  cli.Exactly(1, "the snapshot"),
		Long: "inspect checks both checksums and every line, and computes the root of the audit log anew. It needs no key and no\n" +
			"connection.",
		Example: "  demarc control-plane snapshot inspect acme.snap --output json",
	}
	inspect.RunE = func(_ *cobra.Command, args []string) error {
		h, inv, err := inspectFile(args[0])
		if err != nil {
			return err
		}
		return printSnapshot(a, args[0], h, inv)
	}
	var config, dir string
	var force bool
	var above uint64
	restore := &cobra.Command{
		Use:   "restore FILE --config NODE.YAML",
		Short: "Begin a new cluster of one node with a snapshot, offline",
		Args:  cli.Exactly(1, "the snapshot"),
		Long: "restore writes a snapshot into the directory of a node that is stopped, and makes it the only member. Start it, then\n" +
			"add others. A directory that holds a log already is refused; with --force it is set aside and kept. The book begins\n" +
			"another epoch, so that appliances know what they have to do with it. The node needs the kek of the control plane that\n" +
			"the snapshot is of.",
		Example: "  demarc control-plane snapshot restore acme.snap --config acme/cp-1/node.yaml",
	}
	restore.RunE = func(_ *cobra.Command, args []string) error {
		cfg, err := cli.ReadNode(config, dir)
		if err != nil {
			return err
		}
		f, size, err := openSized(args[0])
		if err != nil {
			return err
		}
		defer f.Close()
		inv, aside, err := controlplane.RestoreSnapshot(cfg, f, size, force, above)
		if err != nil {
			return err
		}
		return a.Emit(map[string]any{"node": cfg.Name, "aside": aside, "book": inv}, func(w io.Writer) {
			if aside != "" {
				fmt.Fprintf(w, "what was there is in %s\n", aside)
			}
			printAlone(w, cfg.Name, config, inv)
		})
	}
	restore.Flags().StringVar(&config, "config", "", "the node's file")
	restore.Flags().StringVar(&dir, "dir", "", "the node's data directory, in place of that in its file")
	restore.Flags().BoolVar(&force, "force", false, "set a log aside that is there already")
	epochAbove(restore, &above)
	return cli.Group("snapshot", "Copies of the book", save, inspect, restore)
}

func recoverCommand(a *cli.App) *cobra.Command {
	var config, dir string
	var above uint64
	c := &cobra.Command{
		Use:   "recover --config NODE.YAML",
		Short: "Continue with one surviving node when the majority is lost for good, offline",
		Args:  cli.Exactly(0, "no arguments"),
		Long: "recover makes a stopped node the only member of its cluster, with all that it holds itself. Use it when the others are\n" +
			"lost and will never come back: what they had and this node had not is gone, and two clusters of one history can't be\n" +
			"made one again. Take the node with the highest index. The names of the others are removed for good: one that comes\n" +
			"back is refused with the reason and ends. Start the node, and add new ones under other names.",
		Example: "  demarc control-plane recover --config acme/cp-2/node.yaml",
	}
	c.RunE = func(*cobra.Command, []string) error {
		cfg, err := cli.ReadNode(config, dir)
		if err != nil {
			return err
		}
		inv, err := controlplane.Recover(cfg, above)
		if err != nil {
			return err
		}
		return a.Emit(map[string]any{"node": cfg.Name, "book": inv}, func(w io.Writer) {
			printAlone(w, cfg.Name, config, inv)
		})
	}
	c.Flags().StringVar(&config, "config", "", "the node's file")
	c.Flags().StringVar(&dir, "dir", "", "the node's data directory, in place of that in its file")
	epochAbove(c, &above)
	return c
}

// epochAbove is the flag for when appliances have met an epoch that the book can't know of, and that is not over by the clock.
func epochAbove(c *cobra.Command, above *uint64) {
	c.Flags().Uint64Var(above, "epoch-above", 0, "begin an epoch with a number above this one; needed only if an appliance's refusal says so")
}

// printAlone prints what a node holds that is the only member of its cluster now, and what to do next.
func printAlone(w io.Writer, name, config string, inv controlplane.Inventory) {
	fmt.Fprintf(w, "node %s is the only member of a cluster that continues after change %d\naudit log\t%d entries, root %s\n",
		name, inv.Index, inv.AuditSize, inv.AuditRoot)
	fmt.Fprintf(w, "the names of all other nodes are removed for good\nstart it, then add others under new names:\n  demarcd run -c %s\n",
		config)
	fmt.Fprintf(w, "epoch\t%s: appliances and this book meet again by it, and both put on record what was lost\n", inv.Epoch)
}

func openSized(path string) (*os.File, int64, error) {
	const op = "demarc.snapshot"
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, fault.Because(err, op, fault.NotFound, "the snapshot can't be read: %s", path)
	}
	st, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, 0, fault.At(op, fault.Unavailable, err)
	}
	return f, st.Size(), nil
}

func inspectFile(path string) (book.SnapshotHead, controlplane.Inventory, error) {
	f, size, err := openSized(path)
	if err != nil {
		return book.SnapshotHead{}, controlplane.Inventory{}, err
	}
	defer f.Close()
	return controlplane.InspectSnapshot(f, size)
}

// printSnapshot prints what a snapshot holds.
func printSnapshot(a *cli.App, path string, h book.SnapshotHead, inv controlplane.Inventory) error {
	return a.Emit(map[string]any{"file": path, "head": h, "book": inv}, func(w io.Writer) {
		fmt.Fprintf(w, "snapshot\t%s\ntaken\t%s at node %s\ntrust domain\t%s\nsealed with\tkek %s\nindex\t%d, of term %d\n"+
			"appliances\t%d of %d customers\naudit log\t%d entries, root %s\n", path, h.At.Format(time.RFC3339), h.Node,
			inv.TrustDomain, cli.OrDash(inv.KEK), h.Index, h.Term, inv.Appliances, inv.Customers, inv.AuditSize, inv.AuditRoot)
	})
}

func saveSnapshot(ctx context.Context, a *cli.App, v *client.Client, path string) error {
	const op = "demarc.snapshot"
	if err := cli.Absent(path); err != nil {
		return err
	}
	part := path + ".part"
	f, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't write %s", part)
	}
	defer os.Remove(part)
	defer f.Close()
	err = v.Stream(ctx, func(ctx context.Context, n client.Node, alive func()) error {
		if err := errors.Join(f.Truncate(0), rewind(f)); err != nil {
			return fault.At(op, fault.Internal, err)
		}
		s, err := n.SaveSnapshot(ctx, connect.NewRequest(&controlv1.SaveSnapshotRequest{}))
		if err != nil {
			return client.Fault(err)
		}
		defer s.Close()
		for total := int64(0); s.Receive(); {
			alive()
			if total += int64(len(s.Msg().GetData())); total > book.MaxSnapshot {
				return fault.New(op, fault.Invalid, "the snapshot has more than %d bytes", int64(book.MaxSnapshot))
			}
			if _, err := f.Write(s.Msg().GetData()); err != nil {
				return fault.Because(err, op, fault.Internal, "can't write %s", part)
			}
		}
		return client.Fault(s.Err())
	})
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't write %s", part)
	}
	h, inv, err := inspectFile(part)
	if err != nil {
		return err
	}
	if err := os.Rename(part, path); err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't write %s", path)
	}
	return printSnapshot(a, path, h, inv)
}

func rewind(f *os.File) error {
	_, err := f.Seek(0, io.SeekStart)
	return err
}
