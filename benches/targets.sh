#!/usr/bin/env bash
# Measures what README's table of figures says, each beside its peer in the same run: the
# destination is nginx answering `return 200` from one worker, the load wrk with one thread, 64
# connections and bodies of 8.9 KB, and all share one machine.
# Needs nginx, wrk, curl, sqlite3, PostgreSQL and psql; as root it runs the server as user postgres.
# `bash benches/targets.sh [section ...]`: direct acknowledged drain latency work memory_at_rest rest binary soak
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
directory=$(mktemp -d)
chmod 755 "$directory"
pids=()
running=
nginx_port=9130 mirror_port=9131 intake=127.0.0.1:9132 control=127.0.0.1:9133 postgres_port=9134
answer_port=9135 kept_port=9136 slow_port=9137
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

# In this order: cargo bench builds the program, too, in the same place and with other options.
bare=$(cargo bench --bench bare --no-run --message-format=json 2>/dev/null |
  sed -n 's/.*"executable":"\([^"]*bare[^"]*\)".*/\1/p' | tail -n 1)
cargo build --release --bin asyncproxy
cp target/release/asyncproxy "$directory/asyncproxy"
binary=${ASYNCPROXY:-$directory/asyncproxy}

cat > "$directory/nginx.conf" <<CONF
worker_processes 1; daemon off; pid $directory/pid; error_log $directory/error.log;
events { worker_connections 8192; }
http {
  access_log off; client_body_buffer_size 16k; keepalive_requests 100000000;
  client_body_temp_path $directory/body; proxy_temp_path $directory/proxy;
  fastcgi_temp_path $directory/fastcgi; uwsgi_temp_path $directory/uwsgi; scgi_temp_path $directory/scgi;
  server { listen 127.0.0.1:$nginx_port backlog=4096; location / { return 200; } }
}
CONF
# The peer, as its documentation has it, and once more with connections that are kept.
cat > "$directory/mirror.conf" <<CONF
worker_processes 1; daemon off; pid $directory/mirror-pid; error_log $directory/mirror-error.log;
events { worker_connections 8192; }
http {
  access_log off; client_body_buffer_size 16k; keepalive_requests 100000000;
  client_body_temp_path $directory/mirror-body; proxy_temp_path $directory/mirror-proxy;
  fastcgi_temp_path $directory/mirror-fastcgi; uwsgi_temp_path $directory/mirror-uwsgi;
  scgi_temp_path $directory/mirror-scgi;
  upstream answer { server 127.0.0.1:$answer_port; keepalive 64; keepalive_requests 100000000; }
  upstream destination { server 127.0.0.1:$nginx_port; keepalive 64; keepalive_requests 100000000; }
  server { listen 127.0.0.1:$answer_port backlog=4096; location / { return 200; } }
  server {
    listen 127.0.0.1:$mirror_port backlog=4096;
    location / { mirror /mirror; proxy_pass http://127.0.0.1:$answer_port; }
    location = /mirror { internal; proxy_pass http://127.0.0.1:$nginx_port\$request_uri; }
  }
  server {
    listen 127.0.0.1:$kept_port backlog=4096;
    proxy_http_version 1.1; proxy_set_header Connection '';
    location / { mirror /mirror; proxy_pass http://answer; }
    location = /mirror { internal; proxy_pass http://destination\$request_uri; }
  }
}
CONF
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
head -c 8900 /dev/zero | tr '\0' x > "$directory/body.json"
nginx -c "$directory/nginx.conf" 2>/dev/null & pids+=($!)
nginx -c "$directory/mirror.conf" 2>/dev/null & pids+=($!)
for port in "$nginx_port" "$mirror_port"; do
  until curl -s -o "$directory/ready" "http://127.0.0.1:$port/"; do sleep 0.02; done
done

# Loads port $1 for $2 seconds, and prints the requests a second.
load() { wrk -t1 -c64 -d"$2s" --latency -s "$directory/post.lua" "http://127.0.0.1:$1/hook"; }
per_second() { awk '/^Requests\/sec/ { print $2 }'; }
median() { sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'; }
row() { printf '| %s | %s | %s | %s |\n' "$1" "$2" "$3" "${4:-}"; }
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
  until curl -s -o "$directory/ready" "http://$control/readyz"; do
    kill -0 "$running" || fail
    sleep 0.02
  done
}
stop() {
  kill "$running"
  wait "$running" || fail
  running=
}
fail() {
  tail "$directory/asyncproxy.log" >&2
  exit 1
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


# Loads the program for $1 seconds and prints what was delivered a second. What is in memory when
# the load ends is not counted.
delivered() {
  load 9132 "$1" > "$directory/load"
  metric asyncproxy_delivered_total | awk -v seconds="$1" '{ print $1 / seconds }'
}
most_memory() { echo "$(memory VmHWM)" >> "$directory/memory"; }

direct() {
  local round ours peer kept
  for round in 1 2 3 4 5; do
    load "$mirror_port" 4 | per_second >> "$directory/direct.mirror"
    load "$kept_port" 4 | per_second >> "$directory/direct.kept"
    anew
    start SERVER_ENQUEUE_RATE=1000000
    delivered 4 >> "$directory/direct.ours"
    most_memory
    stop
    anew; postgres
    start SERVER_ENQUEUE_RATE=1000000 SERVER_ACK=stored DB_CONNECTION_STRING="$db"
    delivered 4 >> "$directory/direct.stored"
    most_memory
    stop
  done
  ours=$(median < "$directory/direct.ours") peer=$(median < "$directory/direct.mirror")
  kept=$(median < "$directory/direct.kept")
  row 'direct, delivered' "$(thousands "$ours")" '1.5 x mirror' \
    "nginx mirror $(thousands "$peer"): $(ratio "$ours" "$peer"); tuned $(thousands "$kept"): $(ratio "$ours" "$kept")"
  row 'ack: stored on Postgres, delivered' "$(thousands "$(median < "$directory/direct.stored")")" '6 k/s' ''
}

# A new database of kind $1; its settings are in $settings, what `bare` calls it in $store.
database() {
  anew
  case $1 in
    SQLite) settings=() store=$directory/run/asyncproxy.sqlite ;;
    Postgres) postgres; settings=("DB_CONNECTION_STRING=$db") store=$db ;;
  esac
}

acknowledged() {
  local kind round ours peer half
  for kind in SQLite Postgres; do
    for round in 1 2 3 4 5; do
      database "$kind"
      start "${settings[@]}"; stop
      "$bare" append "$store" 3 8900 >> "$directory/$kind.bare"
      database "$kind"
      start "${settings[@]}" SERVER_ENQUEUE_RATE=0 QUEUE_HANDLE_PER_SECOND=1
      load 9132 4 | per_second >> "$directory/$kind.ours"
      most_memory
      stop
    done
    ours=$(median < "$directory/$kind.ours") peer=$(median < "$directory/$kind.bare")
    row "stored in $kind, acknowledged" "$(thousands "$ours")" '0.6 x bare' \
      "bare inserts $(thousands "$peer"): $(ratio "$ours" "$peer")"
    half=$(awk -v ours="$ours" 'BEGIN { printf "%d", ours / 2 }')
    for round in 1 2 3 4 5; do
      database "$kind"
      start "${settings[@]}" SERVER_ENQUEUE_RATE=0 QUEUE_HANDLE_PER_SECOND=1
      open_loop "$half" 4 >> "$directory/$kind.p99"
      stop
    done
    row "stored in $kind, p99 at half that" "$(median < "$directory/$kind.p99") ms" '25 ms' ''
  done
}

# The p99 of the answers, in ms, to $1 requests a second for $2 seconds.
open_loop() {
  "$binary" bench --url "http://$intake/hook" --rate "$1" --duration "$2s" --body "$directory/body.json" \
    > "$directory/bench" || true
  awk '$1 == "99" { print $3 }' "$directory/bench"
}

# The percentage of the $2 requests that were answered within $1 seconds.
within() {
  curl -s "http://$control/metrics" | awk -v le="$1" -v admission="$2" '
    $1 == "asyncproxy_answer_seconds_bucket{admission=\"" admission "\",le=\"" le "\"}" { within = $2 }
    $1 == "asyncproxy_answer_seconds_count{admission=\"" admission "\"}" { all = $2 }
    END { printf "%.2f\n", within / all * 100 }'
}

# $1 rows of $2 bytes in the Postgres database, due. Ids grow with time, as those of the program do.
fill() {
  query queue -c "
    INSERT INTO proxy_requests (id, received_at, next_attempt_at, attempt, method, target, headers, body)
    SELECT (lpad(to_hex(1700000000000 + number), 12, '0') || '70008' || left(md5(number::text), 15))::uuid,
           now(), now() - interval '1 hour' + number * interval '1 ms', 0, 'POST', '/hook',
           '', decode(repeat('78', $2), 'hex')
      FROM generate_series(1, $1) AS number" -c 'VACUUM ANALYZE proxy_requests' -c CHECKPOINT
}

# The seconds it takes the program, from its start, to deliver $1 rows; settings follow.
drained() {
  local rows=$1 begun
  shift
  begun=$(date +%s.%N)
  start QUEUE_HANDLE_PER_SECOND=1000000 "$@"
  until [ "$(metric asyncproxy_delivered_total)" = "$rows" ]; do sleep 0.05; done
  awk -v begun="$begun" -v ended="$(date +%s.%N)" 'BEGIN { print ended - begun }'
}

drain() {
  local round ours peer
  for round in 1 2 3 4 5; do
    database Postgres
    start "${settings[@]}"; stop
    fill 40000 8900
    "$bare" drain "$store" >> "$directory/drain.bare"
    database Postgres
    start "${settings[@]}"; stop
    fill 40000 8900
    drained 40000 "${settings[@]}" > "$directory/drained"
    awk '{ print 40000 / $1 }' "$directory/drained" >> "$directory/drain.ours"
    most_memory
    stop
  done
  ours=$(median < "$directory/drain.ours") peer=$(median < "$directory/drain.bare")
  row 'drained from Postgres, delivered' "$(thousands "$ours")" '8 k/s, 0.6 x bare' \
    "bare claims and deletes $(thousands "$peer"): $(ratio "$ours" "$peer")"
}

latency() {
  local round
  "$binary" sink --bind "127.0.0.1:$slow_port" --delay 1s > /dev/null & pids+=($!)
  for round in 1 2 3 4 5; do
    anew
    start SERVER_ENQUEUE_RATE=1000000 PROXY_REMOTE_URL="http://127.0.0.1:$slow_port"
    open_loop 2000 5 >> "$directory/latency"
    for admission in direct stored; do
      within 0.002 "$admission" >> "$directory/latency.$admission"
    done
    most_memory
    stop
  done
  row 'direct, answered in 2 ms at 2,000/s, destination takes 1 s' "$(median < "$directory/latency.direct") %" '99 %' \
    "of those stored $(median < "$directory/latency.stored") %; p99 of all, as the sender sees it: $(median < "$directory/latency") ms"
}

work() {
  local kind rows round few many
  for kind in SQLite Postgres; do
    for rows in 100000 1000000; do
      database "$kind"
      start "${settings[@]}"; stop
      case $kind in
        SQLite) fill_sqlite "$rows" 200 ;;
        Postgres) fill "$rows" 200 ;;
      esac
      drained "$rows" "${settings[@]}" > "$directory/$rows"
      most_memory
      stop
    done
    few=$(cat "$directory/100000") many=$(cat "$directory/1000000")
    row "1,000,000 rows drained from $kind" "$(printf '%.1f s' "$many")" '12 x 100,000 rows' \
      "$(printf '%.1f s' "$few"): $(ratio "$many" "$few")"
  done
  for round in 1 2 3 4 5; do
    for rows in 64 700; do
      anew
      start SERVER_ENQUEUE_RATE=1000000 PROXY_NUM_CLIENTS="$rows"
      delivered 4 >> "$directory/workers.$rows"
      stop
    done
  done
  few=$(median < "$directory/workers.64") many=$(median < "$directory/workers.700")
  row 'direct with 700 workers, delivered' "$(thousands "$many")" '0.85 x 64 workers' \
    "64 workers $(thousands "$few"): $(ratio "$many" "$few")"
}

# As `fill`, in the SQLite file.
fill_sqlite() {
  sqlite3 "$store" "
    INSERT INTO proxy_requests (id, received_at, next_attempt_at, attempt, method, target, headers, body)
    SELECT CAST(printf('%016x', value) AS BLOB), 1, 1 + value, 0, 'POST', '/hook', x'', randomblob($2) FROM generate_series(1, $1)"
}

memory_at_rest() {
  anew
  start PROXY_NUM_CLIENTS=16 QUEUE_WORKERS=4
  curl -s -d body "http://$intake/hook"; sleep 2
  row 'memory at rest, num_clients: 16, workers: 4' "$(memory VmRSS) MB" '6 MB' ''
  stop
  anew
  start
  curl -s -d body "http://$intake/hook"; sleep 2
  row 'memory at rest, as shipped' "$(memory VmRSS) MB" '16 MB' ''
  stop
}

soak() {
  local requests=0 early= descriptors
  anew
  start SERVER_ENQUEUE_RATE=1000000 QUEUE_HANDLE_PER_SECOND=1000000
  while [ "$requests" -lt 3000000 ]; do
    load 9132 5 > "$directory/load"
    requests=$((requests + $(requests < "$directory/load")))
    if [ -z "$early" ] && [ "$requests" -ge 300000 ]; then
      sleep 12
      early=$(memory VmRSS) descriptors=$(ls "/proc/$running/fd" | wc -l)
    fi
  done
  sleep 12
  row "memory after $requests requests" "$(memory VmRSS) MB" 'as after 300,000' "$early MB"
  row 'descriptors then' "$(ls "/proc/$running/fd" | wc -l)" 'as after 300,000' "$descriptors"
  most_memory
  stop
}

rest() {
  local kind ticks
  for kind in SQLite Postgres; do
    database "$kind"
    start "${settings[@]}"
    curl -s -d body "http://$intake/hook"; sleep 5
    ticks() { awk '{ print $14 + $15 }' "/proc/$running/stat"; }
    switches() { cat "/proc/$running/task/"*/status | awk '/ctxt_switches/ { all += $2 } END { print all }'; }
    local from woken
    from=$(ticks) woken=$(switches); sleep 60
    row "CPU at rest, $kind" "$(awk -v from="$from" -v to="$(ticks)" -v hz="$(getconf CLK_TCK)" \
      'BEGIN { printf "%.2f %%", (to - from) / hz / 60 * 100 }')" '0.2 %' \
      "$(awk -v from="$woken" -v to="$(switches)" 'BEGIN { printf "%.1f wake-ups a second", (to - from) / 60 }')"
    stop
  done
}

binary() {
  local round
  row 'program' "$(awk -v bytes="$(stat -c %s "$binary")" 'BEGIN { printf "%.2f MB", bytes / 1e6 }')" '6 MB' ''
  for round in 1 2 3 4 5; do
    anew; mkdir "$directory/run"; cd "$directory/run"
    local begun
    begun=$(date +%s%N)
    env LOG_LEVEL=warn SERVER_BIND="$intake" METRICS_BIND="$control" "$binary" --config "$root/config.yaml" 2>>"$directory/asyncproxy.log" & running=$!
    until curl -s -o "$directory/ready" -d body "http://$intake/hook"; do :; done
    echo $((($(date +%s%N) - begun) / 1000000)) >> "$directory/begun"
    cd "$root"
    stop
  done
  row 'from start to the first answer' "$(median < "$directory/begun") ms" '50 ms' ''
}

row 'what' 'reached' 'target' 'in the same run'
for section in "${@:-direct acknowledged drain latency work memory_at_rest rest binary soak}"; do
  for name in $section; do "$name"; done
done
[ ! -s "$directory/memory" ] || row 'most memory under these loads' "$(sort -n "$directory/memory" | tail -n 1) MB" '60 MB' ''
