// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"bytes"
	"fmt"
	"io"

	"filippo.io/age"

	"github.com/demarc-dev/demarc/cmd/demarc/cli"
	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/operation"
)

// Statement returns the first of a kind among sealed statements, nil if there is none.
func Statement(all [][]byte, kind string) []byte {
	for _, s := range all {
		if k, err := operation.Kind(s); err == nil && k == kind {
			return s
		}
	}
	return nil
}

// Verify verifies the statements of an operation that has a result, before anything of its output is opened. The fault is Denied if they
// can't be trusted, and Conflict if there is no result.
func Verify(request []byte, statements [][]byte, k operation.Keys) (operation.Chain, error) {
	const op = "demarc.verify"
	c, err := operation.VerifyChain(request, Statement(statements, operation.TypeApproval), Statement(statements, operation.TypeResult),
		Statement(statements, operation.TypeRelease), k)
	if err != nil {
		return c, fault.Because(err, op, fault.Denied, "the documents of the operation can't be trusted, nothing is shown: %s", fault.Text(err))
	}
	if c.Result == nil {
		return c, fault.New(op, fault.Conflict, "operation %s is %s: it has no result", c.Request.ID, c.State)
	}
	return c, nil
}

// maxOutput bounds the output of an operation, in bytes.
const maxOutput = 8 << 20

// Open decrypts an output and compares it with what the appliance signed for in the result of a verified chain. The fault is Denied if it
// is another one.
func Open(hidden []byte, c operation.Chain, id age.Identity) (operation.Output, error) {
	const op = "demarc.output"
	r, err := age.Decrypt(bytes.NewReader(hidden), id)
	if err != nil {
		return operation.Output{}, fault.Because(err, op, fault.Denied, "the output is not encrypted to this key, or damaged")
	}
	plain, err := io.ReadAll(io.LimitReader(r, maxOutput))
	if err != nil {
		return operation.Output{}, fault.At(op, fault.Denied, err)
	}
	if c.Release != nil {
		return operation.VerifyOutput(c, hidden, plain)
	}
	out, err := operation.ParseOutput(plain)
	if err != nil {
		return out, err
	}
	if err := out.Matches(*c.Result); err != nil {
		return operation.Output{}, err
	}
	return out, nil
}

// Print prints an output, with its exit code unless all went well.
func Print(a *cli.App, out operation.Output, res operation.Result) error {
	doc := map[string]any{"id": res.ID, "exit": res.Exit, "stdout": string(out.Stdout), "stderr": string(out.Stderr),
		"truncated": out.Truncated, "argv": res.Argv}
	return a.Emit(doc, func(w io.Writer) {
		fmt.Fprintf(w, "%s", out.Stdout)
		if len(out.Stderr) > 0 {
			fmt.Fprintf(w, "stderr: %s", out.Stderr)
		}
		if res.Exit != 0 || out.Truncated {
			fmt.Fprintf(w, "exit %d, truncated %v\n", res.Exit, out.Truncated)
		}
	})
}
