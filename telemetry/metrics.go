// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	stdutf8 "unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
)

// Prefix begins the name of each metric of this project.
const Prefix = "demarc_"

// Other is the label value that stands for all that are outside of a closed set.
const Other = "other"

// MaxValues bounds a closed set: a longer one is a set of names of things, which labels are not for.
const MaxValues = 128

var (
	nameForm  = regexp.MustCompile(`^demarc(_[a-z0-9]+)+$`)
	labelForm = regexp.MustCompile(`^[a-z][a-z0-9]*(_[a-z0-9]+)*$`)
)

// Counter only grows. What is not a finite number above zero is not added.
type Counter interface {
	Inc()
	Add(float64)
}

// Observer takes the observations of a histogram. What is not a finite number is not observed.
type Observer interface {
	Observe(float64)
}

// CounterVec is a counter for each value of a closed set, and one for all other values.
type CounterVec struct {
	of    map[string]Counter
	other Counter
}

// With gives the counter of a value; that of [Other] where the value is outside of the set.
func (v *CounterVec) With(value string) Counter {
	if c, ok := v.of[value]; ok {
		return c
	}
	return v.other
}

// Gauge registers a number that is read at each scrape. A read that panics gives NaN: not known. Reads must not block.
func (r *Registry) Gauge(name, help string, read func() float64) {
	const method = "Gauge"
	if read == nil {
		mistake(method, name, "has no function to read")
	}
	r.add(method, name, help, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return known(read) }))
}

// GaugeVec registers one number for each value of a closed set. As with Gauge, read is called at each scrape, once a value.
func (r *Registry) GaugeVec(name, help, label string, values []string, read func(value string) float64) {
	const method = "GaugeVec"
	if read == nil {
		mistake(method, name, "has no function to read")
	}
	closed(method, name, label, values)
	r.add(method, name, help, &gauges{
		desc:   prometheus.NewDesc(name, help, []string{label}, nil),
		values: slices.Clone(values),
		read:   read,
	})
}

type gauges struct {
	desc   *prometheus.Desc
	values []string
	read   func(string) float64
}

func (g *gauges) Describe(ch chan<- *prometheus.Desc) { ch <- g.desc }

func (g *gauges) Collect(ch chan<- prometheus.Metric) {
	for _, v := range g.values {
		ch <- prometheus.MustNewConstMetric(g.desc, prometheus.GaugeValue, known(func() float64 { return g.read(v) }), v)
	}
}

// known is what read gives, or NaN where it panics: a scrape must not end the process.
func known(read func() float64) (v float64) {
	defer func() {
		if recover() != nil {
			v = math.NaN()
		}
	}()
	return read()
}

// Counter registers a counter. Its name ends in _total.
func (r *Registry) Counter(name, help string) Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	r.add("Counter", name, help, c)
	return counter{c}
}

// CounterVec registers a counter for each value of a closed set, and one for [Other]; all are exposed from zero on.
func (r *Registry) CounterVec(name, help, label string, values []string) *CounterVec {
	const method = "CounterVec"
	closed(method, name, label, values)
	vec := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
	r.add(method, name, help, vec)
	out := &CounterVec{of: map[string]Counter{}, other: counter{vec.WithLabelValues(Other)}}
	for _, v := range values {
		out.of[v] = counter{vec.WithLabelValues(v)}
	}
	return out
}

type counter struct{ c prometheus.Counter }

func (c counter) Inc() { c.c.Inc() }

func (c counter) Add(v float64) {
	if v > 0 && !math.IsInf(v, 0) {
		c.c.Add(v)
	}
}

// Histogram registers a histogram with the upper bounds of its buckets, ascending; +Inf is added by itself.
func (r *Registry) Histogram(name, help string, buckets []float64) Observer {
	const method = "Histogram"
	if len(buckets) == 0 || len(buckets) > MaxValues {
		mistake(method, name, "needs 1 to %d buckets, and has %d", MaxValues, len(buckets))
	}
	for i, b := range buckets {
		if math.IsNaN(b) || math.IsInf(b, 0) || i > 0 && b <= buckets[i-1] {
			mistake(method, name, "has buckets that are not finite and ascending at %v", b)
		}
	}
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: slices.Clone(buckets)})
	r.add(method, name, help, h)
	return observer{h}
}

type observer struct{ h prometheus.Histogram }

func (o observer) Observe(v float64) {
	if !math.IsNaN(v) && !math.IsInf(v, 0) {
		o.h.Observe(v)
	}
}

// add registers a collector of this package, or panics with what is wrong with it.
func (r *Registry) add(method, name, help string, c prometheus.Collector) {
	if !nameForm.MatchString(name) {
		mistake(method, name, "is not a name like demarc_thing_unit, in lower case")
	}
	if isCounter := strings.HasPrefix(method, "Counter"); isCounter != strings.HasSuffix(name, "_total") {
		mistake(method, name, "is wrong at its end: a counter ends in _total, and nothing else does")
	}
	if strings.TrimSpace(help) == "" || !stdutf8.ValidString(help) {
		mistake(method, name, "has no help: say in one sentence what it counts")
	}
	var extra []string
	if method == "Histogram" {
		extra = []string{name + "_bucket", name + "_sum", name + "_count"}
	}
	r.mustClaim(name, extra...)
	r.own.MustRegister(c)
}

// mustClaim takes a family's name, and the further names of its samples, or panics where one is taken.
func (r *Registry) mustClaim(name string, samples ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := append([]string{name}, samples...)
	for _, n := range all {
		if r.taken[n] || r.names[n] > 0 {
			panic(fmt.Sprintf("telemetry: the metric %q is registered already", n))
		}
	}
	for _, n := range all {
		r.taken[n] = true
	}
	r.names[name]++
}

func closed(method, name, label string, values []string) {
	if !labelForm.MatchString(label) || label == "le" || label == "quantile" {
		mistake(method, name, "has %q as a label, which is not a word in lower case of its own", label)
	}
	if len(values) == 0 || len(values) > MaxValues {
		mistake(method, name, "needs a closed set of 1 to %d values, and has %d", MaxValues, len(values))
	}
	for i, v := range values {
		if v == "" || !stdutf8.ValidString(v) || slices.Contains(values[:i], v) {
			mistake(method, name, "has the value %q, which is empty, twice in the set or not text", v)
		}
	}
}

// mistake ends the start of a process whose programmer has to look here.
func mistake(method, name, format string, args ...any) {
	panic(fmt.Sprintf("telemetry.%s: %q ", method, name) + fmt.Sprintf(format, args...))
}

// registerer lists the names of what others register, so that Names knows them before they have a sample.
type registerer struct{ r *Registry }

func (g registerer) Register(c prometheus.Collector) error {
	names := described(c)
	g.r.mu.Lock()
	defer g.r.mu.Unlock()
	if err := g.r.own.Register(c); err != nil {
		return err
	}
	for _, n := range names {
		g.r.names[n]++
	}
	return nil
}

func (g registerer) MustRegister(cs ...prometheus.Collector) {
	for _, c := range cs {
		if err := g.Register(c); err != nil {
			panic(err)
		}
	}
}

func (g registerer) Unregister(c prometheus.Collector) bool {
	g.r.mu.Lock()
	defer g.r.mu.Unlock()
	if !g.r.own.Unregister(c) {
		return false
	}
	for _, n := range described(c) {
		if g.r.names[n]--; g.r.names[n] == 0 {
			delete(g.r.names, n)
		}
	}
	return true
}

// described gives the names under demarc_ that a collector describes. A description keeps its name to itself except in
// its string; a test fails should a version of the client library spell that otherwise.
func described(c prometheus.Collector) []string {
	ch := make(chan *prometheus.Desc)
	go func() {
		defer close(ch)
		c.Describe(ch)
	}()
	var out []string
	for d := range ch {
		quoted, ok := strings.CutPrefix(d.String(), "Desc{fqName: ")
		if !ok {
			continue
		}
		q, err := strconv.QuotedPrefix(quoted)
		if err != nil {
			continue
		}
		if n, err := strconv.Unquote(q); err == nil && strings.HasPrefix(n, Prefix) {
			out = append(out, n)
		}
	}
	return out
}
