// SPDX-License-Identifier: Apache-2.0

package wal

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"slices"

	"github.com/demarc-dev/demarc/fault"
)

// votes is the file of what is small and replaced: the votes, and where the log begins and was cut. It is made once, of
// full size, so that a vote needs no space on a full disk. A generation is one sector, written twice, in one of two
// pairs that take turns:
//
//	"dmvotes2" | length, 4 bytes | CRC-32C, 4 bytes | generation, first, newest, cut from, cut through: 8 bytes each |
//	for each value: length of name, 1 byte | name | length, 2 bytes | value
//
// A write that was cut off leaves the pair before it whole, and each copy as it was or as it should be. So a copy that
// can't be read was altered. It is written anew from its twin; if both can't be read, what they said is lost.
type votes struct {
	f        File
	gen      uint64
	state    ground
	fresh    bool // there was none
	repaired bool
}

// ground is the content of a generation.
type ground struct {
	first      uint64 // entries before it are deleted
	newest     uint64 // number of the newest segment that an answered append is in, 0: none
	cutFrom    uint64 // entries from here on are deleted, 0: none,
	cutThrough uint64 // in segments of these numbers at most
	values     map[string][]byte
}

const (
	votesName  = "votes"
	votesMagic = "dmvotes2"
	votesHead  = 16
	slotEvery  = 4096
	votesSize  = 4 * slotEvery
	maxValues  = sector - votesHead - 40
)

// uncut is g without the record of a cut, which is complete.
func (g ground) uncut() ground {
	g.cutFrom, g.cutThrough = 0, 0
	return g
}

func (g ground) encode(gen uint64) ([]byte, error) {
	b := make([]byte, votesHead, sector)
	copy(b, votesMagic)
	for _, n := range []uint64{gen, g.first, g.newest, g.cutFrom, g.cutThrough} {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	for _, k := range slices.Sorted(maps.Keys(g.values)) {
		if len(k) > 255 || len(g.values[k]) > 65535 {
			return nil, fault.New("wal.Set", fault.Invalid, "the value of %.32q is too long to be stored", k)
		}
		b = append(append(b, byte(len(k))), k...)
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(g.values[k]))), g.values[k]...)
	}
	if len(b) > sector {
		return nil, fault.New("wal.Set", fault.Invalid,
			"the votes and the names in them take %d bytes, the limit is %d: give the members shorter names and addresses",
			len(b)-votesHead-40, maxValues)
	}
	binary.BigEndian.PutUint32(b[8:], uint32(len(b)-votesHead))
	binary.BigEndian.PutUint32(b[12:], crc32.Checksum(b[votesHead:], castagnoli))
	return append(b, make([]byte, sector-len(b))...), nil
}

func decodeVotes(b []byte) (gen uint64, g ground, ok bool) {
	n := binary.BigEndian.Uint32(b[8:])
	if string(b[:8]) != votesMagic || n < 40 || n > sector-votesHead || !allZero(b[votesHead+n:]) {
		return 0, g, false
	}
	b = b[:votesHead+n]
	if crc32.Checksum(b[votesHead:], castagnoli) != binary.BigEndian.Uint32(b[12:]) {
		return 0, g, false
	}
	b = b[votesHead:]
	for _, to := range []*uint64{&gen, &g.first, &g.newest, &g.cutFrom, &g.cutThrough} {
		*to, b = binary.BigEndian.Uint64(b), b[8:]
	}
	g.values = map[string][]byte{}
	for len(b) > 0 {
		k := int(b[0])
		if len(b) < 1+k+2 {
			return 0, g, false
		}
		v := int(binary.BigEndian.Uint16(b[1+k:]))
		if len(b) < 1+k+2+v {
			return 0, g, false
		}
		g.values[string(b[1:1+k])], b = slices.Clone(b[3+k:3+k+v]), b[3+k+v:]
	}
	return gen, g, gen > 0
}

// openVotes reads the file, or makes it if there is none.
func openVotes(fs Files) (*votes, error) {
	f, err := fs.Open(votesName)
	if errors.Is(err, os.ErrNotExist) {
		return makeVotes(fs)
	}
	if err != nil {
		return nil, err
	}
	v := &votes{f: f}
	if err := v.read(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return v, nil
}

func makeVotes(fs Files) (*votes, error) {
	f, err := fs.Create(votesName)
	if err != nil {
		return nil, err
	}
	v := &votes{f: f, state: ground{first: 1, values: map[string][]byte{}}}
	if err = fs.SyncDir(); err == nil {
		err = v.begin()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close(), fs.Remove(votesName))
	}
	return v, nil
}

func (v *votes) read() error {
	b := make([]byte, votesSize)
	n, err := v.f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	v.state = ground{first: 1, values: map[string][]byte{}}
	for pair := range 2 {
		bad := 0
		for copy := range 2 {
			at := (2*pair + copy) * slotEvery
			slot := b[at : at+sector]
			gen, g, ok := decodeVotes(slot)
			switch {
			case ok && gen%2 != uint64(pair):
				return damaged(votesName, "generation %d is in the other one's place", gen)
			case ok && gen > v.gen:
				v.gen, v.state = gen, g
			case !ok && !allZero(slot):
				bad++
			}
		}
		if bad == 2 {
			return damaged(votesName, "neither copy of a generation can be read, so what this node voted is not known: "+
				"remove its directory and let it join again from its peers")
		}
		v.repaired = v.repaired || bad == 1
	}
	if n == votesSize && v.gen > 0 && !v.repaired {
		return v.f.Sync() // see open
	}
	if n < votesSize && v.gen > 1 {
		return damaged(votesName, "it has %d bytes and should have %d", n, votesSize)
	}
	if v.gen == 0 || n < votesSize { // its making was cut off: generation 1 says nothing yet
		return v.begin()
	}
	// Both pairs are written anew: a copy that stays unreadable would not be told from a second one.
	if err := v.write(v.state); err != nil {
		return err
	}
	return v.write(v.state)
}

// begin writes the first generation of a directory that holds nothing.
func (v *votes) begin() error {
	v.fresh, v.repaired = true, false
	if _, err := v.f.WriteAt(zeros[:votesSize], 0); err != nil {
		return err
	}
	return v.write(v.state)
}

// write puts the next generation on disk.
func (v *votes) write(g ground) error {
	b, err := g.encode(v.gen + 1)
	if err != nil {
		return err
	}
	at := int64((v.gen+1)%2) * 2 * slotEvery
	twice := make([]byte, slotEvery+sector)
	copy(twice, b)
	copy(twice[slotEvery:], b)
	if _, err := v.f.WriteAt(twice, at); err != nil {
		return err
	}
	if err := v.f.Sync(); err != nil {
		return err
	}
	v.gen, v.state = v.gen+1, g
	return nil
}
