# demarc: `make demo` shows the whole story, `make test` runs all tests, `make check` is what CI runs.
GO      ?= go
BIN     := bin
export CGO_ENABLED ?= 1

.PHONY: all build test race check vet lint clean
all: build

build: ## build everything
	$(GO) build ./...

test: ## all tests
	$(GO) test ./...

race: ## all tests with the race detector, in random order
	$(GO) test -race -shuffle=on ./...

vet:
	$(GO) vet ./...

lint: vet ## gofmt and vet; prints the files that differ
	@out=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$out" ]; then echo "gofmt:"; echo "$$out"; exit 1; fi

check: build lint race ## what CI runs

clean:
	rm -rf $(BIN)
