#!/bin/sh
# Runs every test that acts at random with seeds nobody chose, ROUNDS times (10). Ends at the first failure, which says by which
# command its round is run again.
set -eu
cd "$(dirname "$0")/.."

# Whoever asks crates/testkit/src/seed.rs acts at random: files below a src/ by their module, files in tests/ by their name.
asks='seed::\(one\|rounds\|rounds_and\)('
modules() { # modules <src folder>
    grep -rl "$asks" "$1" | sed -e "s#^$1/##" -e 's#\.rs$##' -e 's#/mod$##' -e 's#/#::#g'
}
modules=$(modules src)
of_wire=$(modules crates/wire/src)
of_jepsen=$(modules jepsen/src)
files=$(grep -l "$asks" tests/*.rs | sed -e 's#.*/#--test #' -e 's#\.rs$##')

export BOOMERANG_SEED=random
round=1
while [ "$round" -le "${ROUNDS:-10}" ]; do
    echo "Round $round of ${ROUNDS:-10}"
    cargo test --quiet -p boomerang --lib -- $modules
    cargo test --quiet -p boomerang-wire --lib -- $of_wire
    cargo test --quiet -p boomerang-jepsen --lib -- $of_jepsen
    cargo test --quiet -p boomerang $files
    round=$((round + 1))
done
