#!/usr/bin/env bash
# Measures what README's table of figures says, each beside its peer in the same run: the
# destination is nginx answering `return 200` from one worker, the load wrk with one thread, 64
# connections and bodies of 8.9 KB, and all share one machine.
# Needs nginx, wrk, curl, PostgreSQL and psql; as root it runs the server as user postgres.
# `bash benches/targets.sh [section ...]`: direct acknowledged drain latency work memory soak rest binary
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
directory=$(mktemp -d)
chmod 755 "$directory"
pids=()
running=
nginx_port=9130 mirror_port=9131 intake=127.0.0.1:9132 control=127.0.0.1:9133 postgres_port=9134
initdb=$(command -v initdb || compgen -G '/usr/lib/postgresql/*/bin/initdb' | tail -n 1)
pg_ctl=$(dirname "$initdb")/pg_ctl
as=()
if [ "$(id -u)" -eq 0 ]; then
  as=(runuser -u postgres --)
fi
clean() {
  kill $running "${pids[@]}" 2>/dev/null || true
  wait 2>/dev/null || true
  [ ! -d "$directory/cluster" ] ||
    "${as[@]}" "$pg_ctl" -D "$directory/cluster/data" -m immediate -s stop 2>/dev/null || true
  rm -rf "$directory"
}
trap clean EXIT

cargo build --release --bin asyncproxy
binary=${ASYNCPROXY:-$root/target/release/asyncproxy}
cargo bench --bench bare --no-run 2>/dev/null
bare=$(cargo bench --bench bare --no-run --message-format=json 2>/dev/null |
  sed -n 's/.*"executable":"\([^"]*bare[^"]*\)".*/\1/p' | tail -n 1)

# The peer passes on each request as it answers it; a static file cannot be POSTed, hence 405.
cat > "$directory/nginx.conf" <<CONF
worker_processes 1; daemon off; pid $directory/pid; error_log $directory/error.log crit;
events { worker_connections 8192; }
http {
  access_log off; client_body_buffer_size 16k; keepalive_requests 100000000;
  client_body_temp_path $directory/body; proxy_temp_path $directory/proxy;
  fastcgi_temp_path $directory/fastcgi; uwsgi_temp_path $directory/uwsgi; scgi_temp_path $directory/scgi;
  server { listen 127.0.0.1:$nginx_port backlog=4096; location / { return 200; } }
}
CONF
sed -e "s|$directory/|$directory/mirror-|" -e "s|server {.*|\
  upstream destination { server 127.0.0.1:$nginx_port; keepalive 64; keepalive_requests 100000000; }\n\
  server {\n\
    listen 127.0.0.1:$mirror_port backlog=4096; error_page 405 =200 @answer;\n\
    location / { mirror /mirror; }\n\
    location @answer { return 200; }\n\
    location = /mirror {\n\
      internal; proxy_pass http://destination\$request_uri;\n\
      proxy_http_version 1.1; proxy_set_header Connection '';\n\
    }\n\
  }|" "$directory/nginx.conf" > "$directory/mirror.conf"
cat > "$directory/post.lua" <<'LUA'
local text = {}
for i = 1, 890 do
  text[i] = string.char(97 + i % 26, 98 + i % 20, 34, 58, 48 + i % 10, 44, 32, 123, 65 + i % 26, 125)
end
wrk.method = "POST"
wrk.body = table.concat(text)
wrk.headers["Content-Type"] = "application/json"
wrk.headers["User-Agent"] = "GitHub-Hookshot/044aadd"
wrk.headers["X-GitHub-Event"] = "push"
LUA
nginx -c "$directory/nginx.conf" 2>/dev/null & pids+=($!); nginx_pid=$!
nginx -c "$directory/mirror.conf" & pids+=($!)
for port in "$nginx_port" "$mirror_port"; do
  until curl -s -o "$directory/ready" "http://127.0.0.1:$port/"; do sleep 0.02; done
done

# Loads port $1 for $2 seconds, and prints the requests a second.
load() { wrk -t1 -c64 -d"$2s" --latency -s "$directory/post.lua" "http://127.0.0.1:$1/hook"; }
per_second() { awk '/^Requests\/sec/ { print $2 }'; }
median() { sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'; }
row() { printf '%-44s %14s   %s\n' "$1" "$2" "$3"; }
ratio() { awk -v ours="$1" -v peer="$2" 'BEGIN { printf "%.2f x", ours / peer }'; }
thousands() { awk -v value="$1" 'BEGIN { printf "%.1f k/s", value / 1000 }'; }
metric() { curl -s "http://$control/metrics" | awk -v name="$1" '$1 == name { print $2 }'; }
memory() { awk -v kind="$1" '$1 == kind ":" { printf "%.1f", $2 / 1024 }' "/proc/$running/status"; }
requests() { awk '/requests in/ { print $1 }'; }

# Starts the program in $directory/run, with settings as environment variables.
start() {
  mkdir -p "$directory/run"
  cd "$directory/run"
  env PROXY_REMOTE_URL="http://127.0.0.1:$nginx_port" SERVER_BIND="$intake" METRICS_BIND="$control" LOG_LEVEL=warn "$@" \
    "$binary" --config "$root/config.yaml" 2>>"$directory/asyncproxy.log" & running=$!
  cd "$root"
  until curl -s -o "$directory/ready" "http://$control/readyz"; do sleep 0.02; done
}
stop() {
  kill "$running"
  wait "$running" || { echo "asyncproxy failed:"; tail "$directory/asyncproxy.log"; exit 1; } >&2
  running=
}
anew() { rm -rf "$directory/run"; }

query() { psql -qAt -h 127.0.0.1 -p "$postgres_port" -U postgres "$@"; }
# A new database; its connection string is in $db.
postgres() {
  if [ ! -d "$directory/cluster" ]; then
    mkdir "$directory/cluster"
    [ ${#as[@]} -eq 0 ] || chown postgres "$directory/cluster"
    "${as[@]}" "$initdb" -D "$directory/cluster/data" -U postgres --auth=trust >/dev/null
    "${as[@]}" "$pg_ctl" -D "$directory/cluster/data" -l "$directory/cluster/log" -s -w \
      -o "-p $postgres_port -c unix_socket_directories=$directory/cluster -c max_wal_size=4GB" start
  fi
  query -c 'DROP DATABASE IF EXISTS queue' -c 'CREATE DATABASE queue' 2>/dev/null
  db="host=127.0.0.1 port=$postgres_port user=postgres dbname=queue"
}

direct() {
  local round
  for round in 1 2 3 4 5; do
    load "$mirror_port" 4 | per_second >> "$directory/direct.mirror"
    anew
    start SERVER_ENQUEUE_RATE=1000000
    load 9132 4 >"$directory/load"
    metric asyncproxy_delivered_total | awk '{ print $1 / 4 }' >> "$directory/direct.ours"
    per_second < "$directory/load" >> "$directory/direct.answered"
    memory VmHWM >> "$directory/direct.memory"; echo >> "$directory/direct.memory"
    stop
  done
  local ours peer
  ours=$(median < "$directory/direct.ours") peer=$(median < "$directory/direct.mirror")
  row 'direct, delivered' "$(thousands "$ours")" "nginx mirror: $(thousands "$peer"), $(ratio "$ours" "$peer") (1.5 x)"
  row 'direct, answered' "$(thousands "$(median < "$directory/direct.answered")")" ''
  row 'direct, most memory' "$(median < "$directory/direct.memory") MB" '(60 MB)'
}

for section in "${@:-direct}"; do "$section"; done
