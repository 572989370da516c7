#!/bin/sh
# Chromium for headless checks of pages, from Debian's packages with what it needs and this machine
# has not, unpacked into a directory: no root, nothing installed. Run DIRECTORY/chromium.
# usage: chromium.sh DIRECTORY
set -eu
target=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/debs/partial"
get() {
    apt-get -qq -y --no-install-recommends --download-only -o Debug::NoLocking=1 \
        -o "Dir::Cache::archives=$work/debs" install chromium fonts-dejavu-core
}
get || { apt-get update -qq && get; }
for package in "$work"/debs/*.deb; do dpkg-deb -x "$package" "$target/root"; done
# some packages have their libraries in folders of their own
libraries=$(find "$target/root" -name '*.so*' ! -path '*/lib/chromium/*' -exec dirname {} + |
    sort -u | tr '\n' ':')
cat >"$target/chromium" <<EOF
#!/bin/sh
export LD_LIBRARY_PATH="$libraries" XDG_DATA_HOME="$target/root/usr/share"
[ -d /etc/fonts ] || export FONTCONFIG_PATH="$target/root/etc/fonts"
exec "$target/root/usr/lib/chromium/chromium" --headless --no-sandbox --disable-gpu \\
    --disable-quic --no-first-run --disable-background-networking --disable-component-update \\
    --disable-sync "\$@"
EOF
chmod +x "$target/chromium"
