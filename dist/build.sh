#!/usr/bin/env bash
# Makes the packages, in target/dist: a static binary in a .tar.gz, a .deb, what dist/Dockerfile
# copies, and SHA256SUMS. The same commit gives the same bytes.
#   dist/build.sh                                    builds the binary first
#   dist/build.sh --binary PATH [--output DIR] [--version V]   packs one that is there already
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

binary='' output=target/dist
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
while [ $# -gt 0 ]; do
  case $1 in
    --binary) binary=${2:?--binary: which?}; shift 2 ;;
    --output) output=${2:?--output: where?}; shift 2 ;;
    --version) version=${2:?--version: which?}; shift 2 ;;
    *) echo "dist/build.sh: unexpected argument $1" >&2; exit 2 ;;
  esac
done

# As seen from where it was called.
from_there() { case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
[ -z "$binary" ] || binary=$(from_there "$binary")
[ "$output" = target/dist ] || output=$(from_there "$output")

machine=$(uname -m)
case $machine in
  x86_64) architecture=amd64 ;;
  aarch64) architecture=arm64 ;;
  *) echo "dist/build.sh: no packages are made on $machine, only on x86_64 and aarch64" >&2; exit 1 ;;
esac

missing=()
command -v dpkg-deb >/dev/null || missing+=('dpkg-deb (Debian: dpkg)')
command -v strip >/dev/null || missing+=('strip (Debian: binutils)')
target=$machine-unknown-linux-musl
if [ -z "$binary" ]; then
  command -v musl-gcc >/dev/null || missing+=('musl-gcc (Debian: musl-tools)')
  [ -d "$(rustc --print sysroot)/lib/rustlib/$target" ] || missing+=("Rust for $target (rustup target add $target)")
fi
if [ ${#missing[@]} -gt 0 ]; then
  printf 'dist/build.sh: missing: %s\n' "${missing[@]}" >&2
  exit 1
fi

if [ -z "$binary" ]; then
  cargo build --locked --release --target "$target"
  binary=${CARGO_TARGET_DIR:-target}/$target/release/asyncproxy
fi
if ldd "$binary" 2>/dev/null | grep -q '=>'; then
  echo "dist/build.sh: warning: $binary is not static: it needs the libraries of this machine" >&2
fi

SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y Cargo.lock)}
export SOURCE_DATE_EPOCH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022
mkdir -p "$output"
strip --strip-unneeded -o "$work/asyncproxy" "$binary"
chmod 755 "$work/asyncproxy"

# All of one age, so that only contents count.
age() { find "$1" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +; }
pack() {
  chmod -R u=rwX,go=rX "$work/$1"
  tar --create --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" \
    --directory="$work" "$1" | gzip --no-name --best > "$2"
}

name=asyncproxy-$version-$machine-linux
mkdir "$work/$name"
cp "$work/asyncproxy" config.yaml README.md CHANGELOG.md LICENSE "$work/$name"
cp -r dist "$work/$name/dist"
pack "$name" "$output/$name.tar.gz"

root=$work/deb
install -D -m 755 "$work/asyncproxy" "$root/usr/bin/asyncproxy"
install -D -m 644 config.yaml "$root/etc/asyncproxy/config.yaml"
for unit in dist/*.service dist/*.socket; do
  install -D -m 644 "$unit" "$root/lib/systemd/system/$(basename "$unit")"
done
documents=$root/usr/share/doc/asyncproxy
mkdir -p "$documents"
install -m 644 README.md dist/grafana.json dist/alerts.yaml "$documents"
install -m 644 LICENSE "$documents/copyright"
gzip --no-name --best --stdout CHANGELOG.md > "$documents/changelog.gz"
mkdir "$root/DEBIAN"
# KiB of the files: what directories take is the file system's business.
size=$(find "$root" -type f -printf '%s\n' | awk '{ all += int(($1 + 1023) / 1024) } END { print all }')
sed -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$architecture/" -e "s/@SIZE@/$size/" \
  dist/debian/control > "$root/DEBIAN/control"
echo /etc/asyncproxy/config.yaml > "$root/DEBIAN/conffiles"
for script in postinst prerm postrm; do
  install -m 755 "dist/debian/$script" "$root/DEBIAN/$script"
done
(cd "$root" && find usr lib etc -type f -print0 | sort -z | xargs -0 md5sum > DEBIAN/md5sums)
chmod -R u=rwX,go=rX "$root"
age "$root"
dpkg-deb --root-owner-group -Zgzip --build "$root" "$output/asyncproxy_${version}_$architecture.deb" >/dev/null

# For dist/Dockerfile: nothing can be run there that would make a directory.
rm -rf "$output/image"
mkdir -p "$output/image/state"
cp "$work/asyncproxy" config.yaml dist/Dockerfile "$output/image"
if [ -r /etc/ssl/certs/ca-certificates.crt ]; then
  cp /etc/ssl/certs/ca-certificates.crt "$output/image"
else
  echo 'dist/build.sh: no /etc/ssl/certs/ca-certificates.crt here: the image needs one for https' >&2
  : > "$output/image/ca-certificates.crt"
fi

(cd "$output" && sha256sum -- "$name.tar.gz" "asyncproxy_${version}_$architecture.deb" > SHA256SUMS && cat SHA256SUMS)
