// The database of known vulnerabilities, at the day of its version. It has nothing to build: `go mod tidy` would take it away.
module github.com/demarc-dev/demarc/tools/vulndb

go 1.26.8

require golang.org/x/vulndb v0.0.0-20261105234957-e22db6528018 // indirect
