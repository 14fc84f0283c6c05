#!/bin/bash
# The figures of README and release notes, one JSON object a line: lateness under load and by protocol, registration one
# by one, in batches and with keys, drain, the wheel, memory with a million tasks, cost of idling, time to start; and on
# three nodes registration, lateness, drain and failover. Where tasks came twice the report says so. Needs the release
# build (`make bench` makes it) and nothing else to do on the machine. BIN names the folder of the binaries; RUNS repeats
# what varies.
set -euo pipefail

BIN=${BIN:?the folder with boomerang and boomtool}
RUNS=${RUNS:-3}
WORK=$(mktemp -d)
NODE=""
trap 'stop; rm -rf "$WORK"' EXIT

start() { # start <folder> [flags]: sets NODE and ADDR
    local folder=$1
    shift
    rm -f "$WORK/line"
    mkfifo "$WORK/line"
    "$BIN/boomerang" dev --data-dir "$folder" --tcp-addr 127.0.0.1:0 --http-addr 127.0.0.1:0 \
        "$@" >"$WORK/line" 2>"$WORK/log" &
    NODE=$!
    read -r LINE <"$WORK/line"
    ADDR=$(sed 's/.*"tcp":"\([^"]*\)".*/\1/' <<<"$LINE")
}

stop() {
    if [ -n "$NODE" ]; then
        kill "$NODE" 2>/dev/null || true
        wait "$NODE" 2>/dev/null || true
        NODE=""
    fi
}

rss_mib() { awk '/VmRSS/ {print int($2 / 1024)}' "/proc/$NODE/status"; }
cpu_ticks() { awk '{print $14 + $15}' "/proc/$NODE/stat"; }

bench() { "$BIN/boomtool" --addr "$ADDR" --json bench "$@"; }

echo "== time to start, empty folder and again (ms)" >&2
for _ in $(seq "$RUNS"); do
    begun=$(date +%s%N)
    start "$WORK/start"
    echo "{\"bench\":\"start\",\"ms\":$((($(date +%s%N) - begun) / 1000000))}"
    stop
done

echo "== idle: part of one core over 30 s, and memory" >&2
start "$WORK/idle"
sleep 5
before=$(cpu_ticks)
sleep 30
after=$(cpu_ticks)
hz=$(getconf CLK_TCK)
echo "{\"bench\":\"idle\",\"core_percent\":$(awk "BEGIN {print ($after - $before) * 100 / $hz / 30}"),\"rss_mib\":$(rss_mib)}"
stop

echo "== 20,000 tasks over 20 s with 100,000 pending" >&2
for run in $(seq "$RUNS"); do
    start "$WORK/fire$run"
    bench fire --tasks 20000 --spread 20s --pending 100000
    stop
done

echo "== registration" >&2
for run in $(seq "$RUNS"); do
    start "$WORK/register$run"
    bench register --tasks 500000 --connections 4 --inflight 1024 --keep --delay 1h
    stop
done

echo "== registration, 100 tasks in each request" >&2
for run in $(seq "$RUNS"); do
    start "$WORK/batch$run"
    bench register --tasks 500000 --connections 4 --inflight 16 --batch 100 --keep --delay 1h
    stop
done

echo "== the same with a deduplication key for each task" >&2
for run in $(seq "$RUNS"); do
    start "$WORK/keys$run"
    bench register --tasks 500000 --connections 4 --inflight 16 --batch 100 --keep --delay 1h --keys
    stop
done

echo "== 3,000,000 in batches of 100, without keys and with: 'slices' say whether it becomes slower" >&2
for keys in "" --keys; do
    start "$WORK/many$keys"
    # shellcheck disable=SC2086 # nothing is no flag
    bench register --tasks 3000000 --connections 4 --inflight 16 --batch 100 --keep --delay 1h $keys
    stop
    rm -rf "$WORK/many$keys"
done

for protocol in grpc http udp; do
    echo "== 20,000 tasks over 20 s by $protocol" >&2
    for run in $(seq "$RUNS"); do
        start "$WORK/$protocol$run"
        bench fire --tasks 20000 --spread 20s --protocol "$protocol"
        stop
    done
done

echo "== drain: all due at one instant" >&2
for run in $(seq "$RUNS"); do
    start "$WORK/drain$run"
    bench drain --tasks 100000
    stop
done

for where in "beyond the window:2h" "inside the window:20m"; do
    echo "== memory with 1,000,000 tasks ${where%%:*}" >&2
    start "$WORK/memory${where##*:}"
    bench register --tasks 1000000 --connections 4 --keep --delay "${where##*:}" >/dev/null
    loaded=$(rss_mib)
    sleep 30
    echo "{\"bench\":\"memory\",\"tasks\":1000000,\"where\":\"${where%%:*}\",\"rss_mib_at_once\":$loaded,\"rss_mib\":$(rss_mib)}"
    stop
    start "$WORK/memory${where##*:}"
    sleep 10
    echo "{\"bench\":\"memory\",\"tasks\":1000000,\"where\":\"${where%%:*}\",\"after\":\"restart\",\"rss_mib\":$(rss_mib)}"
    stop
done

echo "== the wheel alone" >&2
cargo bench --quiet -p boomerang --bench wheel -- --timers 1000000

# With a cluster of its own: started, waited for until each node leads its share, and stopped by each bench.
# What breaks a promise is told at the end, so that the other figures are there.
FAILED=0
three() { "$BIN/boomtool" --json bench "$@" --nodes 3 --quiet; }

echo "== a cluster of three: registration, 64 connections, one under way on each" >&2
for _ in $(seq "$RUNS"); do
    three register --tasks 100000 --connections 64 --inflight 1 --delay 1h
done

for under_way in 1 2; do
    echo "== a cluster of three: batches of 1,000, $under_way under way on each of 2 connections" >&2
    for _ in $(seq "$RUNS"); do
        three register --tasks 300000 --connections 2 --inflight "$under_way" --batch 1000 --delay 1h
    done
done

echo "== a cluster of three: 20,000 tasks over 20 s" >&2
for _ in $(seq "$RUNS"); do
    three fire --tasks 20000 --spread 20s || FAILED=1
done

echo "== a cluster of three: drain, 50,000 due at one instant" >&2
for _ in $(seq "$RUNS"); do
    three drain --tasks 50000 || FAILED=1
done

echo "== a cluster of three: failover, and what it costs idle" >&2
"$BIN/boomtool" --json bench failover --kills 10 --pending 100000 --quiet
BIN="$BIN" scripts/idle.sh
exit "$FAILED"
