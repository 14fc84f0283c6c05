#!/bin/sh
# Whether the README's commands work on a machine that has nothing. `make fresh` runs it.
#
# Makes a bare root of Debian with debootstrap: the smallest base, ca-certificates and make. Puts the work tree there as it
# is, binds this machine's Rust toolchain and the sources of the crates in, and runs `make setup`, which must have nothing
# left to do afterwards, and then the build scripts of all dependencies. RocksDB's own sources are not compiled: that takes
# fourteen minutes and needs nothing but the C++ compiler, which is tried by itself. FULL=1 goes on without a network:
# `make run` up to its first callback, and `make test`.
#
# Needs root, for mounts and chroot; namespaces; git; cargo as rustup installs it; 3 GB of disk, with FULL=1 20 GB; and a
# mirror of Debian, the one that apt uses unless MIRROR names another. debootstrap is installed if it is missing.
#
# What it leaves behind: debootstrap, sources of crates in cargo's registry, and a copy of the bare root, as debootstrap made
# it, which is made anew after KEPT_DAYS. All else is in a folder beside that copy, deleted at the end, and in namespaces of
# its own, so that no mount and no process outlives it. The set-up always begins in a fresh root and results of build
# scripts are never carried over, or it would hide what it is for.
set -eu
cd "$(dirname "$0")/.."
SUITE=bookworm
KEPT_DAYS=14
case ${FULL:-0} in 0) FULL="" DISK_GB=3 ;; *) FULL=yes DISK_GB=20 ;; esac
READY_SECONDS=60
CALLBACK_SECONDS=30

fail() { # fail <what> [more lines]
    printf 'error: %s\n' "$1" >&2
    shift
    for line in "$@"; do printf '       %s\n' "$line" >&2; done
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

# ---- Outside: on the machine as it is

# The one apt uses for this suite; it may be the only one that can be reached.
mirror() {
    if has apt-get; then
        apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT) $(IDENTIFIER)' 2>/dev/null |
            awk -v suite="$SUITE" '$1 ~ /^http/ && $2 == suite && $3 == "main" && $4 == "Packages" { print $1; exit }'
    fi
}

# How apt gets there, and what it must overlook: a mirror that stands still has dates that have passed.
apt_settings() {
    if has apt-config; then apt-config dump Acquire | grep -iE '::Proxy|::Check-|::Verify-' || true; fi
}

# Runs a command in namespaces that end with it or with this script. In the background, because only `wait` lets a signal
# be answered at once.
child=""
apart() {
    unshare --mount --propagation private --pid --fork --kill-child -- "$@" &
    child=$!
    ended=0
    wait "$child" || ended=$?
    child=""
    return "$ended"
}

end() {
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        # Not by a signal that unshare would wait with: its first process dies with it, and all others with that one.
        kill -KILL "$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    # Which may take them a moment, in which they still make files. No mount is seen from here.
    tries=0
    until rm -rf --one-file-system "$folder" 2>/dev/null; do
        tries=$((tries + 1))
        [ "$tries" -lt 50 ] || fail "cannot delete $folder"
        sleep 0.2
    done
}

keep_bare() {
    if [ -n "$(find "$bare" -mtime "-$KEPT_DAYS" 2>/dev/null)" ]; then return; fi
    if ! has debootstrap; then
        has apt-get || fail "debootstrap is missing, and there is no apt-get to install it"
        echo "Installing: debootstrap"
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends debootstrap
    fi
    echo "Making a bare root of Debian $SUITE from $mirror"
    proxy=""
    if has apt-config; then eval "$(apt-config shell proxy Acquire::http::Proxy)"; fi
    if [ -z "${http_proxy:-}" ] && [ "${proxy:-DIRECT}" != DIRECT ]; then proxy="http_proxy=$proxy"; else proxy=""; fi
    if ! apart env ${proxy:+"$proxy"} debootstrap --variant=minbase --include=ca-certificates,make "$SUITE" "$folder/bare" \
        "$mirror" >"$folder/log" 2>&1; then
        tail -n 20 "$folder/log" >&2
        fail "debootstrap cannot make a bare root from $mirror" "MIRROR=http://... make fresh takes another mirror"
    fi
    rm -f "$folder"/bare/var/cache/apt/archives/*.deb
    tar --one-file-system -C "$folder/bare" -cf "$folder/bare.tar" .
    rm -rf --one-file-system "$folder/bare"
    mv "$folder/bare.tar" "$bare"
}

outside() {
    as_root='sudo env "PATH=$PATH" "HOME=$HOME" make fresh'
    [ "$(id -u)" = 0 ] || fail "a bare root is made by root only:" "$as_root"
    PATH=$PATH:/usr/sbin:/sbin
    umask 022
    has git || fail "git is missing, which says what belongs to the work tree"
    if ! has cargo || ! has rustc; then
        fail "there is no cargo: install Rust with rustup (https://rustup.rs)" "or, if another user has it: $as_root"
    fi
    TOOLCHAIN=$(rustc --print sysroot)
    [ -x "$TOOLCHAIN/bin/cargo" ] || fail "no cargo in $TOOLCHAIN: a whole toolchain is needed, as rustup installs it"
    CARGO_HOME=${CARGO_HOME:-$HOME/.cargo}
    export TOOLCHAIN CARGO_HOME FULL

    cache=${XDG_CACHE_HOME:-$HOME/.cache}/boomerang
    mkdir -p "$cache"
    why=$(unshare --mount --propagation private --pid --fork -- mount --bind "$cache" "$cache" 2>&1) ||
        fail "no namespaces and mounts can be made here: $why" \
            "a container needs CAP_SYS_ADMIN for them, which docker run --privileged gives"
    # Whatever is started inherits the lock, so it is free when the last process of a run is gone. One that was killed
    # could not clear up.
    exec 9<"$cache"
    flock -n 9 || fail "another make fresh is running"
    rm -rf --one-file-system "$cache"/fresh.*
    free=$(df -Pk "$cache" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$DISK_GB" ] || fail "no space: $DISK_GB GB are needed in $cache, $free GB are free" \
        "XDG_CACHE_HOME=... make fresh takes another folder"

    folder=$(mktemp -d "$cache/fresh.XXXXXX")
    trap end EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap 'exit 129' HUP
    mirror=${MIRROR:-$(mirror)}
    mirror=${mirror:-http://deb.debian.org/debian}
    bare=$cache/bare-$SUITE.tar
    keep_bare

    root=$folder/root
    mkdir "$root"
    tar -C "$root" -xf "$bare" || fail "cannot unpack $bare; if it is broken, delete it"
    # The machine's own: its way to the network, and whom it trusts there.
    echo "deb $mirror $SUITE main" >"$root/etc/apt/sources.list"
    apt_settings >"$root/etc/apt/apt.conf.d/99machine"
    for file in /etc/resolv.conf /etc/hosts; do
        if [ -e "$file" ]; then cp -L --remove-destination "$file" "$root$file"; fi
    done
    for file in /usr/local/share/ca-certificates/*.crt; do
        if [ -e "$file" ]; then cp -L "$file" "$root/usr/local/share/ca-certificates/"; fi
    done
    # The work tree, with what is not committed yet and without what is ignored.
    git -c safe.directory='*' ls-files -z --cached --others --exclude-standard >"$folder/files"
    mkdir -p "$root/root/boomerang" "$root/root/.cargo/registry" "$root/opt/rust"
    tar --null --files-from="$folder/files" --ignore-failed-read -cf "$folder/tree.tar"
    tar -C "$root/root/boomerang" --no-same-owner -xf "$folder/tree.tar"
    # Crates are fetched here, where whatever cargo needs for it is set up.
    for file in config.toml config; do
        if [ -e "$CARGO_HOME/$file" ]; then cp -L "$CARGO_HOME/$file" "$root/root/.cargo/"; fi
    done
    cargo fetch --locked --quiet --target "$(rustc -vV | sed -n 's/^host: //p')"
    apart scripts/fresh.sh --inside "$root"
}

# ---- Inside: the first process of the namespaces, which ends everything by its own end

# in_it <command...>: in the bare root, with nothing of this machine but its proxies.
in_it() {
    chroot "$root" env -i -C /root/boomerang HOME=/root PATH=/opt/rust/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        CARGO_NET_OFFLINE=true ${http_proxy:+"http_proxy=$http_proxy"} ${https_proxy:+"https_proxy=$https_proxy"} \
        ${no_proxy:+"no_proxy=$no_proxy"} "$@"
}

# logged <what failed> <command...>: its output only if it fails.
logged() {
    what=$1
    shift
    if ! in_it "$@" >"$root.log" 2>&1; then
        tail -n 30 "$root.log" >&2
        fail "$what"
    fi
}

inside() {
    mount -t proc proc "$root/proc" || mount --rbind /proc "$root/proc"
    mount -t sysfs sysfs "$root/sys" 2>/dev/null || true
    # If it may not be bound, what debootstrap could make must do.
    mount --rbind /dev "$root/dev" || [ -c "$root/dev/null" ] || fail "there is no /dev for the bare root"
    mount -o bind,ro "$TOOLCHAIN" "$root/opt/rust"
    # Sources only; what is made of them is not in the registry.
    mount -o bind,ro "$CARGO_HOME/registry" "$root/root/.cargo/registry"
    logged "the certificates this machine trusts cannot be installed" update-ca-certificates

    echo "Setting up: make setup"
    logged "make setup fails on a bare machine" make setup
    again=$(in_it make --silent setup 2>&1) || fail "make setup fails where it has just been run" "$again"
    [ -z "$again" ] || fail "make setup has something left to do where it has just been run" "$again"

    echo "Running the build scripts of all dependencies"
    echo '#include <compare>
        #include <iostream>
        int main() { std::cout << (1 <=> 2 < 0); }' >"$root/root/try.cc"
    logged "what make setup installs does not compile C++20, as RocksDB needs it" c++ -std=c++20 -o /root/try /root/try.cc
    logged "what make setup installs does not run C++" /root/try
    # As if RocksDB were in the system: cargo check links nothing, so it need not be. Nothing made here is used: unoptimised.
    logged "a build script fails with what make setup installs" \
        env ROCKSDB_LIB_DIR=/usr/lib CARGO_TARGET_DIR=/root/check \
        cargo check --locked --quiet -p boomerang --config 'profile.dev.package."*".opt-level=0'
    [ -n "$FULL" ] || return 0

    # A network of its own with nothing but loopback: what is tried must need no other, and find its ports free.
    exec unshare --net -- scripts/fresh.sh --offline "$root"
}

# ---- With FULL=1: what the set-up was for

# The two lines that `make run` prints, and what comes of them three seconds later.
first_callback() {
    echo "Running: make run, up to its first callback"
    : >"$root.log"
    in_it sh -c 'echo $$ >/root/pid; exec make run' >"$root.log" 2>&1 &
    # The node prints a line of JSON when it is ready.
    if ! timeout "$READY_SECONDS" tail -n +1 -f --pid="$!" "$root.log" | grep -q '^{'; then
        tail -n 30 "$root.log" >&2
        fail "make run is not ready after $READY_SECONDS seconds, or has ended"
    fi
    sed -n 's/^  \(.*boomtool .*\)/\1/p' "$root.log" >"$root/root/lines"
    [ "$(wc -l <"$root/root/lines")" = 2 ] || fail "make run does not print two lines to try"
    # The first of them goes to the background.
    echo wait >>"$root/root/lines"
    seen=$(in_it timeout "$CALLBACK_SECONDS" sh /root/lines 2>&1) || fail "the lines that make run prints fail" "$seen"
    printf '%s\n' "$seen"
    case $seen in *'attempt 1 '*'hello, future me'*) ;; *) fail "no callback came within $CALLBACK_SECONDS seconds" ;; esac
    kill -TERM "$(cat "$root/root/pid")"
    wait
}

offline() {
    in_it ip link set lo up
    in_it make build
    first_callback
    in_it make test
}

case ${1:-} in
    "") outside ;;
    --inside | --offline)
        # Elsewhere, its mounts would stay.
        [ $$ = 1 ] || fail "only make fresh calls this"
        root=$2
        "${1#--}"
        ;;
    *) fail "usage: make fresh, or make fresh FULL=1" ;;
esac
