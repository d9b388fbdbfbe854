// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/demarc-dev/demarc/api"
	controlv1 "github.com/demarc-dev/demarc/api/control/v1"
	"github.com/demarc-dev/demarc/api/control/v1/controlv1connect"
	"github.com/demarc-dev/demarc/daemon/controlplane"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
)

const sealedNote = "A snapshot holds the whole book and its audit log: who your customers are and what was done. The keys of the CAs in it are sealed\n" +
	"with the kek, and are of no use without it: keep the two apart, and keep both. Artifacts of releases are not in it."

func (a *app) snapshot() *cobra.Command {
	save := a.online(&cobra.Command{Use: "save FILE", Short: "Save the book as it is now, from any node", Args: exactly(1, "the file to write"),
		Long:    "save streams a snapshot of the book to a new file, verifies it whole, and only then gives it its name.\n" + sealedNote,
		Example: "  demarc control-plane snapshot save acme.snap"},
		func(ctx context.Context, v *vendor, args []string) error { return a.saveSnapshot(ctx, v, args[0]) })
	inspect := &cobra.Command{Use: "inspect FILE", Short: "Verify a snapshot, offline, and say what it holds", Args: exactly(1, "the snapshot"),
		Long:    "inspect checks both checksums and every line, and computes the root of the audit log anew. It needs no key and no connection.",
		Example: "  demarc control-plane snapshot inspect acme.snap --output json"}
	inspect.RunE = func(_ *cobra.Command, args []string) error {
		h, inv, err := inspectFile(args[0])
		if err != nil {
			return err
		}
		return a.holds(args[0], h, inv)
	}
	var config, dir string
	var force bool
	var above uint64
	restore := &cobra.Command{Use: "restore FILE --config NODE.YAML", Short: "Begin a new cluster of one node with a snapshot, offline", Args: exactly(1, "the snapshot"),
		Long: "restore writes a snapshot into the directory of a node that is stopped, and makes it the only member. Start it, then add others.\n" +
			"A directory that holds a log already is refused; with --force it is set aside and kept. The book begins another epoch, so that\nappliances know what they have to do with it.\nThe node needs the kek of the control plane that the snapshot is of.",
		Example: "  demarc control-plane snapshot restore acme.snap --config acme/cp-1/node.yaml"}
	restore.RunE = func(_ *cobra.Command, args []string) error {
		cfg, err := nodeFile(config, dir)
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
		return a.emit(map[string]any{"node": cfg.Name, "aside": aside, "book": inv}, func(w io.Writer) {
			if aside != "" {
				fmt.Fprintf(w, "what was there is in %s\n", aside)
			}
			fmt.Fprintf(w, "node %s is the only member of a cluster that goes on after change %d\naudit log\t%d entries, root %s\nthe names of all other nodes are removed for good\nstart it, then add others under new names:\n  demarcd run -c %s\n", cfg.Name, inv.Index, inv.AuditSize, inv.AuditRoot, config)
			begun(w, inv)
		})
	}
	restore.Flags().StringVar(&config, "config", "", "the node's file")
	restore.Flags().StringVar(&dir, "dir", "", "the node's data directory, in place of that in its file")
	restore.Flags().BoolVar(&force, "force", false, "set a log aside that is there already")
	epochAbove(restore, &above)
	return group("snapshot", "Copies of the book", save, inspect, restore)
}

func (a *app) recover() *cobra.Command {
	var config, dir string
	var above uint64
	c := &cobra.Command{Use: "recover --config NODE.YAML", Short: "Go on with one surviving node where the majority is lost for good, offline", Args: exactly(0, "no arguments"),
		Long: "recover makes a stopped node the only member of its cluster, with all that it holds itself. Use it where the others are lost and\n" +
			"will never come back: what they had and this node had not is gone, and two clusters of one history can't be made one again.\nTake the node with the highest index. The names of the others are removed for good: one that comes back is refused, is told so and ends.\nStart the node, and add new ones under other names.",
		Example: "  demarc control-plane recover --config acme/cp-2/node.yaml"}
	c.RunE = func(*cobra.Command, []string) error {
		cfg, err := nodeFile(config, dir)
		if err != nil {
			return err
		}
		inv, err := controlplane.Recover(cfg, above)
		if err != nil {
			return err
		}
		return a.emit(map[string]any{"node": cfg.Name, "book": inv}, func(w io.Writer) {
			fmt.Fprintf(w, "node %s is the only member of a cluster that goes on after change %d\naudit log\t%d entries, root %s\nthe names of all other nodes are removed for good\nstart it, then add others under new names:\n  demarcd run -c %s\n", cfg.Name, inv.Index, inv.AuditSize, inv.AuditRoot, config)
			begun(w, inv)
		})
	}
	c.Flags().StringVar(&config, "config", "", "the node's file")
	c.Flags().StringVar(&dir, "dir", "", "the node's data directory, in place of that in its file")
	epochAbove(c, &above)
	return c
}

// epochAbove is the flag for when appliances have met an epoch that the book can't know of, and that is not over by the clock.
func epochAbove(c *cobra.Command, above *uint64) {
	c.Flags().Uint64Var(above, "epoch-above", 0, "begin an epoch with a number above this one; needed only where an appliance's refusal says so")
}

// begun says which epoch the book is in now.
func begun(w io.Writer, inv controlplane.Inventory) {
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

// holds says what a snapshot holds.
func (a *app) holds(path string, h book.SnapshotHead, inv controlplane.Inventory) error {
	return a.emit(map[string]any{"file": path, "head": h, "book": inv}, func(w io.Writer) {
		fmt.Fprintf(w, "snapshot\t%s\ntaken\t%s at node %s\ntrust domain\t%s\nsealed with\tkek %s\nindex\t%d, of term %d\nappliances\t%d of %d customers\naudit log\t%d entries, root %s\n", path, h.At.Format(time.RFC3339), h.Node,
			inv.TrustDomain, orDash(inv.KEK), h.Index, h.Term, inv.Appliances, inv.Customers, inv.AuditSize, inv.AuditRoot)
	})
}

func (a *app) saveSnapshot(ctx context.Context, v *vendor, path string) error {
	const op = "demarc.snapshot"
	if _, err := os.Lstat(path); err == nil {
		return fault.New(op, fault.Conflict, "%s is there already: nothing is overwritten", path)
	}
	part := path + ".part"
	f, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "can't write %s", part)
	}
	defer os.Remove(part)
	defer f.Close()
	err = v.bulk(ctx, func(ctx context.Context, _ controlv1connect.ControlClient, alive func()) error {
		if err := errors.Join(f.Truncate(0), rewind(f)); err != nil {
			return fault.At(op, fault.Internal, err)
		}
		s, err := v.clusters[v.at].SaveSnapshot(ctx, connect.NewRequest(&controlv1.SaveSnapshotRequest{}))
		if err != nil {
			return explain(err)
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
		return explain(s.Err())
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
	return a.holds(path, h, inv)
}

func rewind(f *os.File) error {
	_, err := f.Seek(0, io.SeekStart)
	return err
}

// newCluster makes the client of what concerns the nodes themselves.
func newCluster(c connect.HTTPClient, node string) controlv1connect.ClusterClient {
	return controlv1connect.NewClusterClient(c, "https://"+node, connect.WithReadMaxBytes(4<<20), api.Doubt())
}
