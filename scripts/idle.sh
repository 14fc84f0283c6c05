#!/bin/bash
# What a cluster costs that has nothing to do: three nodes on this machine, SHARDS shards (64), SECONDS_MEASURED (20).
# Prints the processor time of all three as a percentage of one core. BIN is the folder of the binaries.
set -eu
SHARDS=${SHARDS:-64}
SECONDS_MEASURED=${SECONDS_MEASURED:-20}
READY_SECONDS=60
SETTLE_SECONDS=20
PORT=${PORT:-19810}
folder=$(mktemp -d)
pids=
trap 'kill $pids 2>/dev/null; wait; rm -rf "$folder"' EXIT
# One for the start lines of all: they wait for each other. Open for reading, too, so that opening waits for nobody.
mkfifo "$folder/lines"
exec 3<>"$folder/lines"

"$BIN/boomerang" certs --out "$folder/certs" --node node,127.0.0.1 >/dev/null
peers="1=127.0.0.1:$((PORT + 12)),2=127.0.0.1:$((PORT + 22)),3=127.0.0.1:$((PORT + 32))"
for node in 1 2 3; do
    "$BIN/boomerang" serve --node-id $node --data-dir "$folder/$node" --shards "$SHARDS" --peers "$peers" \
        --tcp-addr "127.0.0.1:$((PORT + node * 10))" --http-addr "127.0.0.1:$((PORT + node * 10 + 1))" \
        --peer-addr "127.0.0.1:$((PORT + node * 10 + 2))" --admin-password idle \
        --peer-cert "$folder/certs/node.pem" --peer-key "$folder/certs/node.key" --peer-ca "$folder/certs/ca.pem" \
        >&3 2>"$folder/$node.log" &
    pids="$pids $!"
done
for node in 1 2 3; do
    read -r -t "$READY_SECONDS" _ <&3 || { tail -n 1 "$folder"/*.log >&2; exit 1; }
done
# Leaders go where they belong meanwhile.
sleep "$SETTLE_SECONDS"

# In ticks of 10 ms.
used() {
    total=0
    for pid in $pids; do
        total=$((total + $(awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/$pid/stat")))
    done
    echo "$total"
}
before=$(used)
sleep "$SECONDS_MEASURED"
after=$(used)
awk -v ticks=$((after - before)) -v seconds="$SECONDS_MEASURED" -v shards="$SHARDS" \
    'BEGIN { printf "{\"measure\":\"idle\",\"nodes\":3,\"shards\":%d,\"percent_of_one_core\":%.1f}\n", shards, ticks / seconds }'
