#!/usr/bin/env bash
# Compares the acceptors with nginx answering `return 200` from one worker, under the same load
# of wrk: 64 connections, kept open and not, 8.9 KB bodies. Medians of 5 runs, in turns.
# Needs nginx and wrk. `bash benches/nginx.sh [seconds of each run]`
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-4}
directory=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; wait; rm -rf "$directory"' EXIT

cargo bench --bench discard --no-run
binary=$(cargo bench --bench discard --no-run --message-format=json 2>/dev/null |
  sed -n 's/.*"executable":"\([^"]*discard[^"]*\)".*/\1/p' | tail -n 1)

cat > "$directory/nginx.conf" <<CONF
worker_processes 1; daemon off; pid $directory/pid; error_log $directory/error.log;
events { worker_connections 4096; }
http {
  access_log off; client_body_buffer_size 16k; keepalive_requests 100000000;
  client_body_temp_path $directory/body; proxy_temp_path $directory/proxy;
  fastcgi_temp_path $directory/fastcgi; uwsgi_temp_path $directory/uwsgi; scgi_temp_path $directory/scgi;
  server { listen 127.0.0.1:9100 backlog=4096; location / { return 200; } }
}
CONF
for mode in keep-alive close; do
  cat > "$directory/$mode.lua" <<LUA
wrk.method = "POST"
wrk.body = string.rep("x", 8900)
wrk.headers["Connection"] = "$mode"
LUA
done

nginx -c "$directory/nginx.conf" 2>/dev/null & pids+=($!)
"$binary" builtin 127.0.0.1:9101 & pids+=($!)
"$binary" tiny_http 127.0.0.1:9102 & pids+=($!)
sleep 1

names=(nginx builtin tiny_http)
for mode in keep-alive close; do
  for _ in 1 2 3 4 5; do
    for index in 0 1 2; do
      wrk -t1 -c64 -d"${seconds}s" -s "$directory/$mode.lua" "http://127.0.0.1:910$index/hook" |
        awk '/^Requests\/sec/ { print $2 }' >> "$directory/$mode.${names[$index]}"
    done
  done
  base=$(sort -n "$directory/$mode.nginx" | sed -n 3p)
  for name in "${names[@]}"; do
    median=$(sort -n "$directory/$mode.$name" | sed -n 3p)
    awk -v mode="$mode" -v name="$name" -v median="$median" -v base="$base" \
      'BEGIN { printf "%-10s %-9s %8.0f requests/s  %.2f x nginx\n", mode, name, median, median / base }'
  done
done
