#!/bin/bash
# The figures of README and release notes, one JSON object a line: lateness under load and by protocol, registration one
# by one and in batches, drain, the wheel, memory with a million tasks, cost of idling, time to start. Needs the release
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
    "$BIN/boomerang" dev --data-dir "$folder" --tcp-addr 127.0.0.1:0 --http-addr 127.0.0.1:0 --peer-addr 127.0.0.1:0 \
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
"$BIN/boomtool" --json bench wheel --timers 1000000

echo "== a cluster of three: failover, and what it costs idle" >&2
"$BIN/boomtool" --json bench failover --kills 10 --pending 100000 --quiet
BIN="$BIN" scripts/idle.sh
