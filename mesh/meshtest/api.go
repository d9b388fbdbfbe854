// SPDX-License-Identifier: Apache-2.0

package meshtest

import (
	"encoding/json"
	"net/http"
	"slices"
	"sync"
)

// API stands for the part of Tailscale's API that makes auth keys: for OAuth clients and for workload identities. It is
// served at the tailnet's URL.
type API struct {
	ClientSecret string   // that an OAuth client must show
	ClientID     string   // of the workload identity
	IDToken      string   // that the workload must show
	Tags         []string // that a key must be for

	mu   sync.Mutex
	made int
	lack []string // what was refused, and why
}

// apiToken is what both ways give for the making of keys.
const apiToken = "access-token-for-tests"

// Serve lets the API make keys for this tailnet.
func (t *Tailnet) Serve(a *API) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.api = a
}

// Watch has see look at each request to the coordinator and the API. It must not block.
func (t *Tailnet) Watch(see func(*http.Request)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.see = see
}

// Made is how many keys the API has made, and what it has refused.
func (a *API) Made() (int, []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.made, slices.Clone(a.lack)
}

// front is the tailnet's whole web side: the API where one is served, and the coordinator.
func (t *Tailnet) front(coordinator http.Handler) http.Handler {
	with := func(f func(*API, http.ResponseWriter, *http.Request)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			t.mu.Lock()
			a := t.api
			t.mu.Unlock()
			if a == nil {
				http.NotFound(w, r)
				return
			}
			r.Body = http.MaxBytesReader(w, r.Body, 64<<10)
			f(a, w, r)
		}
	}
	mux := http.NewServeMux()
	for _, path := range []string{"/key", "/ts2021", "/c2n/", "/generate_204"} { // it ends the program at any other
		mux.Handle(path, coordinator)
	}
	mux.HandleFunc("HEAD /{$}", func(http.ResponseWriter, *http.Request) {})
	mux.Handle("POST /api/v2/oauth/token", with(func(a *API, w http.ResponseWriter, r *http.Request) {
		_, secret, basic := r.BasicAuth()
		if !basic {
			secret = r.PostFormValue("client_secret")
		}
		a.token(w, secret == a.ClientSecret && a.ClientSecret != "", "the client's secret")
	}))
	mux.Handle("POST /api/v2/oauth/token-exchange", with(func(a *API, w http.ResponseWriter, r *http.Request) {
		a.token(w, r.PostFormValue("client_id") == a.ClientID && r.PostFormValue("jwt") == a.IDToken && a.IDToken != "", "the workload's token")
	}))
	mux.Handle("POST /api/v2/tailnet/-/keys", with(func(a *API, w http.ResponseWriter, r *http.Request) { a.key(w, r, t.AuthKey) }))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t.mu.Lock()
		see := t.see
		t.mu.Unlock()
		if see != nil {
			see(r)
		}
		mux.ServeHTTP(w, r)
	})
}

func (a *API) token(w http.ResponseWriter, ok bool, what string) {
	if !ok {
		a.refuse(w, http.StatusUnauthorized, what)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"access_token": apiToken, "token_type": "Bearer", "expires_in": 60}) // the caller is gone
}

func (a *API) key(w http.ResponseWriter, r *http.Request, authKey string) {
	var ask struct {
		Capabilities struct {
			Devices struct {
				Create struct {
					Reusable, Ephemeral, Preauthorized bool
					Tags                               []string
				}
			}
		}
	}
	_, basic, _ := r.BasicAuth()
	user, _, _ := r.BasicAuth()
	if r.Header.Get("Authorization") != "Bearer "+apiToken && user != apiToken && basic != apiToken {
		a.refuse(w, http.StatusUnauthorized, "the access token")
		return
	}
	if err := json.NewDecoder(r.Body).Decode(&ask); err != nil {
		a.refuse(w, http.StatusBadRequest, "the words of the request")
		return
	}
	if c := ask.Capabilities.Devices.Create; c.Reusable || !c.Preauthorized || !slices.Equal(c.Tags, a.Tags) {
		a.refuse(w, http.StatusForbidden, "the kind of key")
		return
	}
	a.mu.Lock()
	a.made++
	a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"id": "k1", "key": authKey}) // the caller is gone
}

func (a *API) refuse(w http.ResponseWriter, code int, what string) {
	a.mu.Lock()
	a.lack = append(a.lack, what)
	a.mu.Unlock()
	http.Error(w, `{"message":"refused: `+what+`"}`, code)
}
