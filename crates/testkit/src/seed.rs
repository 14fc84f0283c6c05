//! Where chance comes from in tests: the same seeds every time, so that a run repeats, and fresh ones when asked for.
//!
//! `BOOMERANG_SEED=<number>` runs one round, with that seed. `BOOMERANG_SEED=random` runs every round with a seed that
//! nobody chose; `make test-random` does so many times over. A round that fails says by which command it is run again.

use std::ops::Deref;

use rand::{SeedableRng, rngs::StdRng};

/// The variable that says which seeds are tried.
const VARIABLE: &str = "BOOMERANG_SEED";
/// Its value that asks for fresh ones.
const RANDOM: &str = "random";

/// The seed of one round, to be kept until the round is over: dropped by a panic, it says how to run the round again.
pub struct Seed(u64);

impl Seed {
    /// Numbers that follow from this seed alone.
    pub fn rng(&self) -> StdRng {
        StdRng::seed_from_u64(self.0)
    }
}

impl Deref for Seed {
    type Target = u64;

    fn deref(&self) -> &u64 {
        &self.0
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to run this round again: {}", command(self.0, std::thread::current().name()));
        }
    }
}

/// The rounds of a test: seeds 0 to `count - 1`, as many fresh ones, or the one that is asked for.
pub fn rounds(count: u64) -> impl Iterator<Item = Seed> {
    rounds_and(&[], count)
}

/// The same, after seeds that have found something once and must not find it again.
pub fn rounds_and(found_once: &[u64], count: u64) -> impl Iterator<Item = Seed> {
    let seeds: Vec<u64> = match asked() {
        Asked::Fixed => found_once.iter().copied().chain(0..count).collect(),
        Asked::Random => (0..count).map(|_| rand::random()).collect(),
        Asked::One(seed) => vec![seed],
    };
    seeds.into_iter().map(Seed)
}

/// The seed of a test that has one round.
pub fn one() -> Seed {
    rounds(1).next().expect("one round")
}

/// Whether one round was asked for: nothing can be expected of the sum of all, then.
pub fn is_chosen() -> bool {
    matches!(asked(), Asked::One(_))
}

enum Asked {
    Fixed,
    Random,
    One(u64),
}

fn asked() -> Asked {
    match std::env::var(VARIABLE).as_deref() {
        Err(_) => Asked::Fixed,
        Ok(RANDOM) => Asked::Random,
        Ok(text) => {
            Asked::One(text.parse().unwrap_or_else(|_| panic!("{VARIABLE} is '{text}': a number or '{RANDOM}'")))
        }
    }
}

/// `test`: its name, which the harness gives to its thread. The program's own name is that of the library or of the file in
/// `tests/`, with a hash behind it; the package's is told by cargo.
fn command(seed: u64, test: Option<&str>) -> String {
    let program = std::env::current_exe().ok().and_then(|path| Some(path.file_stem()?.to_str()?.to_owned()));
    command_of(
        seed,
        test.unwrap_or_default(),
        &program.unwrap_or_default(),
        std::env::var("CARGO_PKG_NAME").ok().as_deref(),
    )
}

fn command_of(seed: u64, test: &str, program: &str, package: Option<&str>) -> String {
    let file = program.rsplit_once('-').map_or(program, |(name, _hash)| name);
    // Who starts the program without cargo gets a guess: libraries of this workspace are called as their packages are.
    let package = package.map_or_else(
        || if file.starts_with("boom") { file.replace('_', "-") } else { "boomerang".to_owned() },
        str::to_owned,
    );
    let target = if file.replace('_', "-") == package { "--lib".to_owned() } else { format!("--test {file}") };
    format!("{VARIABLE}={seed} cargo test -p {package} {target} -- --exact {test}")
}

#[cfg(test)]
mod tests {
    use super::command_of;

    #[test]
    fn the_command_names_package_target_and_test() {
        let of = |program, package| command_of(7, "room::a_test", program, package);
        let lib = "BOOMERANG_SEED=7 cargo test -p boomerang-wire --lib -- --exact room::a_test";
        assert_eq!(of("boomerang_wire-0123456789abcdef", Some("boomerang-wire")), lib);
        assert_eq!(of("boomerang_wire-0123456789abcdef", None), lib);
        let file = "BOOMERANG_SEED=7 cargo test -p boomerang --test races -- --exact room::a_test";
        assert_eq!(of("races-0123456789abcdef", Some("boomerang")), file);
        assert_eq!(of("races-0123456789abcdef", None), file);
    }
}
