#!/bin/sh
# Installs what Boomerang needs and the system lacks, from the packages of Debian or Ubuntu. Says what it installs; does
# nothing when all is there.
set -eu

missing=""
need() { # need <package> <command that proves it>
    if ! sh -c "$2" >/dev/null 2>&1; then missing="$missing $1"; fi
}

need build-essential 'command -v c++ && command -v make'
need clang 'command -v clang'
need libclang-dev 'ls /usr/lib/llvm-*/lib/libclang*.so* /usr/lib/*/libclang*.so* 2>/dev/null | grep -q .'
need protobuf-compiler 'command -v protoc'
# The messages every other .proto may use. protobuf-compiler only recommends it, and what is recommended is not installed.
need libprotobuf-dev 'ls /usr/include/google/protobuf/descriptor.proto'
# For the tests of clusters, which start their own; the service that comes with the package is not used.
need etcd-server 'command -v etcd'
need iproute2 'command -v ip'

if ! command -v cargo >/dev/null 2>&1; then
    echo "error: Rust is missing; install it with rustup (https://rustup.rs) and run this again" >&2
    exit 1
fi
if [ -z "$missing" ]; then
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "error: these are missing, and there is no apt-get to install them:$missing" >&2
    echo "       on another system, install what corresponds to them and run this again" >&2
    exit 1
fi
echo "Installing:$missing"
if [ "$(id -u)" = 0 ]; then sudo=""; else sudo="sudo"; fi
# A service that a package starts by itself would take the default ports.
policy=/usr/sbin/policy-rc.d
made_policy=""
trap 'if [ -n "$made_policy" ]; then $sudo rm -f "$policy"; fi' EXIT
trap 'exit 130' INT TERM
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | $sudo tee "$policy" >/dev/null
    $sudo chmod +x "$policy"
    made_policy=yes
fi
$sudo env DEBIAN_FRONTEND=noninteractive apt-get update -q
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
