#!/usr/bin/env bash
# Drains rows of 2 KB from Postgres to nginx answering `return 200`, once as ever and once while
# another session holds an old snapshot, which keeps Postgres from cleaning up behind the queue.
# Needs PostgreSQL, psql, nginx and curl; as root it runs the server as user postgres.
# `bash benches/drain.sh [rows]`
set -euo pipefail
cd "$(dirname "$0")/.."
rows=${1:-200000}
directory=$(mktemp -d)
pids=()
running=
initdb=$(command -v initdb || compgen -G '/usr/lib/postgresql/*/bin/initdb' | tail -n 1)
pg_ctl=$(dirname "$initdb")/pg_ctl
as=()
if [ "$(id -u)" -eq 0 ]; then
  as=(runuser -u postgres --)
  chown postgres "$directory"
fi
clean() {
  kill "${pids[@]}" $running 2>/dev/null || true
  "${as[@]}" "$pg_ctl" -D "$directory/data" -m immediate -s stop || true
  rm -rf "$directory"
}
trap clean EXIT

cargo build --release
binary=$PWD/target/release/asyncproxy

"${as[@]}" "$initdb" -D "$directory/data" -U postgres --auth=trust >/dev/null
"${as[@]}" "$pg_ctl" -D "$directory/data" -l "$directory/log" -s -w \
  -o "-p 9120 -c unix_socket_directories=$directory" start
cat > "$directory/nginx.conf" <<CONF
worker_processes 1; daemon off; pid $directory/pid; error_log $directory/error.log;
events { worker_connections 4096; }
http {
  access_log off; client_body_buffer_size 16k; keepalive_requests 100000000;
  client_body_temp_path $directory/body; proxy_temp_path $directory/proxy;
  fastcgi_temp_path $directory/fastcgi; uwsgi_temp_path $directory/uwsgi; scgi_temp_path $directory/scgi;
  server { listen 127.0.0.1:9121; location / { return 200; } }
}
CONF
nginx -c "$directory/nginx.conf" 2>/dev/null & pids+=($!)

query() { psql -qAt -h 127.0.0.1 -p 9120 -U postgres "$@"; }
start() {
  DB_CONNECTION_STRING="host=127.0.0.1 port=9120 user=postgres dbname=$1" QUEUE_HANDLE_PER_SECOND=$2 \
    PROXY_REMOTE_URL=http://127.0.0.1:9121 SERVER_BIND=127.0.0.1:9122 METRICS_BIND=127.0.0.1:9123 \
    "$binary" --config config.yaml 2>>"$directory/asyncproxy.log" & running=$!
}
stop() {
  kill "$running"
  wait "$running"
  running=
}
delivered() {
  curl -s http://127.0.0.1:9123/metrics | awk '$1 == "asyncproxy_delivered_total" { print $2 }'
}

for mode in plain snapshot; do
  query -c "CREATE DATABASE $mode"
  # Creates the tables.
  start "$mode" 1; sleep 2; stop
  query "$mode" -c "
    INSERT INTO proxy_requests (id, received_at, next_attempt_at, attempt, method, target, headers, body)
    SELECT (lpad(to_hex(1700000000000 + number), 12, '0') || '70008' || left(md5(number::text), 15))::uuid,
           now(), now() - interval '1 hour' + number * interval '1 ms', 0, 'POST', '/hook',
           '', decode(repeat('78', 2000), 'hex')
      FROM generate_series(1, $rows) AS number" -c 'VACUUM ANALYZE proxy_requests' -c CHECKPOINT
  if [ "$mode" = snapshot ]; then
    # Open until this script ends.
    exec 3> >(query "$mode" >/dev/null)
    echo 'BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM proxy_requests;' >&3
    sleep 1
  fi
  begun=$(date +%s.%N)
  start "$mode" 1000000
  until [ "$(delivered || true)" = "$rows" ]; do sleep 0.1; done
  awk -v mode="$mode" -v rows="$rows" -v begun="$begun" -v ended="$(date +%s.%N)" \
    'BEGIN { printf "%-9s %7.0f rows/s\n", mode, rows / (ended - begun) }'
  stop
done
