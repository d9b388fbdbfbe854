// SPDX-License-Identifier: Apache-2.0

package channel_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"runtime"
	"testing"

	"google.golang.org/protobuf/proto"

	boundaryv1 "github.com/demarc-dev/demarc/api/boundary/v1"
	"github.com/demarc-dev/demarc/api/channel"
	"github.com/demarc-dev/demarc/fault"
)

func hello(build string) *boundaryv1.Up {
	return &boundaryv1.Up{Body: &boundaryv1.Up_Hello{Hello: &boundaryv1.Hello{Build: build, OrdersDone: 7}}}
}

func TestFramesComeBackAsTheyWereSent(t *testing.T) {
	var wire bytes.Buffer
	var sent []*boundaryv1.Up
	for _, n := range []int{0, 1, 50, 60, 64, 4095, 4096, 4097, 100_000, 1 << 20} {
		m := hello(string(bytes.Repeat([]byte("x"), n)))
		sent = append(sent, m)
		if err := channel.Write(&wire, m, channel.MaxUp); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range sent {
		var got boundaryv1.Up
		if err := channel.Read(&wire, &got, channel.MaxUp); err != nil || !proto.Equal(&got, want) {
			t.Fatalf("%d bytes: %v", len(want.GetHello().GetBuild()), err)
		}
	}
	if err := channel.Read(&wire, &boundaryv1.Up{}, channel.MaxUp); !errors.Is(err, io.EOF) {
		t.Fatalf("after the last frame: %v, want io.EOF", err)
	}
}

func TestALengthIsAClaim(t *testing.T) {
	// A stranger claims 8 MiB and sends 3 bytes: the room that it takes follows the bytes, not the claim.
	wire := append(binary.BigEndian.AppendUint32(nil, channel.MaxUp), 1, 2, 3)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	err := channel.Read(bytes.NewReader(wire), &boundaryv1.Up{}, channel.MaxUp)
	runtime.ReadMemStats(&after)
	if !errors.Is(err, fault.Unavailable) {
		t.Fatalf("a frame that is cut off: %v", err)
	}
	if grew := after.TotalAlloc - before.TotalAlloc; grew > 256<<10 {
		t.Fatalf("%d bytes were taken for 3 that came", grew)
	}
	for _, size := range []uint32{channel.MaxHello + 1, channel.MaxUp, 1<<32 - 1} {
		wire := binary.BigEndian.AppendUint32(nil, size)
		if err := channel.Read(bytes.NewReader(wire), &boundaryv1.Up{}, channel.MaxHello); !errors.Is(err, fault.Invalid) {
			t.Fatalf("a hello of %d bytes: %v", size, err)
		}
	}
	if err := channel.Write(io.Discard, hello(string(make([]byte, channel.MaxHello))), channel.MaxHello); !errors.Is(err, fault.Invalid) {
		t.Fatalf("a hello that is too long is sent: %v", err)
	}
}

// FuzzRead: no bytes make Read panic, and what it takes it can send again.
func FuzzRead(f *testing.F) {
	b, _ := channel.Append(nil, hello("demarc"), channel.MaxUp)
	f.Add(b)
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		var m boundaryv1.Up
		if channel.Read(bytes.NewReader(b), &m, channel.MaxHello) != nil {
			return
		}
		var wire bytes.Buffer
		if err := channel.Write(&wire, &m, channel.MaxUp); err != nil {
			t.Fatal(err)
		}
		var again boundaryv1.Up
		if err := channel.Read(&wire, &again, channel.MaxUp); err != nil || !proto.Equal(&m, &again) {
			t.Fatalf("%v: %v and %v", err, &m, &again)
		}
	})
}
