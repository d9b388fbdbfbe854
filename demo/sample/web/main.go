// SPDX-License-Identifier: Apache-2.0

// Command web is the first service of the sample application: what end users see.
//
//	WEB_LISTEN        host:port to listen on
//	STORE_ADDR        host:port of the store
//	STORE_TOKEN_FILE  file that holds the store's token
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// Version is set when the sample is built: -ldflags "-X main.Version=1.1.0".
var Version = "1.0.0"

var page = template.Must(template.New("page").Parse(
	`<!doctype html><title>notes</title><h1>notes {{.Version}}</h1><p>{{len .Notes}} notes</p><ul>{{range .Notes}}<li>{{.}}{{end}}</ul>
`))

type web struct {
	store, token string
	client       *http.Client
}

func (s *web) ask(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+s.store+path, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Store-Token", s.token)
	return s.client.Do(req)
}

func (s *web) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		res, err := s.ask(r.Context(), http.MethodGet, "/healthz", nil)
		if err != nil {
			http.Error(w, "the store does not answer", http.StatusServiceUnavailable)
			return
		}
		res.Body.Close()
		w.WriteHeader(res.StatusCode)
	})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		var notes []string
		res, err := s.ask(r.Context(), http.MethodGet, "/notes", nil)
		if err == nil {
			defer res.Body.Close()
			err = json.NewDecoder(io.LimitReader(res.Body, 8<<20)).Decode(&notes)
		}
		if err != nil {
			http.Error(w, "the store does not answer", http.StatusBadGateway)
			return
		}
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_ = page.Execute(w, map[string]any{"Version": Version, "Notes": notes})
	})
	mux.HandleFunc("POST /notes", func(w http.ResponseWriter, r *http.Request) {
		res, err := s.ask(r.Context(), http.MethodPost, "/notes", http.MaxBytesReader(w, r.Body, 8<<10))
		if err != nil {
			http.Error(w, "the store does not answer", http.StatusBadGateway)
			return
		}
		defer res.Body.Close()
		w.WriteHeader(res.StatusCode)
		_, _ = io.Copy(w, io.LimitReader(res.Body, 4<<10))
	})
	// A long-lived connection: one line every 100 ms, until the reader leaves.
	mux.HandleFunc("GET /stream", func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for i := 1; ; i++ {
			if _, err := fmt.Fprintf(w, "%d\n", i); err != nil || rc.Flush() != nil {
				return
			}
			select {
			case <-r.Context().Done():
				return
			case <-tick.C:
			}
		}
	})
	mux.HandleFunc("GET /whoami", func(w http.ResponseWriter, r *http.Request) {
		for _, h := range []string{"Tailscale-User-Login", "X-Demarc-Node", "X-Demarc-Door"} {
			fmt.Fprintf(w, "%s: %s\n", h, r.Header.Get(h))
		}
	})
	return mux
}

func serve(ctx context.Context) error {
	token, err := os.ReadFile(os.Getenv("STORE_TOKEN_FILE"))
	if err != nil {
		return fmt.Errorf("the token can't be read: %w", err)
	}
	s := &web{store: os.Getenv("STORE_ADDR"), token: strings.TrimSpace(string(token)), client: &http.Client{Timeout: 5 * time.Second}}
	srv := &http.Server{Addr: os.Getenv("WEB_LISTEN"), Handler: s.handler(), ReadHeaderTimeout: 5 * time.Second}
	go func() {
		<-ctx.Done()
		_ = srv.Close()
	}()
	fmt.Println("web", Version, "listens on", srv.Addr)
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := serve(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "web:", err)
		os.Exit(1)
	}
}
