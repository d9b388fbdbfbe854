// SPDX-License-Identifier: Apache-2.0

package controlplane

import (
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/demarc-dev/demarc/configs"
	"github.com/demarc-dev/demarc/daemon/controlplane/authority"
	"github.com/demarc-dev/demarc/daemon/controlplane/book"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/fleet"
	"github.com/demarc-dev/demarc/ledger"
	"github.com/demarc-dev/demarc/raft"
)

// Inventory says what a book holds, for people.
type Inventory struct {
	TrustDomain string      `json:"trust_domain"`
	Index       uint64      `json:"index"` // of the last change
	Customers   int         `json:"customers"`
	Appliances  int         `json:"appliances"`
	AuditSize   int64       `json:"audit_size"`
	AuditRoot   string      `json:"audit_root"` // hex
	Epoch       fleet.Epoch `json:"epoch"`
	Bundle      uint64      `json:"bundle"` // number of the CAs
	KEK         string      `json:"kek"`    // name of the key-encryption key that opens what is sealed in it
}

// Take lists what a book holds.
func Take(b *ledger.Book[book.State]) Inventory {
	page, log := b.Both()
	root := log.Root()
	return Inventory{TrustDomain: page.TrustDomain, Index: b.Index(), Customers: page.CustomerCount(), Appliances: page.ApplianceCount(),
		AuditSize: log.Size(), AuditRoot: hex.EncodeToString(root[:]), Epoch: page.Epoch().Epoch, Bundle: page.Bundle(), KEK: page.KEK}
}

// InspectSnapshot verifies a snapshot file and says what it holds.
func InspectSnapshot(r io.Reader, size int64) (book.SnapshotHead, Inventory, error) {
	h, stored, err := book.ReadSnapshot(r, size)
	if err != nil {
		return h, Inventory{}, err
	}
	return h, Take(stored), nil
}

func offline(cfg *configs.Control, stored raft.Machine) raft.Offline {
	return raft.Offline{Dir: filepath.Join(cfg.Dir, "raft"), Self: raft.Member{ID: cfg.Name, Addr: cfg.Self().Raft}, Machine: stored}
}

// RestoreSnapshot makes the stopped node of a file the only member of a new cluster that begins with a snapshot. A node
// that holds a log already is left alone unless force is set: then that log is set aside, in a folder that is named in the
// answer, and not deleted. Before anything is changed, everything that is sealed in the snapshot is opened with the node's kek_file.
//
// The book begins another epoch: its number is above the one given, that of the snapshot, and that of the node's own disk.
func RestoreSnapshot(cfg *configs.Control, r io.Reader, size int64, force bool, above uint64) (inv Inventory, aside string, err error) {
	const op = "controlplane.RestoreSnapshot"
	h, stored, err := book.ReadSnapshot(r, size)
	if err != nil {
		return inv, "", err
	}
	if h.TrustDomain != cfg.TrustDomain {
		return inv, "", fault.New(op, fault.Conflict, "the snapshot is of the trust domain %q, the file says %q", h.TrustDomain, cfg.TrustDomain)
	}
	if err := authority.OpenAll(cfg, stored.View()); err != nil {
		return inv, "", err
	}
	if err := begin(stored, cfg.Name, book.ByRestore, max(above, authority.MetBefore(cfg))); err != nil {
		return inv, "", err
	}
	state, err := stored.Snapshot()
	if err != nil {
		return inv, "", fault.At(op, "", err)
	}
	dir := filepath.Join(cfg.Dir, "raft")
	switch left, err := os.ReadDir(dir); {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return inv, "", fault.Because(err, op, fault.Unavailable, "the directory of the node can't be read")
	case len(left) > 0 && !force:
		return inv, "", fault.New(op, fault.Conflict, "%s is not empty: with --force it is set aside first", dir)
	case len(left) > 0:
		if err := raft.CheckUnused(dir); err != nil {
			return inv, "", err
		}
		aside = dir + ".before-" + time.Now().UTC().Format("20060102T150405Z")
		if err := os.Rename(dir, aside); err != nil {
			return inv, "", fault.Because(err, op, fault.Unavailable, "the directory of the node can't be set aside")
		}
	}
	if err := authority.ForgetCredentials(cfg); err != nil {
		return inv, aside, err
	}
	if err := offline(cfg, stored).Install(h.Index, h.Term, state); err != nil {
		return inv, aside, err
	}
	return Take(stored), aside, nil
}

// survivor is the book of the one node that goes on. The new epoch is in the snapshot that makes the node the only member: there is none
// without the other.
type survivor struct {
	*ledger.Book[book.State]
	cfg    *configs.Control
	above  uint64
	failed error // of Snapshot
}

// Snapshot implements raft.Machine.
func (s *survivor) Snapshot() (io.WriterTo, error) {
	if td := s.View().TrustDomain; td != s.cfg.TrustDomain {
		s.failed = fault.New("controlplane.Recover", fault.Conflict, "the book is of the trust domain %q, the file says %q", td, s.cfg.TrustDomain)
	} else {
		s.failed = begin(s.Book, s.cfg.Name, book.ByRecover, s.above)
	}
	if s.failed != nil {
		return nil, s.failed
	}
	return s.Book.Snapshot()
}

// Recover makes the stopped node of a file the only member of its cluster, with all that it holds itself. The book begins another epoch, with a
// number above the one given.
func Recover(cfg *configs.Control, above uint64) (Inventory, error) {
	const op = "controlplane.Recover"
	if _, err := os.Stat(filepath.Join(cfg.Dir, "raft", "log")); err != nil {
		return Inventory{}, fault.Because(err, op, fault.NotFound, "%s holds no log of a node: there is nothing to recover", cfg.Dir)
	}
	stored := book.NewBook()
	one := &survivor{Book: stored, cfg: cfg, above: max(above, authority.MetBefore(cfg))}
	if err := offline(cfg, one).Recover(); err != nil {
		if one.failed != nil {
			err = one.failed
		}
		return Inventory{}, err
	}
	return Take(stored), nil
}
