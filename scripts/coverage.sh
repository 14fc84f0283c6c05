#!/bin/sh
# Lines covered by the default tests, by crate and by room of the server, the processes they start included.
# The build is one of its own, with counters in it, in a folder of its own beside the others.
set -eu
cd "$(dirname "$0")/.."
target="${CARGO_TARGET_DIR:-$HOME/.cache/boomerang/target}/coverage"
mkdir -p "$target"
tools="$target/tools"
if ! [ -x "$tools/bin/cargo-tarpaulin" ]; then
    echo "Installing cargo-tarpaulin into $tools, once."
    CARGO_TARGET_DIR="$target/tools-build" cargo install cargo-tarpaulin --locked --root "$tools"
    rm -rf "$target/tools-build"
fi
# A test that fails because counting makes it slow is told of at the end; what it covered counts.
status=0
env -u CARGO_TARGET_DIR PATH="$tools/bin:$PATH" cargo tarpaulin --engine llvm --follow-exec --workspace --no-fail-fast \
    --skip-clean --timeout 1200 --target-dir "$target" --out Lcov --output-dir "$target" \
    --exclude-files '*/generated/*' '*/tests/*' '*/tests.rs' 'benches/*' 'fuzz/*' "$@" || status=$?
rm -f build_rs_cov.profraw
scripts/coverage.awk "$target/lcov.info" | sort
exit "$status"
