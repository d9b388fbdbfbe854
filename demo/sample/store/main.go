// SPDX-License-Identifier: Apache-2.0

// Command store is the second service of the sample application: it keeps notes in memory, for whoever has the token.
//
//	STORE_LISTEN      host:port to listen on
//	STORE_TOKEN_FILE  file that holds the token
//
// "store state --section summary|notes" asks the running store and prints what it says.
package main

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	maxNote  = 4 << 10
	maxNotes = 1000
)

type store struct {
	token string
	start time.Time

	mu    sync.Mutex
	notes []string
}

func readToken() (string, error) {
	b, err := os.ReadFile(os.Getenv("STORE_TOKEN_FILE"))
	if err != nil {
		return "", fmt.Errorf("the token can't be read: %w", err)
	}
	t := strings.TrimSpace(string(b))
	if t == "" {
		return "", errors.New("the token is empty")
	}
	return t, nil
}

func (s *store) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /notes", s.allow(func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		_ = json.NewEncoder(w).Encode(s.notes)
	}))
	mux.HandleFunc("POST /notes", s.allow(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxNote))
		if err != nil || len(b) == 0 {
			http.Error(w, fmt.Sprintf("a note has 1 to %d bytes", maxNote), http.StatusBadRequest)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.notes) >= maxNotes {
			http.Error(w, "the store is full", http.StatusInsufficientStorage)
			return
		}
		s.notes = append(s.notes, string(b))
		w.WriteHeader(http.StatusCreated)
	}))
	mux.HandleFunc("GET /state", s.allow(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		out := map[string]any{"service": "store", "notes": len(s.notes), "up_seconds": int(time.Since(s.start).Seconds())}
		if r.URL.Query().Get("section") == "notes" {
			out["list"] = slices.Clone(s.notes)
		}
		_ = json.NewEncoder(w).Encode(out)
	}))
	return mux
}

func (s *store) allow(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if subtle.ConstantTimeCompare([]byte(r.Header.Get("X-Store-Token")), []byte(s.token)) != 1 {
			http.Error(w, "wrong token", http.StatusForbidden)
			return
		}
		next(w, r)
	}
}

// state asks the running store.
func state(args []string, out io.Writer) error {
	f := flag.NewFlagSet("state", flag.ContinueOnError)
	section := f.String("section", "summary", "summary or notes")
	if err := f.Parse(args); err != nil {
		return err
	}
	token, err := readToken()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+os.Getenv("STORE_LISTEN")+"/state?section="+*section, nil)
	if err != nil {
		return err
	}
	req.Header.Set("X-Store-Token", token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the store answers %s", res.Status)
	}
	_, err = io.Copy(out, io.LimitReader(res.Body, 1<<20))
	return err
}

func serve(ctx context.Context) error {
	token, err := readToken()
	if err != nil {
		return err
	}
	s := &store{token: token, start: time.Now()}
	srv := &http.Server{Addr: os.Getenv("STORE_LISTEN"), Handler: s.handler(), ReadHeaderTimeout: 5 * time.Second}
	go func() {
		<-ctx.Done()
		_ = srv.Close()
	}()
	fmt.Println("store listens on", srv.Addr)
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if len(os.Args) > 1 && os.Args[1] == "state" {
		err = state(os.Args[2:], os.Stdout)
	} else {
		err = serve(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "store:", err)
		os.Exit(1)
	}
}
