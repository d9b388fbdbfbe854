// SPDX-License-Identifier: Apache-2.0

// Package channel is the frame around the messages of a channel: what is on the wire once TLS has agreed on [Proto].
//
// A frame is a length of 4 bytes, big-endian, and that many bytes of one protobuf message: Up from the appliance, Down
// from the control plane (boundary.proto). There is nothing else: no header, no compression, no stream number. A frame
// of length 0 is a message without fields, and is refused by whoever expects a body.
package channel

import (
	"encoding/binary"
	"errors"
	"io"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/demarc-dev/demarc/fault"
)

// Proto is the name of the protocol in ALPN.
const Proto = "demarc-channel/1"

// Limits of a frame, in bytes, without its length.
const (
	MaxHello = 4 << 10 // the first message of an appliance
	MaxUp    = 8 << 20 // any later one: output that was released travels in reports
	MaxDown  = 8 << 20 // a release document travels in an order
)

// Limits of what one report or order may carry, in bytes and in numbers. Each side checks what comes from the other one, and
// sends nothing that is larger: a report that is refused would hold back all that follow it.
const (
	MaxSentence  = 1 << 10 // a reason
	MaxName      = 128     // a name, an id, a digest
	MaxStatement = 1 << 20 // a signed document
	MaxOutput    = 4 << 20 // an operation's output, encrypted
	MaxServices  = 256
	MaxSecrets   = 256
	MaxTroubles  = 32
	MaxNote      = 4 << 10 // a checkpoint
	MaxProof     = 64      // hashes of a proof, of 32 bytes each
)

// Timing that both sides share.
const (
	// Answer is how long a side that said what the other acknowledges (an order, a report) waits to hear anything at all.
	// A path that went dead is found by that, however rare the beats are.
	Answer = time.Minute
	// KnownQuiet is how long a road may be silent of which nothing is known: many proxies drop what is silent for 60 s.
	KnownQuiet = 50 * time.Second
	// MaxQuiet is the most that a side holds to be bearable where the kernels watch the whole path. Builds before said, and
	// took, 15 minutes at most: either side keeps to the lesser of the two.
	MaxQuiet = time.Hour
)

// Patience is the silence that ends a channel: three beats that are missed, or one that is a minute late.
func Patience(beat time.Duration) time.Duration { return min(3*beat, beat+time.Minute) }

const prefix = 4 // bytes of the length

// first is how much room a frame gets before its bytes have come. A length is a claim: memory follows what was received.
const first = 4 << 10

// Read takes one frame of at most limit bytes into m. It gives io.EOF where the stream ends between two frames, the
// error of r where r fails, and fault.Invalid where the frame is too long or is no such message. What follows on r after
// fault.Invalid has no meaning: close it.
func Read(r io.Reader, m proto.Message, limit int) error {
	const op = "channel.Read"
	// One buffer for length and body: a small frame costs one allocation.
	buf := make([]byte, prefix, 64)
	if n, err := io.ReadFull(r, buf); err != nil {
		if n == 0 && errors.Is(err, io.EOF) {
			return io.EOF
		}
		return fault.Because(err, op, fault.Unavailable, "the channel ended within a frame")
	}
	size := binary.BigEndian.Uint32(buf)
	if uint64(size) > uint64(limit) {
		return fault.New(op, fault.Invalid, "a frame of %d bytes, and %d is the most that is taken here", size, limit)
	}
	body, err := fill(r, buf[:0], int(size))
	if err != nil {
		return fault.Because(err, op, fault.Unavailable, "the channel ended within a frame")
	}
	if err := proto.Unmarshal(body, m); err != nil {
		return fault.Because(err, op, fault.Invalid, "a frame of %d bytes that is not the message it should be", size)
	}
	return nil
}

// fill reads size bytes; the buffer doubles as they come.
func fill(r io.Reader, buf []byte, size int) ([]byte, error) {
	if size <= cap(buf) {
		buf = buf[:size]
		_, err := io.ReadFull(r, buf)
		return buf, err
	}
	buf = make([]byte, min(size, first))
	for at := 0; ; {
		n, err := io.ReadFull(r, buf[at:])
		if err != nil {
			return nil, err
		}
		if at += n; at == size {
			return buf, nil
		}
		more := make([]byte, min(size, 2*len(buf)))
		copy(more, buf)
		buf = more
	}
}

// Append adds the frame of m to b. A message longer than limit is fault.Invalid: the other side would refuse it.
func Append(b []byte, m proto.Message, limit int) ([]byte, error) {
	const op = "channel.Append"
	at := len(b)
	out, err := proto.MarshalOptions{}.MarshalAppend(append(b, 0, 0, 0, 0), m)
	if err != nil {
		return b, fault.At(op, fault.Internal, err)
	}
	size := len(out) - at - prefix
	if size > limit {
		return b, fault.New(op, fault.Invalid, "a message of %d bytes, and %d is the most that a channel carries", size, limit)
	}
	binary.BigEndian.PutUint32(out[at:], uint32(size))
	return out, nil
}

// Write sends one message as one write.
func Write(w io.Writer, m proto.Message, limit int) error {
	b, err := Append(nil, m, limit)
	if err != nil {
		return err
	}
	if _, err := w.Write(b); err != nil {
		return fault.Because(err, "channel.Write", fault.Unavailable, "the channel does not take what is written")
	}
	return nil
}
