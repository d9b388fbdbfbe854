// SPDX-License-Identifier: Apache-2.0

package credentials

import (
	"bytes"
	"crypto/x509"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/demarc-dev/demarc/fault"
	"github.com/demarc-dev/demarc/identity"
	"github.com/demarc-dev/demarc/seal"
)

// maxFile bounds the credentials file, in bytes: two keys, a certificate, and the CAs in base64.
const maxFile = 256 << 10

// signedName is the file beside the credentials with the vendor's CAs as the vendor signed them.
const signedName = "bundle.signed"

// load reads and verifies the files, and returns the parts that failed verification. Those are not used, and do not keep the appliance
// from starting: a lost certificate is replaced by a proof of the platform identity, and lost CAs by the signed bundle, which the pinned
// key of the vendor's log authenticates.
//
// If there is a file with the vendor's signature, it alone determines which CAs are trusted. The copy in the credentials file is used
// before the first signed one, and if an older build wrote the file. Before a key is pinned, the customer's own file is used.
func (w *Store) load(first []*x509.Certificate, pinned []byte) (damage []error, err error) {
	b, err := readUpTo(w.path, maxFile)
	if errors.Is(err, fault.Unavailable) {
		return nil, err
	}
	h := stored{Version: fileVersion}
	var file stored
	switch {
	case err == nil:
		if err = seal.StrictJSON(b, &file); err == nil && file.Version != fileVersion {
			err = fault.New("appliance.wallet", fault.Invalid, "its version is %.40q", file.Version)
		}
		if err != nil {
			break
		}
		if _, bad := (stored{Key: file.Key, Certificate: file.Certificate}).certificate(); bad != nil {
			damage = append(damage, damaged(w.path, bad))
			file.Key, file.Certificate, file.Issuer = nil, nil, ""
		}
		h = file
		if _, bad := identity.ParseDER(h.Bundle, w.domain); bad != nil && len(h.Certificate) > 0 {
			damage = append(damage, damaged(w.path, bad))
			h.Bundle, h.Number, h.Issuer = nil, 0, ""
		}
	case errors.Is(err, fault.NotFound):
		err = nil
	}
	if err != nil {
		damage = append(damage, damaged(w.path, err))
		_ = os.Rename(w.path, w.path+".damaged") // for an investigation; the next write replaces the file anyhow
	}
	if len(h.Certificate) == 0 { // not enrolled, or to enrol again: the customer may have written a newer file meanwhile
		h.Bundle, h.Number, h.Issuer = nil, 0, ""
		for _, c := range first {
			h.Bundle = append(h.Bundle, c.Raw)
		}
	}
	if pinned != nil {
		bad, err := w.verify(&h, pinned)
		if err != nil {
			return nil, err
		}
		if bad != nil {
			damage = append(damage, bad)
		}
	}
	return damage, w.use(h)
}

// verify sets the CAs to those that the vendor signed, or to none if the file is not what it signed.
func (w *Store) verify(h *stored, pinned []byte) (bad, err error) {
	path := filepath.Join(filepath.Dir(w.path), signedName)
	sealed, err := readUpTo(path, 2*identity.MaxBundle)
	switch {
	case errors.Is(err, fault.NotFound):
		return nil, nil
	case errors.Is(err, fault.Unavailable):
		return nil, err
	}
	var b identity.SignedBundle
	if err == nil {
		var key seal.Key
		if key, err = seal.ParseKey(pinned); err == nil {
			b, err = identity.OpenKeptBundle(sealed, key, w.domain)
		}
	}
	if err != nil {
		h.Bundle, h.Number, h.Issuer = nil, 0, ""
		return damaged(path, err), nil
	}
	if b.Number != h.Number || !sameCAs(b.CAs, h.Bundle) { // a crash between the two files, or the credentials file was altered
		h.Bundle, h.Number, h.Issuer = b.CAs, b.Number, b.Issuer
	}
	w.signed = b.Number
	return nil, nil
}

// storeSigned writes a verified bundle to disk as it was received, if none with that number is there. The caller does not hold mu.
func (w *Store) storeSigned(b identity.SignedBundle, sealed []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.signed == b.Number {
		return nil
	}
	if err := writeFile(filepath.Join(filepath.Dir(w.path), signedName), sealed); err != nil {
		return err
	}
	w.signed = b.Number
	return nil
}

// SignedBundle is the number of the bundle that is stored with its signature, 0 if the signature is not on disk: the control plane then
// sends it.
func (w *Store) SignedBundle() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.signed != w.file.Number {
		return 0
	}
	return w.signed
}

func damaged(path string, err error) error {
	return fault.Because(err, "appliance.wallet", fault.Invalid, "%s is not what this appliance wrote, and nothing in it is used: %s", path,
		fault.Text(err))
}

func sameCAs(a, b [][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}

// readUpTo reads a file of at most limit bytes: fault.NotFound if there is none, fault.Invalid if it is larger.
func readUpTo(path string, limit int64) ([]byte, error) {
	const op = "appliance.read"
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Because(err, op, fault.NotFound, "there is no %s", path)
	}
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "%s can't be read", path)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fault.Because(err, op, fault.Unavailable, "%s can't be read", path)
	}
	if int64(len(b)) > limit {
		return nil, fault.New(op, fault.Invalid, "it has more than %d bytes", limit)
	}
	return b, nil
}
