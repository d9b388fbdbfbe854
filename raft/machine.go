// SPDX-License-Identifier: Apache-2.0

package raft

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	hraft "github.com/hashicorp/raft"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/raft/forward"
)

// Bounds of a pack. One proposal may be larger than packBytes, and then is alone.
const (
	packVersion = 0x01
	packCount   = 256
	packBytes   = 512 << 10
	// MaxProposal bounds one proposal in bytes.
	MaxProposal = forward.MaxPayload
)

// encodePack spells proposals as one entry.
func encodePack(proposals [][]byte) []byte {
	size := 1
	for _, p := range proposals {
		size += 4 + len(p)
	}
	b := append(make([]byte, 0, size), packVersion)
	for _, p := range proposals {
		b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
		b = append(b, p...)
	}
	return b
}

// decodePack is the inverse. The proposals share the bytes of the entry.
func decodePack(b []byte) ([][]byte, error) {
	bad := fault.New("raft.decodePack", fault.Internal, "an entry is not a pack of this version")
	if len(b) < 1 || b[0] != packVersion {
		return nil, bad
	}
	var out [][]byte
	for b = b[1:]; len(b) > 0; {
		if len(b) < 4 || uint64(len(b)-4) < uint64(binary.BigEndian.Uint32(b)) {
			return nil, bad
		}
		n := binary.BigEndian.Uint32(b)
		out, b = append(out, b[4:4+n:4+n]), b[4+n:]
	}
	return out, nil
}

// machine makes an hraft.FSM of a Machine.
type machine struct {
	m     Machine
	index atomic.Uint64 // of the last command that was applied

	onDisk       func(index uint64) bool // waits until the log of this node is on disk so far; false: the node ends before
	configured   chan struct{}           // holds a token while there may be a new configuration
	configuredAt func(index uint64)      // takes the index of each new configuration

	mu       sync.Mutex
	advanced chan struct{} // closed when index grows
	err      error
	failed   chan struct{} // closed when err is set
}

func newMachine(m Machine) *machine {
	return &machine{m: m, advanced: make(chan struct{}), failed: make(chan struct{}), configured: make(chan struct{}, 1),
		configuredAt: func(uint64) {}, onDisk: func(uint64) bool { return true }}
}

func (f *machine) failure() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// Apply implements hraft.FSM. It returns []result, one a proposal, or one for all. After an error nothing more is applied:
// the entries after it would be applied to a state that differs from the others'. An entry that is not applied here is
// in the log all the same, and others may apply it: its proposers are unsure.
func (f *machine) Apply(l *hraft.Log) any {
	const op = "raft.Apply"
	unsure := func(err error) result {
		return result{err: fault.Because(err, op, fault.Unsure, "this is in the log, and this node can't apply it: ask another one")}
	}
	if f.onDisk(l.Index); f.failure() != nil {
		return []result{unsure(f.failure())}
	}
	pack, err := decodePack(l.Data)
	out := make([]result, 0, max(1, len(pack)))
	for _, data := range pack {
		if err != nil {
			out = append(out, unsure(err))
			continue
		}
		var ans []byte
		if ans, err = f.m.Apply(l.Index, data); err != nil {
			out = append(out, unsure(err))
			continue
		}
		out = append(out, result{ans: ans})
	}
	if err != nil {
		f.fail(fault.Because(err, op, fault.Internal,
			"entry %d can't be applied: this node must be replaced by a build that can", l.Index))
		if len(out) == 0 {
			out = append(out, unsure(err))
		}
		return out
	}
	f.advance(l.Index)
	return out
}

// StoreConfiguration implements hraft.ConfigurationStore: it is called with each change of the members that is committed.
func (f *machine) StoreConfiguration(index uint64, _ hraft.Configuration) {
	f.configuredAt(index)
	wake(f.configured)
}

// fail stops the machine for ever.
func (f *machine) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
		close(f.failed)
	}
}

func (f *machine) advance(index uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.index.Store(index)
	close(f.advanced)
	f.advanced = make(chan struct{})
}

// changed returns a channel that is closed at the next entry.
func (f *machine) changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.advanced
}

const snapshotWord = "demarc-raft/1"

// Snapshot implements hraft.FSM.
func (f *machine) Snapshot() (hraft.FSMSnapshot, error) {
	if err := f.failure(); err != nil {
		return nil, err
	}
	w, err := f.m.Snapshot()
	if err != nil {
		return nil, fault.At("raft.Snapshot", "", err)
	}
	return &snapshot{w, f.index.Load()}, nil
}

type snapshot struct {
	w     io.WriterTo
	index uint64
}

// Persist implements hraft.FSMSnapshot.
func (s *snapshot) Persist(sink hraft.SnapshotSink) error {
	_, err := fmt.Fprintf(sink, "%s %d\n", snapshotWord, s.index)
	if err == nil {
		_, err = s.w.WriteTo(sink)
	}
	if err != nil {
		_ = sink.Cancel()
		return fault.At("raft.Snapshot", "", err)
	}
	return sink.Close()
}

// Release implements hraft.FSMSnapshot.
func (*snapshot) Release() {}

// Restore implements hraft.FSM. A snapshot that can't be restored stops the node: the library would fall back to an older
// one, or be sent the same again, for ever.
func (f *machine) Restore(r io.ReadCloser) error {
	defer r.Close()
	if err := f.failure(); err != nil {
		return err
	}
	index, err := f.restore(bufio.NewReaderSize(r, 64<<10))
	if err != nil {
		err = fault.Because(err, "raft.Restore", fault.Internal,
			"the snapshot can't be restored: this node must be replaced by a build that can")
		f.fail(err)
		return err
	}
	f.advance(index)
	wake(f.configured) // the snapshot has members too
	return nil
}

func (f *machine) restore(in *bufio.Reader) (uint64, error) {
	const op = "raft.Restore"
	line, err := in.ReadSlice('\n')
	if err != nil {
		return 0, fault.Because(err, op, fault.Invalid, "the snapshot has no first line")
	}
	word, number, _ := strings.Cut(strings.TrimSuffix(string(line), "\n"), " ")
	index, err := strconv.ParseUint(number, 10, 64)
	if word != snapshotWord || err != nil {
		return 0, fault.New(op, fault.Invalid, "the snapshot is not of the format %s", snapshotWord)
	}
	return index, f.m.Restore(in)
}
