# demarc: `make demo` shows the whole story, `make test` runs all tests, `make check` is what CI runs.
GO      ?= go
BIN     := bin
# Without these the tailnet node would open a TCP listener on the host, and tell its coordinator of the process that it runs in: mesh
# refuses to start one in such a build.
export GOFLAGS := $(GOFLAGS) -tags=ts_omit_peerapiserver,ts_omit_c2n

TOOLS   := $(CURDIR)/bin/tools

.PHONY: all bin install demo demo-check bench-channels bench-raft bench-book build fuzz test test-disk test-kubernetes test-roads test-runbooks test-upgrade test-long record-release robustness robustness-short race check vet lint vuln gen gen-check clean
all: build

build: ## build everything
	$(GO) build ./...

bin: ## demarc, demarcd, the demo and its sample application, in bin
	$(GO) build -trimpath -o $(BIN)/ ./cmd/demarc ./cmd/demarcd ./demo
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $(BIN)/sample/ ./demo/sample/web ./demo/sample/store

PREFIX ?= /usr/local
install: bin ## demarc and demarcd into PREFIX/bin (PREFIX=/usr/local, below DESTDIR if it is set); the unit is in deploy/systemd
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 0755 $(BIN)/demarc $(BIN)/demarcd $(DESTDIR)$(PREFIX)/bin

demo: bin ## the whole story on loopback; stays up until Ctrl-C
	$(BIN)/demo -bin $(BIN)

demo-check: bin ## the same, without staying: fails at the first thing that is not as promised
	$(BIN)/demo -check -bin $(BIN)

bench-channels: bin ## memory of idle channels and their return after kill -9, beside a bare HTTP/2 server (N=10000)
	$(GO) build -o $(BIN)/channels ./bench/channels
	$(BIN)/channels -n $(or $(N),10000) -bin $(BIN)

bench-raft: bin ## changes a second through the API of three nodes, in turns with three of etcd (SECONDS=5 TURNS=3)
	dir=$$(bench/raft/etcd/build.sh) && $(GO) build -o $(BIN)/raftbench ./bench/raft && \
	$(BIN)/raftbench -bin $(BIN) -etcd $$dir -seconds $(or $(SECONDS),5) -turns $(or $(TURNS),3)

bench-book: ## what a change costs at 50,000 appliances, snapshot and restore
	$(GO) build -o $(BIN)/bookbench ./bench/book && $(BIN)/bookbench

test: ## all tests
	$(GO) test ./...

FUZZTIME ?= 25s
fuzz: ## every fuzz target for FUZZTIME each, one after another; what fails is kept under testdata/fuzz
	@for dir in $$(git grep -lE '^func Fuzz' -- '*_test.go' | xargs -n1 dirname | sort -u); do \
	  for target in $$(grep -hoE '^func Fuzz[A-Za-z0-9_]*' $$dir/*_test.go | cut -d' ' -f2); do \
	    echo "$$dir $$target"; $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 200x -parallel 1 ./$$dir || exit 1; \
	  done; done

test-roads: ## real processes in network namespaces, a fault at a time (needs root, ip and iptables)
	DEMARC_NETNS=1 $(GO) test -count=1 -timeout 10m -v ./fleettest/roads

test-runbooks: ## the runbooks of docs, word for word, against real processes on loopback
	DEMARC_RUNBOOKS=1 $(GO) test -count=1 -timeout 30m -v ./fleettest/runbooks

test-upgrade: ## nodes and appliances of the previous build beside those of this one, rolled while clients make changes
	DEMARC_UPGRADE=1 $(GO) test -count=1 -timeout 20m -v ./fleettest/upgrade

record-release: ## the log, snapshot and root of release N for the tests of all later builds, once; and the commit that upgrades begin at
	@test -n "$(N)" || { echo "make record-release N=2"; exit 1; }
	DEMARC_RECORD=$(N) $(GO) test -count=1 -run TestRecordARelease ./daemon/controlplane
	git rev-parse HEAD >fleettest/upgrade/PREVIOUS
	$(GO) test -count=1 -run TestAnOldLogReplaysToItsRoot ./daemon/controlplane

robustness: bin ## three real nodes (NODES=5) under faults, histories checked (DURATION=5m, SEED= replays; needs root, ip, iptables, mkfs.ext4)
	$(GO) build -o $(BIN)/robust ./fleettest/robust
	$(BIN)/robust -bin $(BIN) -duration $(or $(DURATION),5m) -seed $(or $(SEED),0) -nodes $(or $(NODES),3) $(if $(WITHOUT),-without "$(WITHOUT)")

robustness-short: bin ## 90 seconds of the same, for CI; without disk faults where there are no loop devices
	$(GO) build -o $(BIN)/robust ./fleettest/robust
	$(BIN)/robust -bin $(BIN) -duration 90s -seed $(or $(SEED),0) $(if $(wildcard /dev/loop-control),,-without disk)

test-disk: ## a full disk on real, small file systems (needs root)
	DEMARC_DISK=1 unshare -m $(GO) test -count=1 -v -run 'Full' ./raft ./daemon/appliance ./smallfile ./client ./workload/artifact

race: ## all tests with the race detector, in random order (needs a C compiler)
	CGO_ENABLED=1 $(GO) test -race -shuffle=on -timeout 20m ./...

test-kubernetes: ## proofs of a real kube-apiserver; the first time it is built, which takes minutes
	dir=$$(fleettest/kubernetes/build.sh) && DEMARC_KUBE_APISERVER=$$dir/kube-apiserver $(GO) test -count=1 -run RealCluster ./daemon/controlplane

vet:
	$(GO) vet ./...

lint: vet $(TOOLS)/lint ## gofmt, vet, staticcheck, errorlint, sloglint, forbidigo and misspell, less the exceptions in tools/lint/allowed.txt
	@out=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$out" ]; then echo "gofmt:"; echo "$$out"; exit 1; fi
	$(GO) vet -C tools ./... && $(GO) test -C tools ./...
	$(TOOLS)/lint tools/lint/allowed.txt

# The module in tools pins linters and govulncheck, so that the product's own go.mod does not grow by what they need.
$(TOOLS)/lint: tools/go.mod tools/go.sum $(wildcard tools/*/*.go)
	$(GO) build -C tools -o $(TOOLS)/ tool ./lint ./vuln

$(TOOLS)/buf:
	GOBIN=$(TOOLS) $(GO) install github.com/bufbuild/buf/cmd/buf@v1.75.0
$(TOOLS)/protoc-gen-go:
	GOBIN=$(TOOLS) $(GO) install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
$(TOOLS)/protoc-gen-connect-go:
	GOBIN=$(TOOLS) $(GO) install connectrpc.com/connect/cmd/protoc-gen-connect-go@v1.21.1

gen: $(TOOLS)/buf $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-connect-go ## rebuild the generated code
	PATH="$(TOOLS):$$PATH" buf lint && PATH="$(TOOLS):$$PATH" buf generate

gen-check: $(TOOLS)/buf $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-connect-go ## fails where committed generated code is stale
	@rm -rf bin/gen && mkdir -p bin/gen && PATH="$(TOOLS):$$PATH" buf lint && PATH="$(TOOLS):$$PATH" buf generate -o bin/gen && \
	for f in $$(cd bin/gen && find api -name '*.go'); do cmp -s "$$f" "bin/gen/$$f" || { echo "$$f is stale: run make gen"; exit 1; }; done; rm -rf bin/gen

vuln: $(TOOLS)/lint ## known vulnerabilities in what is called, from a pinned database: fails for what is not in docs/vulnerabilities.md
	$(TOOLS)/vuln docs/vulnerabilities.md

# BUDGET is for 2 cores and empty caches. What does not fit into it goes to test-long.
BUDGET ?= 1500
CHECK  := build lint gen-check race test-disk test-roads test-runbooks test-upgrade robustness-short vuln demo-check
check: ## what CI runs, with the seconds of each part
	@.ci/budget $(BUDGET) $(CHECK)

test-long: test-kubernetes robustness ## what takes too long for check: run it by hand before a release
	DEMARC_LONG=1 $(GO) test -count=1 -timeout 60m ./fleettest
	DEMARC_CRASH_SEEDS=16 $(GO) test -count=1 -timeout 60m -run 'Crash|Power' ./raft/...

clean:
	rm -rf $(BIN)
