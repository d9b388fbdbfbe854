// SPDX-License-Identifier: Apache-2.0

package fleettest

// interleavings lists the orders: three steps of a CA, ordinary or compromised, among a snapshot, a rotation and a change of the members.
// In each second of them a node is down in the step that does not wait for it.
func interleavings() [][]string {
	var out [][]string
	n := 0
	for a := range 6 {
		for b := range 6 {
			for c := range 6 {
				if a == b || b == c || a == c {
					continue
				}
				order := make([]string, 6)
				member := []string{"add", "remove", "replace"}[n%3]
				order[a], order[b], order[c] = "snapshot", "rotate", member
				ca := []string{"prepare", "activate", "retire"}
				if n/3%2 == 0 {
					ca[2] = "compromised"
				}
				for i := range order {
					if order[i] == "" {
						order[i], ca = ca[0], ca[1:]
					}
				}
				if n%2 == 0 && member != "remove" { // two voters bear no loss
					for i, word := range order {
						if word == "compromised" || word == "rotate" && n%4 == 0 {
							order[i] += "*"
						}
					}
				}
				out = append(out, order)
				n++
			}
		}
	}
	return out
}

// sample is some of them: that of FAULTS.md I14 first.
func sample(all [][]string) [][]string {
	out := [][]string{{"prepare", "activate", "retire", "snapshot", "rotate"}, {"prepare", "activate", "compromised*", "snapshot", "rotate*"}}
	for i := 0; i < len(all); i += 40 {
		out = append(out, all[i])
	}
	return out
}
