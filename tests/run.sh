#!/usr/bin/env bash
# Everything that must hold before a change is merged: format, lints, documentation, the build
# without default features, all tests. Installs what is missing, if it may.
set -euo pipefail
cd "$(dirname "$0")/.."

# Debian keeps the server's programs off the PATH.
has_postgres() {
  command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null
}

missing=()
has_postgres || missing+=(postgresql)
# In /usr/sbin, which is not on everybody's PATH.
[ -x /usr/sbin/pgbouncer ] || command -v pgbouncer >/dev/null || missing+=(pgbouncer)
command -v systemd-socket-activate >/dev/null || missing+=(systemd)
command -v promtool >/dev/null || missing+=(prometheus)
command -v curl >/dev/null || missing+=(curl)
command -v openssl >/dev/null || missing+=(openssl)
command -v cc >/dev/null || missing+=(gcc libc6-dev)
command -v strip >/dev/null || missing+=(binutils)
command -v mount >/dev/null || missing+=(mount)

if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests/run.sh: missing: ${missing[*]}" >&2
    echo "install them first, on Debian: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  # Another that runs, as on a machine that has just started, is waited for.
  wait_for_lock=(-o DPkg::Lock::Timeout=300)
  apt-get "${wait_for_lock[@]}" update -qq
  DEBIAN_FRONTEND=noninteractive apt-get "${wait_for_lock[@]}" install -y -qq --no-install-recommends "${missing[@]}"
fi

if ! command -v cargo >/dev/null; then
  echo "tests/run.sh: missing: cargo (see https://rustup.rs)" >&2
  exit 1
fi
if ! cargo fmt --version >/dev/null 2>&1 || ! cargo clippy --version >/dev/null 2>&1; then
  if ! command -v rustup >/dev/null; then
    echo "tests/run.sh: missing: rustfmt and clippy of this cargo (on Debian: apt-get install rustfmt rust-clippy)" >&2
    exit 1
  fi
  rustup component add rustfmt clippy
fi

# Most tests wait most of the time, for a program that they have started.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-$((2 * $(nproc)))}

step() {
  echo "==> $*"
  "$@"
}

step cargo fmt --check
step cargo clippy --locked --all-targets --all-features -- -D warnings
RUSTDOCFLAGS='-D warnings' step cargo doc --locked --no-deps --all-features
step cargo clippy --locked --no-default-features -- -D warnings
step cargo test --locked --no-default-features --lib
step cargo test --locked
