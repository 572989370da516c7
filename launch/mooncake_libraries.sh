#!/bin/sh
# The shared libraries that Mooncake's store needs (Debian: libibverbs1, librdmacm1, libnuma1 and
# what these need), unpacked into a directory: no root, nothing installed.
# usage: mooncake_libraries.sh DIRECTORY
set -eu
target=$(mkdir -p "$1" && cd "$1" && pwd)
packages="libibverbs1 librdmacm1 libnuma1 libnl-3-200 libnl-route-3-200"
if ldconfig -p | grep -q libibverbs.so.1 && ldconfig -p | grep -q librdmacm.so.1; then
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
# shellcheck disable=SC2086
apt-get download -q $packages || { apt-get update -q && apt-get download -q $packages; }
for package in *.deb; do
    dpkg-deb -x "$package" unpacked
done
find unpacked \( -name 'lib*.so.*' \) -exec cp -P {} "$target" \;
