#!/bin/sh
# Lines covered by the default tests, by crate and by room of the server, the processes they start included.
# The build is one of its own, with counters in it, in a folder of its own beside the others.
set -eu
cd "$(dirname "$0")/.."
target="${CARGO_TARGET_DIR:-$HOME/.cache/boomerang/target}/coverage"
tools="$target/tools"
profiles="$target/profiles"
if ! [ -x "$tools/bin/cov" ]; then
    echo "Installing llvm_profparser, which reads the counters, into $tools, once."
    CARGO_TARGET_DIR="$target/tools-build" cargo install llvm_profparser --version 0.14.0 --locked --root "$tools"
    rm -rf "$target/tools-build"
fi
rm -rf "$profiles"
mkdir -p "$profiles"
export CARGO_TARGET_DIR="$target" LLVM_PROFILE_FILE="$profiles/%m-%p.profraw"
counted() { cargo --config 'build.rustflags = ["-Cinstrument-coverage"]' "$@"; }
counted build --bins
counted test --no-run --message-format json >"$target/messages"
# A test that fails because counting makes it slow is told of at the end; what it covered counts.
status=0
counted test --no-fail-fast "$@" || status=$?

# Whoever is killed while it writes its counters leaves a part of them.
for profile in "$profiles"/*.profraw; do
    "$tools/bin/profparser" show --input "$profile" >/dev/null 2>&1 || rm "$profile"
done
set --
for profile in "$profiles"/*.profraw; do set -- "$@" --instr-profile "$profile"; done
for object in $(grep -o '"executable":"[^"]*"' "$target/messages" | cut -d '"' -f 4 | sort -u); do
    set -- "$@" --object "$object"
done
"$tools/bin/cov" show "$@" >"$target/lines"
awk -v root="$PWD/" -f scripts/coverage.awk "$target/lines" | sort
exit "$status"
