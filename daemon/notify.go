// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"log/slog"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/demarc-dev/demarc/fault"
)

// Notify is the part that tells the service manager how the daemon is, in the words of sd_notify(3): READY=1 once the parts
// before it are ready, STOPPING=1 before they stop, and WATCHDOG=1 at half of the time that the manager waits for it, while
// healthy gives nil and within that time. A daemon that says nothing is restarted by the manager. Put it last.
//
// It does nothing where nobody listens: NOTIFY_SOCKET is not set, or the watchdog is meant for another process.
type Notify struct {
	healthy  func(context.Context) error
	log      *slog.Logger
	socket   string
	watchdog time.Duration // 0: nobody waits for beats
	bad      error         // what the environment says can't be
}

// NewNotify reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID. It takes them out of the environment: what the daemon starts
// must not speak in its place. Of a value that can't be right Run tells, with fault.Invalid.
func NewNotify(healthy func(context.Context) error, log *slog.Logger) Notify {
	const op = "daemon.NewNotify"
	n := Notify{healthy: healthy, log: log, socket: os.Getenv("NOTIFY_SOCKET")}
	usec, pid := os.Getenv("WATCHDOG_USEC"), os.Getenv("WATCHDOG_PID")
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		_ = os.Unsetenv(name)
	}
	if n.socket == "" {
		return n
	}
	if n.socket[0] != '/' && n.socket[0] != '@' {
		n.bad = fault.New(op, fault.Invalid, "NOTIFY_SOCKET is %.100q: only the path of a socket, or @ and an abstract name, are known", n.socket)
		return n
	}
	if usec == "" || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return n
	}
	us, err := strconv.ParseInt(usec, 10, 64)
	if err != nil || us <= 0 || us > int64(24*time.Hour/time.Microsecond) {
		n.bad = fault.New(op, fault.Invalid, "WATCHDOG_USEC is %.40q: want microseconds, up to a day", usec)
		return n
	}
	n.watchdog = time.Duration(us) * time.Microsecond
	return n
}

// Name implements [Part].
func (Notify) Name() string { return "notify" }

// Run implements [Part]. A manager that does not take a word is told of in the log, and does not stop the daemon.
func (n Notify) Run(ctx context.Context, ready func()) error {
	if n.bad != nil {
		return n.bad
	}
	n.say("READY=1")
	ready()
	if n.watchdog > 0 && n.socket != "" {
		n.beat(ctx)
	}
	<-ctx.Done()
	n.say("STOPPING=1")
	return nil
}

// beat says that the daemon lives, as long as that is so.
func (n Notify) beat(ctx context.Context) {
	tick := time.NewTicker(n.watchdog / 2)
	defer tick.Stop()
	for {
		ask, cancel := context.WithTimeout(ctx, n.watchdog/2)
		err := n.healthy(ask)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			n.log.Error("the service manager is not told that this daemon lives, and will restart it", "err", err)
		default:
			n.say("WATCHDOG=1")
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (n Notify) say(word string) {
	if n.socket == "" {
		return
	}
	// A name that begins with @ is abstract: package net writes it with a zero byte in front, as the manager means it.
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.socket, Net: "unixgram"})
	if err == nil {
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		_, err = c.Write([]byte(word))
		_ = c.Close()
	}
	if err != nil {
		n.log.Warn("the service manager was not told", "word", word, "err", err)
	}
}
