#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds etcd and the program that loads it, once, from the Go module proxy into a cache outside of the tree, and prints
# the folder. Cold it takes about two minutes on two cores.
#
#   DEMARC_ETCD_CACHE  the folder (default ${XDG_CACHE_HOME:-$HOME/.cache}/demarc-test)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
version=$(sed -n 's/.*etcd\/server\/v3 v//p' "$here/go.mod")
out=${DEMARC_ETCD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/demarc-test}/bench-etcd-v$version
mkdir -p "$out"
cd "$here"
# The flags of the module above mean nothing here.
export GOFLAGS=-mod=readonly GOWORK=off CGO_ENABLED=0
[ -x "$out/etcd" ] || { echo "building etcd v$version" >&2; go build -trimpath -ldflags "-s -w" -o "$out/etcd" ./server; }
go build -trimpath -o "$out/etcd-load" ./load
echo "$out"
