#!/bin/sh
# A cluster on this machine: etcd and NODES nodes, everything it writes in one folder. `make cluster` runs it.
#
#   scripts/cluster.sh up      start what does not run yet, and wait until it is ready
#   scripts/cluster.sh down    stop everything; the data stays
#   scripts/cluster.sh status  what runs
#
# BIN is the folder of the binaries, FOLDER where data, logs and process ids are, NODES how many nodes.
set -eu
cd "$(dirname "$0")/.."
FOLDER=${FOLDER:-.boomerang-cluster}
NODES=${NODES:-3}
ETCD_PORT=${ETCD_PORT:-23790}
READY_SECONDS=60
PASSWORD=${BOOMERANG_ADMIN_PASSWORD:-boomerang}

# Whether the process of a pid file is still the one that was started.
runs() {
    pid_file="$FOLDER/$1.pid"
    [ -f "$pid_file" ] || return 1
    pid=$(cat "$pid_file")
    [ -r "/proc/$pid/cmdline" ] && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q "$FOLDER/$1"
}

# name, command...: in the background, its output in the log folder.
start() {
    name=$1
    shift
    if runs "$name"; then
        echo "$name runs already"
        return
    fi
    nohup "$@" >"$FOLDER/$name.out" 2>>"$FOLDER/logs/$name.log" </dev/null &
    echo $! >"$FOLDER/$name.pid"
}

address() {
    echo "127.0.0.1:$((9963 + $1 * 10 + $2))"
}

up() {
    command -v etcd >/dev/null || { echo "etcd is missing: run 'make setup'" >&2; exit 1; }
    mkdir -p "$FOLDER/logs"
    start etcd etcd --name cluster --data-dir "$FOLDER/etcd" \
        --listen-client-urls "http://127.0.0.1:$ETCD_PORT" --advertise-client-urls "http://127.0.0.1:$ETCD_PORT" \
        --listen-peer-urls "http://127.0.0.1:$((ETCD_PORT + 1))"
    number=1
    while [ "$number" -le "$NODES" ]; do
        start "node-$number" "$BIN/boomerang" serve --node-id "$number" --data-dir "$FOLDER/node-$number" \
            --tcp-addr "$(address "$number" 0)" --http-addr "$(address "$number" 1)" \
            --peer-addr "$(address "$number" 2)" --etcd "http://127.0.0.1:$ETCD_PORT" \
            --bootstrap-expect "$NODES" --admin-password "$PASSWORD"
        number=$((number + 1))
    done
    waited=0
    number=1
    while [ "$number" -le "$NODES" ]; do
        # The start line is printed when the node is ready.
        until [ -s "$FOLDER/node-$number.out" ]; do
            if ! runs "node-$number"; then
                echo "node $number has ended; its log says:" >&2
                tail -n 3 "$FOLDER/logs/node-$number.log" >&2
                exit 1
            fi
            [ "$waited" -lt "$((READY_SECONDS * 5))" ] || { echo "node $number is not ready after $READY_SECONDS s" >&2; exit 1; }
            waited=$((waited + 1))
            sleep 0.2
        done
        echo "node $number is ready: $(cat "$FOLDER/node-$number.out")"
        number=$((number + 1))
    done
    cat <<TEXT

Logs are in $FOLDER/logs. Try it (the password of 'admin' is '$PASSWORD'):
  export BOOMERANG_ADDR=$(address 1 0),$(address 2 0),$(address 3 0) BOOMERANG_CLIENT=admin BOOMERANG_PASSWORD=$PASSWORD
  $BIN/boomtool cluster status
  $BIN/boomtool listen --tcp 127.0.0.1:9000 --count 1 &
  $BIN/boomtool task register 'hello from a cluster' --in 3s --callback tcp://127.0.0.1:9000
  kill -9 \$(cat $FOLDER/node-1.pid)     # and register again: two of three are enough
  make cluster                           # starts what does not run
  make cluster-down
TEXT
}

# Nodes first, side by side, then etcd.
down() {
    names=$(cd "$FOLDER" 2>/dev/null && ls -- node-*.pid 2>/dev/null | sed 's/\.pid$//' || true)
    for name in $names; do
        if runs "$name"; then kill "$(cat "$FOLDER/$name.pid")"; fi
    done
    for name in $names etcd; do
        if [ "$name" = etcd ] && runs etcd; then kill "$(cat "$FOLDER/etcd.pid")"; fi
        waited=0
        while runs "$name"; do
            [ "$waited" -lt 150 ] || { echo "$name does not stop" >&2; exit 1; }
            waited=$((waited + 1))
            sleep 0.2
        done
        rm -f "$FOLDER/$name.pid" "$FOLDER/$name.out"
    done
    echo "stopped; the data is in $FOLDER"
}

status() {
    for file in "$FOLDER"/*.pid; do
        [ -f "$file" ] || { echo "nothing runs"; return; }
        name=$(basename "$file" .pid)
        if runs "$name"; then echo "$name runs, process $(cat "$file")"; else echo "$name does not run"; fi
    done
}

case "${1:-}" in
up | down | status) "$1" ;;
*)
    echo "usage: $0 up|down|status" >&2
    exit 2
    ;;
esac
