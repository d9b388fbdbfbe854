// SPDX-License-Identifier: Apache-2.0

package telemetry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"math"
	"mime"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.uber.org/goleak"

	"github.com/demarc-dev/demarc/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func ask(r *telemetry.Registry, method, path string, header ...string) *httptest.ResponseRecorder {
	req := httptest.NewRequestWithContext(context.Background(), method, path, nil)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	r.Handler().ServeHTTP(w, req)
	return w
}

// scrape reads /metrics as Prometheus does.
func scrape(t *testing.T, r *telemetry.Registry) map[string]*dto.MetricFamily {
	t.Helper()
	w := ask(r, http.MethodGet, "/metrics")
	if w.Code != http.StatusOK {
		t.Fatalf("/metrics: %d %s", w.Code, w.Body)
	}
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(w.Body)
	if err != nil {
		t.Fatalf("/metrics does not parse: %v", err)
	}
	return families
}

// samples gives the values of a family by the value of a label.
func samples(f *dto.MetricFamily, label string) map[string]float64 {
	out := map[string]float64{}
	for _, m := range f.GetMetric() {
		key := ""
		for _, l := range m.GetLabel() {
			if l.GetName() == label {
				key = l.GetValue()
			}
		}
		switch f.GetType() {
		case dto.MetricType_COUNTER:
			out[key] = m.GetCounter().GetValue()
		case dto.MetricType_GAUGE:
			out[key] = m.GetGauge().GetValue()
		case dto.MetricType_HISTOGRAM:
			out[key] = float64(m.GetHistogram().GetSampleCount())
		}
	}
	return out
}

func TestExposition(t *testing.T) {
	r := telemetry.New("appliance", "v1.2.3-\xff")
	depth := 7.0
	r.Gauge("demarc_spool_bytes", "Bytes that wait.", func() float64 { return depth })
	postures := []string{"closed", "private"}
	r.GaugeVec("demarc_doors", "Open doors.", "posture", postures, func(v string) float64 { return float64(len(v)) })
	postures[0] = "changed by the caller"
	c := r.Counter("demarc_reconnects_total", "Channels opened again.")
	v := r.CounterVec("demarc_calls_total", "Calls by fault.", "fault", []string{"denied", "busy"})
	h := r.Histogram("demarc_apply_seconds", "Time of one apply.", []float64{0.1, 1})
	c.Inc()
	c.Add(2.5)
	v.With("denied").Inc()
	h.Observe(0.05)
	h.Observe(5)

	got := scrape(t, r)
	for _, tc := range []struct {
		name, label string
		kind        dto.MetricType
		want        map[string]float64
	}{
		{"demarc_build_info", "role", dto.MetricType_GAUGE, map[string]float64{"appliance": 1}},
		{"demarc_build_info", "build", dto.MetricType_GAUGE, map[string]float64{"v1.2.3-?": 1}},
		{"demarc_spool_bytes", "", dto.MetricType_GAUGE, map[string]float64{"": 7}},
		{"demarc_doors", "posture", dto.MetricType_GAUGE, map[string]float64{"closed": 6, "private": 7}},
		{"demarc_reconnects_total", "", dto.MetricType_COUNTER, map[string]float64{"": 3.5}},
		{"demarc_calls_total", "fault", dto.MetricType_COUNTER, map[string]float64{"denied": 1, "busy": 0, "other": 0}},
		{"demarc_apply_seconds", "", dto.MetricType_HISTOGRAM, map[string]float64{"": 2}},
	} {
		f := got[tc.name]
		if f.GetType() != tc.kind || f.GetHelp() == "" {
			t.Errorf("%s: type %v, help %q, want %v with help", tc.name, f.GetType(), f.GetHelp(), tc.kind)
		}
		if diff := cmp.Diff(tc.want, samples(f, tc.label)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
	var bounds []float64
	for _, b := range got["demarc_apply_seconds"].GetMetric()[0].GetHistogram().GetBucket() {
		bounds = append(bounds, b.GetUpperBound())
	}
	if want := []float64{0.1, 1, math.Inf(1)}; !slices.Equal(want, bounds) {
		t.Errorf("buckets = %v, want %v", bounds, want)
	}
	for _, name := range []string{"go_goroutines", "process_cpu_seconds_total"} {
		if got[name] == nil {
			t.Errorf("%s is not exposed", name)
		}
	}
	depth = 8
	if got := samples(scrape(t, r)["demarc_spool_bytes"], ""); got[""] != 8 {
		t.Errorf("the gauge was read once: %v, want 8", got)
	}
}

func TestOpenMetrics(t *testing.T) {
	w := ask(telemetry.New("appliance", "v1"), http.MethodGet, "/metrics", "Accept", "application/openmetrics-text; version=1.0.0")
	kind, params, err := mime.ParseMediaType(w.Header().Get("Content-Type"))
	if err != nil || kind != "application/openmetrics-text" || params["version"] != "1.0.0" {
		t.Errorf("Content-Type = %q", w.Header().Get("Content-Type"))
	}
	if !strings.HasSuffix(w.Body.String(), "# EOF\n") {
		t.Error("the answer does not end as OpenMetrics does")
	}
}

// TestClosedSet sends strangers' words to a label: the number of series must not move.
func TestClosedSet(t *testing.T) {
	r := telemetry.New("control-plane", "v1")
	values := []string{"get", "put"}
	v := r.CounterVec("demarc_verbs_total", "Calls.", "verb", values)
	values[0] = "changed by the caller"
	for _, s := range []string{"", "GET", "get ", "\xff", "other", "a\nb", strings.Repeat("x", 1<<16)} {
		v.With(s).Inc()
	}
	v.With("get").Inc()
	want := map[string]float64{"get": 1, "put": 0, "other": 7}
	if diff := cmp.Diff(want, samples(scrape(t, r)["demarc_verbs_total"], "verb")); diff != "" {
		t.Errorf("series (-want +got):\n%s", diff)
	}
}

func TestNothingPanicsOnTraffic(t *testing.T) {
	r := telemetry.New("control-plane", "v1")
	c := r.Counter("demarc_a_total", "A.")
	h := r.Histogram("demarc_b_seconds", "B.", []float64{1})
	r.Gauge("demarc_c", "C.", func() float64 { panic("no map") })
	r.GaugeVec("demarc_d", "D.", "x", []string{"bad", "good"}, func(v string) float64 {
		if v == "bad" {
			panic("no map")
		}
		return 3
	})
	for _, v := range []float64{-1, math.NaN(), math.Inf(1), math.Inf(-1), 0} {
		c.Add(v)
		h.Observe(v)
	}
	got := scrape(t, r)
	if a := samples(got["demarc_a_total"], "")[""]; a != 0 {
		t.Errorf("counter = %v, want 0", a)
	}
	if b := got["demarc_b_seconds"].GetMetric()[0].GetHistogram(); b.GetSampleCount() != 2 || b.GetSampleSum() != -1 {
		t.Errorf("histogram has %d observations of sum %v, want 2 of -1", b.GetSampleCount(), b.GetSampleSum())
	}
	if v := samples(got["demarc_c"], "")[""]; !math.IsNaN(v) {
		t.Errorf("gauge = %v, want NaN", v)
	}
	if d := samples(got["demarc_d"], "x"); !math.IsNaN(d["bad"]) || d["good"] != 3 {
		t.Errorf("gauges = %v, want NaN and 3", d)
	}
}

func TestMistakesPanicAtRegistration(t *testing.T) {
	read := func() float64 { return 0 }
	readOf := func(string) float64 { return 0 }
	one := []string{"a"}
	var many []string
	for i := range telemetry.MaxValues + 1 {
		many = append(many, strings.Repeat("a", i+1))
	}
	for name, tc := range map[string]struct {
		do   func(*telemetry.Registry)
		want string
	}{
		"foreign prefix":     {func(r *telemetry.Registry) { r.Gauge("app_x", "X.", read) }, `"app_x"`},
		"upper case":         {func(r *telemetry.Registry) { r.Gauge("demarc_X", "X.", read) }, "lower case"},
		"prefix alone":       {func(r *telemetry.Registry) { r.Gauge("demarc_", "X.", read) }, "not a name"},
		"counter's end":      {func(r *telemetry.Registry) { r.Counter("demarc_x", "X.") }, "_total"},
		"gauge's end":        {func(r *telemetry.Registry) { r.Gauge("demarc_x_total", "X.", read) }, "_total"},
		"no help":            {func(r *telemetry.Registry) { r.Gauge("demarc_x", " ", read) }, "no help"},
		"no read":            {func(r *telemetry.Registry) { r.Gauge("demarc_x", "X.", nil) }, "no function"},
		"no read of a value": {func(r *telemetry.Registry) { r.GaugeVec("demarc_x", "X.", "l", one, nil) }, "no function"},
		"no values":          {func(r *telemetry.Registry) { r.CounterVec("demarc_x_total", "X.", "l", nil) }, "closed set"},
		"too many values":    {func(r *telemetry.Registry) { r.CounterVec("demarc_x_total", "X.", "l", many) }, "closed set"},
		"empty value":        {func(r *telemetry.Registry) { r.CounterVec("demarc_x_total", "X.", "l", []string{""}) }, "empty"},
		"value twice":        {func(r *telemetry.Registry) { r.GaugeVec("demarc_x", "X.", "l", []string{"a", "a"}, readOf) }, "twice"},
		"label":              {func(r *telemetry.Registry) { r.GaugeVec("demarc_x", "X.", "L", one, readOf) }, "label"},
		"label le":           {func(r *telemetry.Registry) { r.CounterVec("demarc_x_total", "X.", "le", one) }, "label"},
		"no buckets":         {func(r *telemetry.Registry) { r.Histogram("demarc_x", "X.", nil) }, "buckets"},
		"buckets fall":       {func(r *telemetry.Registry) { r.Histogram("demarc_x", "X.", []float64{2, 1}) }, "ascending"},
		"bucket NaN":         {func(r *telemetry.Registry) { r.Histogram("demarc_x", "X.", []float64{math.NaN()}) }, "finite"},
		"build_info twice":   {func(r *telemetry.Registry) { r.Gauge("demarc_build_info", "X.", read) }, "already"},
		"twice": {func(r *telemetry.Registry) {
			r.Gauge("demarc_x", "X.", read)
			r.GaugeVec("demarc_x", "X.", "l", one, readOf)
		}, "already"},
		"a sample of a histogram": {func(r *telemetry.Registry) {
			r.Gauge("demarc_x_count", "X.", read)
			r.Histogram("demarc_x", "X.", []float64{1})
		}, "already"},
		"twice over the registerer": {func(r *telemetry.Registry) {
			r.Registerer().MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "demarc_x", Help: "X."}))
			r.Gauge("demarc_x", "X.", read)
		}, "already"},
		"the registerer twice": {func(r *telemetry.Registry) {
			r.Gauge("demarc_x", "X.", read)
			r.Registerer().MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "demarc_x", Help: "X."}))
		}, "duplicate"},
		"check twice": {func(r *telemetry.Registry) { r.Check("a", ok); r.Check("a", ok) }, "already"},
		"alive twice": {func(r *telemetry.Registry) { r.Alive("a", ok); r.Alive("a", ok) }, "already"},
		"check colon": {func(r *telemetry.Registry) { r.Check("a: b", ok) }, "not a name"},
		"check nil":   {func(r *telemetry.Registry) { r.Alive("a", nil) }, "no function"},
	} {
		t.Run(name, func(t *testing.T) {
			r := telemetry.New("appliance", "v1")
			defer func() {
				var said string
				switch p := recover().(type) {
				case error:
					said = p.Error()
				case string:
					said = p
				}
				if !strings.Contains(said, tc.want) {
					t.Errorf("panic = %q, want one that says %q", said, tc.want)
				}
			}()
			tc.do(r)
		})
	}
}

func ok(context.Context) error { return nil }

func TestNames(t *testing.T) {
	r := telemetry.New("appliance", "v1")
	r.Gauge("demarc_z", "Z.", func() float64 { return 0 })
	r.Histogram("demarc_a_seconds", "A.", []float64{1})
	reg := r.Registerer()
	empty := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "demarc_mesh_dials_total", Help: "D."}, []string{"route"})
	gone := prometheus.NewGauge(prometheus.GaugeOpts{Name: "demarc_gone", Help: "G."})
	reg.MustRegister(empty, gone, prometheus.NewGauge(prometheus.GaugeOpts{Name: "app_x", Help: "X."}))
	prometheus.WrapRegistererWithPrefix("demarc_raft_", reg).MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "term", Help: "T."}))
	if !reg.Unregister(gone) || reg.Unregister(gone) {
		t.Error("a collector was not taken away exactly once")
	}
	want := []string{"demarc_a_seconds", "demarc_build_info", "demarc_mesh_dials_total", "demarc_raft_term", "demarc_z"}
	if diff := cmp.Diff(want, r.Names()); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	// All that is scraped under the prefix is named.
	for name := range scrape(t, r) {
		if strings.HasPrefix(name, telemetry.Prefix) && !slices.Contains(r.Names(), name) {
			t.Errorf("%s is exposed and not in Names", name)
		}
	}
	// Two registries share nothing.
	if got := telemetry.New("appliance", "v1").Names(); !slices.Equal(got, []string{"demarc_build_info"}) {
		t.Errorf("names of a new registry = %v", got)
	}
}

func TestTogether(t *testing.T) {
	r := telemetry.New("appliance", "v1")
	v := r.CounterVec("demarc_x_total", "X.", "l", []string{"a"})
	const n = 50
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			v.With("a").Inc()
			v.With("stranger").Inc()
			if i%10 == 0 {
				ask(r, http.MethodGet, "/metrics")
				r.Gauge("demarc_g"+strings.Repeat("x", i), "G.", func() float64 { return 1 })
				r.Check("c"+strings.Repeat("x", i), ok)
				ask(r, http.MethodGet, "/readyz")
			}
		})
	}
	wg.Wait()
	want := map[string]float64{"a": n, "other": n}
	if diff := cmp.Diff(want, samples(scrape(t, r)["demarc_x_total"], "l")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestLogger(t *testing.T) {
	var b bytes.Buffer
	l := telemetry.NewLogger(&b, slog.LevelInfo, "json")
	l.Debug("not this")
	l.Info("that", "n", 3, "text", "two\nlines")
	var rec map[string]any
	if err := json.Unmarshal(b.Bytes(), &rec); err != nil {
		t.Fatalf("%q: %v", b.String(), err)
	}
	if rec["msg"] != "that" || rec["n"] != 3.0 || rec["level"] != "INFO" || rec["text"] != "two\nlines" {
		t.Errorf("record = %v", rec)
	}
	b.Reset()
	l = telemetry.NewLogger(&b, slog.LevelError, "text")
	l.Warn("not this")
	l.Error("that", "text", "two\nlines level=INFO")
	if s := b.String(); strings.Count(s, "\n") != 1 || !strings.Contains(s, `level=ERROR msg=that text="two\nlines level=INFO"`) {
		t.Errorf("record = %q", s)
	}
}
