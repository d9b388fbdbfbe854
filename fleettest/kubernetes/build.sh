#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds kube-apiserver and etcd from the Go module proxy, once, into a cache outside the tree, and prints the folder.
# Cold it takes some minutes on two cores and about 2 GB of disk; later it is at once.
#
#   DEMARC_KUBE_CACHE  the folder (default ${XDG_CACHE_HOME:-$HOME/.cache}/demarc-test)
set -eu

kube=1.37.2
etcd=3.7.3

cache=${DEMARC_KUBE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/demarc-test}
out=$cache/kubernetes-v$kube-etcd-v$etcd
if [ -x "$out/kube-apiserver" ] && [ -x "$out/etcd" ]; then
	echo "$out"
	exit 0
fi

# The flags of this module's own builds mean nothing here.
export GOFLAGS=-mod=mod GOWORK=off CGO_ENABLED=0
mkdir -p "$cache"
tmp=$(mktemp -d "$cache/.build-XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM

# build MODULE VERSION STAGING PACKAGE NAME: the module as a dependency of a scratch module. Its replacements of the
# folders beside it (STAGING is what they are called in go.mod) become the published versions of the same commit.
mkdir "$tmp/kube" "$tmp/etcd"
cd "$tmp/kube"
src=$(go mod download -json "k8s.io/kubernetes@v$kube" | sed -n 's/^[[:space:]]*"GoMod": "\(.*\)",*$/\1/p')
sed -e '/^replace (/,/^)/d' -e '/^replace /d' -e "s#^\(\t*k8s\.io/[a-z0-9.-]*\) v0\.0\.0\$#\1 v0.${kube#1.}#" \
	-e "s#^\(\t*k8s\.io/[a-z0-9.-]*\) v0\.0\.0 #\1 v0.${kube#1.} #" -e 's#^module .*#module scratch#' "$src" >go.mod
printf '\nrequire k8s.io/kubernetes v%s\n' "$kube" >>go.mod
printf 'package scratch\n' >scratch.go
echo "building kube-apiserver v$kube" >&2
go build -trimpath -ldflags "-s -w" -o "$tmp/kube-apiserver" k8s.io/kubernetes/cmd/kube-apiserver

cd "$tmp/etcd"
printf 'module scratch\n\ngo 1.26\n\nrequire go.etcd.io/etcd/server/v3 v%s\n' "$etcd" >go.mod
printf 'package main\n\nimport (\n\t"os"\n\n\t"go.etcd.io/etcd/server/v3/etcdmain"\n)\n\nfunc main() { etcdmain.Main(os.Args) }\n' >main.go
echo "building etcd v$etcd" >&2
go build -trimpath -ldflags "-s -w" -o "$tmp/etcd-server" .

mkdir -p "$out"
mv "$tmp/kube-apiserver" "$out/kube-apiserver"
mv "$tmp/etcd-server" "$out/etcd"
echo "$out"
