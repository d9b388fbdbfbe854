// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"math"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/demarc-dev/demarc/fault"
)

// Bounds of a service's limits.
const (
	maxMemory = 1 << 50 // bytes
	maxCPUs   = 1024
	maxPIDs   = 1 << 22 // the kernel's own bound, on 64 bits
)

var (
	wholeForm   = regexp.MustCompile(`^[1-9][0-9]{0,18}$`)
	memoryForm  = regexp.MustCompile(`^([1-9][0-9]{0,14})(b|k|kb|m|mb|g|gb)?$`)
	decimalForm = regexp.MustCompile(`^[0-9]{1,4}(\.[0-9]{1,3})?$`)
)

// limits refuses a limit that would come out as another one: compose-go rounds, overflows, and takes 0 for none.
func limits(service *yaml.Node) error {
	for _, l := range []struct {
		key, want string
		right     func(v string) bool
	}{
		{"mem_limit", "write a whole number above zero with b, k, m or g, for instance 512m, at most 1 PiB; leave it out for no limit",
			wholeMemory},
		{"cpus",
			"write a number above zero with at most three digits after the point, for instance 0.5, at most 1024; leave it out for no limit", func(
				v string) bool {
				f, err := strconv.ParseFloat(v, 64)
				return err == nil && decimalForm.MatchString(v) && f > 0 && f <= maxCPUs
			}},
		{"pids_limit", "write a whole number from 1 to 4194304; leave it out for no limit", func(v string) bool {
			n, err := strconv.ParseInt(v, 10, 64)
			return err == nil && wholeForm.MatchString(v) && n <= maxPIDs
		}},
	} {
		n := child(service, l.key)
		if n == nil {
			continue
		}
		if n.Kind != yaml.ScalarNode || !l.right(n.Value) {
			why := ""
			if strings.HasPrefix(n.Value, "-") {
				why = "it can't be negative: "
			}
			return fault.New("manifest.limits", fault.Invalid, "line %d: %s %.32q: %s%s", n.Line, l.key, n.Value, why, l.want)
		}
	}
	return nil
}

func wholeMemory(v string) bool {
	m := memoryForm.FindStringSubmatch(strings.ToLower(v))
	if m == nil {
		return false
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	unit := map[string]int64{"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}[strings.TrimSuffix(m[2], "b")]
	return err == nil && n <= math.MaxInt64/unit && n*unit <= maxMemory
}
