#!/usr/bin/env bash
# The package under a real systemd: a Debian tree is booted in a container of its own, without network and
# apart from this machine's systemd, the .deb is installed there, and README's commands are run as README
# has them. Prints a line for each check; exit status 1 if one failed. For root on Debian, with systemd-container
# and debootstrap; takes some minutes.
#   tests/systemd.sh [--deb FILE] [--cache DIRECTORY]
# Without --deb the package is built first. A tree that was made once is kept in the cache.
set -euo pipefail
export LC_ALL=C.UTF-8

source=$(cd "$(dirname "$0")/.." && pwd)
deb='' cache=''
while [ $# -gt 0 ]; do
  case $1 in
    --deb) deb=$(realpath "${2:?--deb: which?}"); shift 2 ;;
    --cache) cache=$(realpath --canonicalize-missing "${2:?--cache: where?}"); shift 2 ;;
    *) echo "tests/systemd.sh: unexpected argument $1" >&2; exit 2 ;;
  esac
done

fail() { echo "tests/systemd.sh: $*" >&2; exit 1; }
[ "$(id -u)" -eq 0 ] || fail 'only root can boot a container'
for needed in systemd-nspawn:systemd-container debootstrap:debootstrap nsenter:util-linux dpkg-deb:dpkg; do
  command -v "${needed%:*}" >/dev/null || fail "missing: ${needed%:*} (apt-get install ${needed#*:})"
done

work=$(mktemp -d)
machine=''
# Ends the container, and nothing else: by the number of the process that was started.
clean_up() {
  if [ -n "$machine" ] && kill -0 "$machine" 2>/dev/null; then
    kill -TERM "$machine" 2>/dev/null || true
    for _ in $(seq 100); do
      kill -0 "$machine" 2>/dev/null || break
      sleep 0.2
    done
    kill -KILL "$machine" 2>/dev/null || true
    wait "$machine" 2>/dev/null || true
  fi
  rm -rf --one-file-system "$work"
}
trap clean_up EXIT
trap 'exit 1' INT TERM

# --- The container -------------------------------------------------------------------------------

make_tree() {
  local release uri
  release=$(. /etc/os-release && echo "$VERSION_CODENAME")
  # From wherever this machine has its own packages.
  uri=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    awk -v release="$release" '$2 == release && $3 == "main" { print $1; exit }')
  [ -n "$uri" ] || fail "apt's sources have no main of $release"
  timeout 1200 debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,curl,procps \
    "$release" "$1.new" "$uri" >"$work/debootstrap.log" 2>&1 || { tail "$work/debootstrap.log"; fail debootstrap; }
  mv "$1.new" "$1"
}

boot() {
  local nspawn
  # An installer would have written it; without network nobody else knows the name.
  printf '127.0.0.1 localhost\n::1 localhost\n' >"$work/tree/etc/hosts"
  ln -sf /dev/null "$work/tree/etc/systemd/system/systemd-networkd-wait-online.service"
  SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 timeout --kill-after=30 1800 systemd-nspawn --quiet --register=no --keep-unit \
    --private-network --resolv-conf=off --directory="$work/tree" --boot </dev/null >"$work/boot.log" 2>&1 &
  machine=$!
  for _ in $(seq 300); do
    nspawn=$(cat "/proc/$machine/task/$machine/children" 2>/dev/null || true)
    [ -z "$nspawn" ] || leader=$(cat "/proc/${nspawn// /}/task/${nspawn// /}/children" 2>/dev/null || true)
    leader=${leader// /}
    if [ -n "$leader" ] && inside systemctl is-system-running 2>/dev/null | grep -Eq 'running|degraded'; then return; fi
    sleep 0.2
  done
  tail "$work/boot.log"
  fail 'the container does not come up'
}

leader=''
# As root there, in /, with nothing of this shell's environment.
inside() {
  timeout "${LIMIT:-90}" nsenter --target "$leader" --mount --uts --ipc --net --pid --root --wd \
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
    DEBIAN_FRONTEND=noninteractive SYSTEMD_COLORS=0 "$@"
}
shell() { inside sh -euc "cd /; $*"; }

# --- Checks --------------------------------------------------------------------------------------

failed=0
# check WHAT COMMAND...: the command is to succeed.
check() {
  local what=$1 output
  shift
  if output=$("$@" 2>&1); then
    echo "ok      $what"
  else
    failed=$((failed + 1))
    echo "FAILED  $what"
    sed 's/^/        | /' <<<"$output" | tail -n 25
  fi
}

# A command that is to fail, with a line that matches.
refuses() {
  local expected=$1 output
  shift
  if output=$("$@" 2>&1); then echo "succeeded: $output"; return 1; fi
  echo "$output"
  grep -Eq -- "$expected" <<<"$output"
}

# A command's output matches.
says() {
  local expected=$1 output
  shift
  output=$("$@" 2>&1) || { echo "$output"; return 1; }
  echo "$output"
  grep -Eq -- "$expected" <<<"$output"
}

says_not() {
  local expected=$1 output
  shift
  output=$("$@" 2>&1) || { echo "$output"; return 1; }
  echo "$output"
  ! grep -Eq -- "$expected" <<<"$output"
}

# Until a command succeeds. After an outage, what waits is tried again after up to half a minute, and more.
soon() {
  local output='' until=$((SECONDS + 120))
  while [ $SECONDS -lt $until ]; do
    if output=$("$@" 2>&1); then echo "$output"; return 0; fi
    sleep 0.2
  done
  echo "$output"
  return 1
}

# A command that README has, as it has it.
readme() {
  grep -Fq -- "$1" "$source/README.md" || { echo "not in README.md: $1"; return 1; }
  shell "$1"
}

# The block of commands number N of README's section.
readme_block() {
  local commands
  commands=$(awk -v number="$1" '
    /^### / { is_here = ($0 == "### Under systemd") }
    is_here && /^ *```$/ { fences++; next }
    is_here && fences == 2 * number - 1 { sub(/^ +/, ""); print }' "$source/README.md")
  [ -n "$commands" ] || { echo "README.md has no such block"; return 1; }
  shell "cd /root/asyncproxy; $commands"
}

property() { inside systemctl show --property="$1" --value "${2:-asyncproxy.service}"; }
has() { says "^($2)\$" property "$1" "${3:-asyncproxy.service}"; }
status() { inside curl --silent --show-error --fail --max-time 10 http://localhost:8081/status; }
post() { inside curl --silent --show-error --fail --max-time 20 --data x "http://localhost:8080/$1"; }
# What the destination has printed.
arrived() { inside journalctl --unit=destination --output=cat --grep="^POST /$1\$" --quiet; }
answers() { soon post "$1" && soon arrived "$1"; }
is_active() { inside systemctl is-active "${1:-asyncproxy.service}"; }
is_inactive() { ! is_active "$1"; }
setting() { shell "sed -i 's|^\\( *$1:\\).*|\\1 $2|' /etc/asyncproxy/config.yaml"; }
install_deb() { inside dpkg --force-confold --install /root/asyncproxy.deb; }
# Whatever comes of it: what is wanted of it is checked.
quietly() { "$@" >/dev/null 2>&1 || true; }
destination_starts() { quietly inside systemctl start destination; }
destination_stops() { quietly inside systemctl stop destination; }

by_hand() {
  check 'by hand, as README has it: runs' readme_block 1
  check 'by hand: a request is answered and delivered' answers by-hand
  quietly inside install -m 755 /root/asyncproxy/target/release/asyncproxy /usr/local/bin/
  inside dpkg --force-confold --install /root/asyncproxy.deb >"$work/told" 2>&1 || true
  check 'the package over it: is installed' inside test -x /usr/bin/asyncproxy
  check 'the package over it: says that its unit is not used' says 'system/asyncproxy.service is used instead' cat "$work/told"
  check 'the package over it: says that another program is found first' says '/usr/local/bin/asyncproxy hides' cat "$work/told"
  check 'the package over it: does not say that nothing runs' says_not 'not started' cat "$work/told"
  check 'the package over it: the service runs on' answers over
  check 'the package over it: its advice is sound' shell "$(sed -n 's/^  \(rm .*\)/\1/p' "$work/told")"
  quietly inside rm /usr/local/bin/asyncproxy
  check 'the package over it: then its unit is used' has FragmentPath '.*/lib/systemd/system/asyncproxy.service'
  check 'the package over it: and started with the machine' inside systemctl is-enabled asyncproxy
  check 'the package over it: and answers' answers after
}

removal() {
  quietly shell 'mkdir -p /etc/systemd/system/asyncproxy.service.d
    printf "[Service]\nEnvironment=SERVER_BIND=systemd:http METRICS_BIND=systemd:metrics\n" > /etc/systemd/system/asyncproxy.service.d/sockets.conf'
  quietly readme_block 2
  check 'removal: with sockets and a drop-in, before' answers before
  inside dpkg --remove asyncproxy >"$work/told" 2>&1 || true
  check 'removal: names the drop-in that is left' says 'sockets.conf is left' cat "$work/told"
  check 'removal: ends the service' refuses inactive is_active
  check 'removal: ends the sockets' refuses inactive is_active asyncproxy.socket
  check 'removal: nobody listens' refuses 'onnect' post nobody
  check 'removal: nothing has failed' says_not asyncproxy inside systemctl list-units --failed --no-legend
  check 'removal: keeps the settings' inside test -e /etc/asyncproxy/config.yaml
  install_deb >"$work/told" 2>&1 || true
  check 'installed again: says what the drop-in asks for' says 'sockets.conf asks for sockets' cat "$work/told"
  quietly inside systemctl enable --now --no-block asyncproxy
  check 'installed again: without sockets the error says which unit to start' \
    soon shell "journalctl -u asyncproxy -o cat | grep -F 'systemctl start asyncproxy.socket'"
  quietly inside systemctl start asyncproxy.socket asyncproxy-metrics.socket
  check 'installed again: and that helps' answers helped
  inside dpkg --purge asyncproxy >"$work/told" 2>&1 || true
  check 'purge: removes the settings' inside test ! -e /etc/asyncproxy
  check 'purge: leaves the queue, and says so' says 'private/asyncproxy may hold requests' cat "$work/told"
  check 'purge: the queue is there' inside test -e /var/lib/private/asyncproxy/asyncproxy.sqlite
  quietly inside rm -r /etc/systemd/system/asyncproxy.service.d /var/lib/private/asyncproxy /var/lib/asyncproxy
}

installation() {
  install_deb >"$work/told" 2>&1 || true
  check 'installed: says how to start it' says 'systemctl enable --now asyncproxy' cat "$work/told"
  check 'installed: is not started' refuses inactive is_active
  check 'installed: starts' readme 'systemctl enable --now asyncproxy'
  check 'installed: is active' is_active
  check 'installed: a request is answered and delivered' answers installed
  check 'installed: waits for no network' says_not network-online inside systemctl show --property=Wants,After asyncproxy
}

commands() {
  local place=$1
  check "commands, $place: queue status finds the service" says 'running for' readme 'asyncproxy queue status'
  check "commands, $place: pause" shell 'asyncproxy queue pause'
  check "commands, $place: the service is paused" soon says '"paused": ?true' status
  check "commands, $place: resume" shell 'asyncproxy queue resume'
  check "commands, $place: the service goes on" soon says '"paused": ?false' status
  check "commands, $place: doctor finds no error" shell 'asyncproxy doctor'
  check "commands, $place: nothing to migrate" shell 'asyncproxy migrate --status'
  check "commands, $place: no file is made in /" shell '! ls /*.sqlite* 2>/dev/null'
}

reloads() {
  setting enqueue_rate 90
  check 'reload: good settings' readme 'systemctl reload asyncproxy'
  check 'reload: are taken over' soon shell "journalctl -u asyncproxy -o cat | grep -F 'settings reloaded'"
  setting enqueue_rate many
  check 'reload: bad settings fail' refuses . inside systemctl reload asyncproxy
  check 'reload: the journal has the error of the check' \
    soon shell "journalctl -u asyncproxy -p err -o cat | grep '^asyncproxy: reload: .*enqueue_rate: must be'"
  check 'reload: /status shows it' soon says 'failed_reload":.*enqueue_rate: must be' status
  check 'reload: so does systemctl status' soon says 'Status:.*enqueue_rate: must be' inside systemctl status asyncproxy
  check 'reload: the service runs on' answers reloaded
  setting enqueue_rate 100
  check 'reload: good settings again' inside systemctl reload asyncproxy
  check 'reload: /status shows no error' soon says '"failed_reload": ?null' status
  check 'reload: nor does systemctl status' soon says_not 'enqueue_rate' property StatusText
}

# Posts over a connection each until FILE is there; prints those that got no answer.
load='while [ ! -e /run/load-over ]; do
  curl --silent --show-error --fail --max-time 60 --output /dev/null --data x http://localhost:8080/load && echo answered || echo REFUSED
done'
restarts_under_load() {
  local number loads=() all
  quietly inside rm -f /run/load-over
  for number in 1 2 3 4; do
    LIMIT=300 inside sh -c "$load" >"$work/load-$number" 2>&1 &
    loads+=($!)
  done
  for number in 1 2 3 4 5; do
    inside systemctl restart asyncproxy || echo 'REFUSED: no restart' >>"$work/load-1"
    all=$(cat "$work"/load-* | wc -l)
    for _ in $(seq 150); do
      [ "$(cat "$work"/load-* | wc -l)" -lt $((all + 50)) ] || break
      sleep 0.1
    done
  done
  quietly inside touch /run/load-over
  wait "${loads[@]}"
  sort "$work"/load-* | uniq -c
  ! grep -qv '^answered$' "$work"/load-* && [ "$(cat "$work"/load-* | wc -l)" -gt 200 ]
}

on_sockets() {
  check "$1: the socket is active" is_active asyncproxy.socket
  check "$1: that of the metrics is, too" is_active asyncproxy-metrics.socket
  check "$1: the service runs" is_active
  check "$1: a request is answered and delivered" answers "${2:?}"
}
on_its_own() {
  check "$1: there is no socket" refuses inactive is_active asyncproxy.socket
  check "$1: the service runs" is_active
  check "$1: a request is answered and delivered" answers "${2:?}"
}

sockets() {
  local pid
  pid=$(property MainPID)
  check 'sockets: enable --now while it runs is refused' refuses . inside systemctl enable --now asyncproxy.socket
  check 'sockets: and leaves the service running' has MainPID "$pid"
  check 'sockets: and answering' answers refused
  check 'sockets: switching, as README has it' readme_block 2
  on_sockets 'sockets, switched' switched
  check 'sockets: restarts under load refuse no connection' restarts_under_load
  quietly inside systemctl stop asyncproxy
  check 'sockets: who connects starts it' answers starts
  setting num_clients none
  quietly inside systemctl restart asyncproxy
  quietly inside curl --silent --max-time 20 --data x http://localhost:8080/waits
  check 'sockets: bad settings are not tried for ever by who waits' soon has Result trigger-limit-hit asyncproxy.socket
  setting num_clients 700
  check 'sockets: good ones start' inside systemctl restart asyncproxy
  on_sockets 'sockets, with good settings again' again
  check 'sockets: switching back, as README has it' readme_block 3
  on_its_own 'sockets, switched back' back
  quietly inside systemctl stop asyncproxy
  check 'sockets: enabled while it does not run' inside systemctl enable --now asyncproxy.socket asyncproxy-metrics.socket
  check 'sockets: then the service' inside systemctl start asyncproxy
  on_sockets 'sockets first' first
  setting bind :8080
  shell "sed -i '/^metrics:/,/bind:/s|bind:.*|bind: systemd:metrics,:8081|' /etc/asyncproxy/config.yaml"
  quietly inside systemctl restart --no-block asyncproxy
  check 'sockets: the error of settings that listen there themselves says what to write' \
    soon shell "journalctl -u asyncproxy -o cat | grep -F 'write server.bind: systemd:http,:8080 to take it'"
  check 'sockets: and the one that nobody takes is warned of' \
    soon shell "journalctl -u asyncproxy -p warning -o cat | grep -F 'systemd handed over the socket http'"
  shell "sed -i '/^server:/,/bind:/s|bind:.*|bind: systemd:http,:8080|' /etc/asyncproxy/config.yaml"
  check 'sockets: and that helps' soon is_active
  quietly readme_block 3
  on_its_own 'sockets, off at last' off
}

bad_settings() {
  setting num_clients none
  check 'bad settings: it does not start' refuses . inside systemctl restart asyncproxy
  check 'bad settings: exit status 2' has ExecMainStatus 2
  check 'bad settings: it is not tried again' has SubState failed
  setting num_clients 700
  check 'bad settings: good ones start' inside systemctl restart asyncproxy
  check 'bad settings: and answer' answers good
}

kills() {
  local pid
  pid=$(property MainPID)
  quietly inside kill -KILL "$pid"
  check 'kill -9: it is started again' soon shell "pid=\$(systemctl show -P MainPID asyncproxy); [ \$pid != 0 ] && [ \$pid != $pid ]"
  check 'kill -9: and answers' answers killed
}

credentials() {
  quietly shell 'umask 077
    printf sqlite:/var/lib/asyncproxy/of-the-credential.sqlite > /etc/asyncproxy/connection_string
    mkdir -p /etc/systemd/system/asyncproxy.service.d
    printf "[Service]\nLoadCredential=db.connection_string:/etc/asyncproxy/connection_string\n" > /etc/systemd/system/asyncproxy.service.d/credential.conf
    systemctl daemon-reload; systemctl restart asyncproxy'
  check 'credential: its store is used' soon says 'of-the-credential' status
  check 'credential: a request is answered and delivered' answers credential
  check 'credential: a reload has it' inside systemctl reload asyncproxy
  commands 'with a credential'
  check 'credential: commands with the file alone refuse' \
    refuses 'another store' shell 'cd /var/lib/asyncproxy && asyncproxy --config /etc/asyncproxy/config.yaml queue status'
  check 'credential: pause, too' \
    refuses 'another store' shell 'cd /var/lib/asyncproxy && asyncproxy --config /etc/asyncproxy/config.yaml queue pause'
  check 'credential: and nothing is paused' says '"paused": ?false' status
  quietly shell 'rm -r /etc/systemd/system/asyncproxy.service.d /etc/asyncproxy/connection_string
    systemctl daemon-reload; systemctl restart asyncproxy'
}

files_of_root() {
  quietly inside systemctl stop asyncproxy
  quietly shell 'rm /var/lib/asyncproxy/asyncproxy.sqlite*'
  check 'while it is stopped: root makes the file' \
    shell 'cd /var/lib/asyncproxy && asyncproxy --config /etc/asyncproxy/config.yaml migrate'
  check 'while it is stopped: queue status, as README has it' \
    readme 'cd /var/lib/asyncproxy && asyncproxy --config /etc/asyncproxy/config.yaml queue status'
  quietly inside systemctl start asyncproxy
  check "a file that root made: is the service's" \
    shell '[ $(stat -Lc %u /var/lib/asyncproxy/asyncproxy.sqlite) = $(stat -Lc %u /var/lib/asyncproxy) ]'
  destination_stops
  quietly post stored
  check 'a file that root made: a request is stored' soon says '^queue +1 waiting' shell 'asyncproxy queue status'
  destination_starts
  check 'a file that root made: and delivered' soon arrived stored
  check 'a file that root made: the store works' says '"store":\{"fault":null' status
}

journal() {
  check 'journal: warnings are there by priority' says 'level=(warn|error)' \
    inside journalctl _COMM=asyncproxy --priority=warning --output=cat
  check 'journal: and only they' shell \
    '! journalctl _SYSTEMD_UNIT=asyncproxy.service _COMM=asyncproxy -p warning -o cat | grep level=info'
  check 'journal: which are all' shell \
    '! journalctl _SYSTEMD_UNIT=asyncproxy.service _COMM=asyncproxy -p notice..debug -o cat | grep -E "level=(warn|error)"'
}

upgrade() {
  local pid
  destination_stops
  for number in 1 2 3; do quietly post "kept-$number"; done
  check 'upgrade: three requests wait' soon says '^queue +3 waiting' shell 'asyncproxy queue status'
  pid=$(property MainPID)
  check 'upgrade: the package is installed over itself' says_not 'not started|asks for' install_deb
  check 'upgrade: the service is another process' shell "[ \$(systemctl show -P MainPID asyncproxy) != $pid ]"
  check 'upgrade: and active' is_active
  check 'upgrade: what waited waits' soon says '^queue +3 waiting' shell 'asyncproxy queue status'
  destination_starts
  for number in 1 2 3; do check "upgrade: request $number is delivered" soon arrived "kept-$number"; done
}

# --- The whole -----------------------------------------------------------------------------------

if [ -z "$deb" ]; then
  "$source/dist/build.sh" --output "$work/dist" >/dev/null || fail 'the package cannot be built'
  deb=$(echo "$work"/dist/*.deb)
fi
if [ -n "$cache" ]; then mkdir -p "$cache"; else cache=$work; fi
[ -d "$cache/base" ] || make_tree "$cache/base"
cp -a --reflink=auto "$cache/base" "$work/tree"
cp "$deb" "$work/tree/root/asyncproxy.deb"
# What a build by hand leaves.
mkdir -p "$work/package" "$work/tree/root/asyncproxy/target/release"
dpkg-deb --extract "$deb" "$work/package"
cp "$work/package/usr/bin/asyncproxy" "$work/tree/root/asyncproxy/target/release/"
cp -r "$source/config.yaml" "$source/dist" "$work/tree/root/asyncproxy/"

cat >"$work/tree/etc/systemd/system/destination.service" <<'UNIT'
[Service]
ExecStart=/root/asyncproxy/target/release/asyncproxy sink
UNIT

boot
echo "Debian $(cat "$work/tree/etc/debian_version"), $(inside systemctl --version | head -n 1), $(inside /root/asyncproxy/target/release/asyncproxy --version)"
destination_starts
by_hand
removal
installation
commands 'beside DynamicUser'
reloads
sockets
bad_settings
kills
credentials
upgrade
journal
files_of_root
quietly inside dpkg --purge asyncproxy

if [ "$failed" -gt 0 ]; then
  echo "$failed failed"
  exit 1
fi
echo 'all is well'
