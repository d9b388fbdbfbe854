// SPDX-License-Identifier: Apache-2.0

package seal

// Placed is the slow half of [StrictJSON].
var Placed = placed
