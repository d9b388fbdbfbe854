// SPDX-License-Identifier: Apache-2.0

// Package telemetry is OTLP in from the application, the customer's filter, out to the vendor; Prometheus on every role.
//
// For now it is the second half only: metrics, health and the logger of each role. OTLP, the filter and the spool are
// not here yet, so nothing of the application's passes through this package.
//
// The promise: what a role says about itself is true and bounded. A label takes its values from a set that is written
// in the code, so no stranger can make a time series. A check that does not answer counts as failed, and is never
// started a second time while the first still runs. A mistake of a programmer (a name without demarc_, a name twice)
// panics when it is registered, which is at the start of the process; afterwards nothing here panics, whatever is
// counted, read or asked.
//
// # Over HTTP
//
// GET /metrics is the Prometheus text format, or OpenMetrics where the caller asks for it. GET /healthz and GET /readyz
// answer 200 and "ok", or 503 and one line "<name>: <sentence>" for each check that failed, in the order in which the
// checks were registered. The sentence is [fault.Text]: the cause of an error stays in the process. There is no caller
// to know here: the handler belongs on a listener that only the operator's own monitoring reaches.
package telemetry

import (
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	scrapeTimeout = 10 * time.Second // for all reads of one scrape together
	scrapes       = 8                // at once; the next is told 503
)

// NewLogger writes records at or above the level to w, one a line: as JSON where format is "json", else as text.
// Whoever takes the format from an operator refuses other words before this. Of lines with the same message, 10 are
// written a minute, and fewer the longer that lasts; the next one tells in "repeated" how many were not.
func NewLogger(w io.Writer, level slog.Level, format string) *slog.Logger {
	opts := &slog.HandlerOptions{Level: level}
	if format == "json" {
		return slog.New(limit(slog.NewJSONHandler(w, opts)))
	}
	return slog.New(limit(slog.NewTextHandler(w, opts)))
}

// Registry holds the metrics and the checks of one process. Its methods may be called concurrently.
type Registry struct {
	own *prometheus.Registry

	mu    sync.Mutex
	names map[string]int  // families under demarc_, and how many collectors describe each
	taken map[string]bool // names of families and samples that the methods here registered
	ready []*check
	alive []*check
}

// New makes a registry with demarc_build_info{role,build} and the metrics of the Go runtime and of the process.
func New(role, build string) *Registry {
	r := &Registry{own: prometheus.NewRegistry(), names: map[string]int{}, taken: map[string]bool{}}
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "demarc_build_info",
		Help:        "Always 1; the labels name the role and the build of this process.",
		ConstLabels: prometheus.Labels{"role": utf8(role), "build": utf8(build)},
	})
	info.Set(1)
	r.mustClaim("demarc_build_info")
	r.own.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

func utf8(s string) string { return strings.ToValidUTF8(s, "?") }

// Registerer is for engines that make their own collectors and must not import this package. The rules of Prometheus
// hold there, not the closed sets of the methods here: an engine keeps its labels closed itself.
func (r *Registry) Registerer() prometheus.Registerer { return registerer{r} }

// Names lists every metric family under demarc_, sorted, whether or not it has a sample yet.
func (r *Registry) Names() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]string, 0, len(r.names))
	for n := range r.names {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// Handler serves /metrics, /healthz and /readyz. Checks and metrics that are registered later are served too.
func (r *Registry) Handler() http.Handler {
	metrics := promhttp.HandlerFor(r.own, promhttp.HandlerOpts{
		Registry:            r.own,
		ErrorHandling:       promhttp.ContinueOnError, // one bad collector does not hide the others; it is counted
		EnableOpenMetrics:   true,
		MaxRequestsInFlight: scrapes,
		Timeout:             scrapeTimeout,
	})
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Cache-Control", "no-store")
		var h http.Handler
		switch req.URL.Path {
		case "/metrics":
			h = metrics
		case "/healthz":
			h = r.health(func() []*check { return r.alive })
		case "/readyz":
			h = r.health(func() []*check { return r.ready })
		default:
			http.NotFound(w, req)
			return
		}
		if req.Method != http.MethodGet {
			w.Header().Set("Allow", http.MethodGet)
			http.Error(w, "only GET is served here", http.StatusMethodNotAllowed)
			return
		}
		h.ServeHTTP(w, req)
	})
}
