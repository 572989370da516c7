#!/bin/sh
# Prometheus' promtool, from Debian's package, unpacked into a directory: no root, nothing installed.
# usage: promtool.sh DIRECTORY
set -eu
target=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -q prometheus || { apt-get update -q && apt-get download -q prometheus; }
dpkg-deb -x prometheus_*.deb unpacked
cp unpacked/usr/bin/promtool "$target"
