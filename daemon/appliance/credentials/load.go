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

// maxFile bounds the file of the wallet, in bytes: two keys, a certificate, and the CAs in base64.
const maxFile = 256 << 10

// signedName is the file beside the wallet that holds the vendor's CAs as the vendor signed them.
const signedName = "bundle.signed"

// load reads what is on disk, verifies it, and gives what of it is worth nothing. Nothing of that is used, and nothing of it
// keeps the appliance from starting: a certificate that is lost is replaced by a proof of the platform identity, and CAs that
// are lost by the signed bundle, which the pinned key of the vendor's log vouches for.
//
// Where a file with the vendor's signature is, it alone says which CAs are trusted. The copy in the wallet counts before the first
// one came, and for a wallet that an older build wrote. Before a key is pinned, the customer's own file counts.
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
		_ = os.Rename(w.path, w.path+".damaged") // for whoever looks into it; the next write replaces the file anyhow
	}
	if len(h.Certificate) == 0 { // it has never enrolled, or is about to again: the customer may have written a newer file meanwhile
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

// verify has the CAs be those that the vendor signed, or none where what is on disk is not what it signed.
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
	if b.Number != h.Number || !sameCAs(b.CAs, h.Bundle) { // a crash came between the two files, or the wallet was altered
		h.Bundle, h.Number, h.Issuer = b.CAs, b.Number, b.Issuer
	}
	w.signed = b.Number
	return nil, nil
}

// storeSigned puts a bundle that was verified on disk as it came, where none of that number is there. The caller does not hold mu.
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

// SignedBundle is the number of the bundle that is held with its signature, 0 where the signature is not on disk: the control plane
// sends that one then.
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

// readUpTo reads a file of at most limit bytes: fault.NotFound where there is none, fault.Invalid where it is larger.
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
