//! What the crates of the workspace may depend on.

use std::collections::BTreeSet;
use std::process::Command;

/// The server's own: whoever wants the client must not have to compile RocksDB for it.
const OF_THE_SERVER: [&str; 5] = ["boomerang", "rocksdb", "openraft", "etcd-client", "argon2"];

/// Names of all packages that are compiled for `package` on this platform, without what only its tests need.
fn compiled_for(package: &str) -> BTreeSet<String> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["tree", "--package", package, "--edges", "normal,build", "--prefix", "none", "--format", "{p}"]);
    cargo.args(["--locked", "--offline"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    lines
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != package)
        .map(str::to_owned)
        .collect()
}

#[test]
fn client_and_tool_do_without_the_server() {
    for package in ["boomerang-task", "boomerang-wire", "boomerang-client", "boomerang-receiver", "boomtool"] {
        let compiled = compiled_for(package);
        let found: Vec<&str> = OF_THE_SERVER.into_iter().filter(|name| compiled.contains(*name)).collect();
        assert!(found.is_empty(), "{package} needs {found:?}");
    }
}

#[test]
fn the_client_does_without_grpc() {
    let compiled = compiled_for("boomerang-client");
    for package in ["tonic", "hyper", "rustls"] {
        assert!(!compiled.contains(package), "boomerang-client needs {package}");
    }
}

#[test]
fn the_server_needs_clients_for_its_tests_only() {
    let compiled = compiled_for("boomerang");
    assert!(compiled.contains("rocksdb"), "else this test could not find anything: {compiled:?}");
    for package in ["boomerang-client", "boomerang-receiver", "boomerang-testkit", "boomtool"] {
        assert!(!compiled.contains(package), "the server needs {package} for more than its tests");
    }
}

#[test]
fn the_launcher_of_nodes_knows_none_of_our_crates() {
    let compiled = compiled_for("boomerang-testkit");
    let ours: Vec<&String> = compiled.iter().filter(|name| name.starts_with("boom")).collect();
    assert!(compiled.contains("tokio") && ours.is_empty(), "boomerang-testkit needs {ours:?}");
}

#[test]
fn the_vocabulary_does_without_network_and_chance() {
    let compiled = compiled_for("boomerang-task");
    for package in ["tokio", "prost", "rand"] {
        assert!(!compiled.contains(package), "boomerang-task needs {package}");
    }
}

mod imports {
    //! Who imports whom, read from the sources: `use` lines and paths that begin with `crate` or `super`. Tests are left out.

    use std::collections::{BTreeMap, BTreeSet};
    use std::fs;
    use std::path::{Path, PathBuf};

    /// The rooms of the server, each below those that come after it. A room imports only what comes before it.
    const ROOMS: &[&str] = &[
        "flags",
        "sabotage",
        "random",
        "certs",
        "dialing",
        "blocking",
        "clock",
        "metrics",
        "threads",
        "callback",
        "wheel",
        "store",
        "shard",
        "raft",
        "inspect",
        "propose",
        "disk",
        "firing",
        "placement",
        "server",
        "settings",
        "node",
    ];
    /// Crates that the server shows under names of its own.
    const OUTSIDE: [&str; 2] = ["task", "wire"];

    /// A crate: its files by the module each holds.
    struct Sources(BTreeMap<Module, File>);

    /// From the root of the crate, which is the empty one.
    type Module = Vec<String>;

    struct File {
        path: PathBuf,
        /// Without comments and tests.
        text: String,
    }

    impl Sources {
        fn of(root: &Path) -> Self {
            let mut sources = Self(BTreeMap::new());
            sources.add(Vec::new(), root.to_owned());
            sources
        }

        fn add(&mut self, module: Module, path: PathBuf) {
            let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let text = without_tests(&without_comments(&text));
            let folder = match path.file_stem().and_then(|stem| stem.to_str()) {
                Some("mod" | "lib" | "main") => path.parent().unwrap().to_owned(),
                _ => path.with_extension(""),
            };
            for name in declared(&text) {
                let files = [folder.join(format!("{name}.rs")), folder.join(&name).join("mod.rs")];
                if let Some(file) = files.into_iter().find(|file| file.exists()) {
                    self.add([module.clone(), vec![name]].concat(), file);
                }
            }
            self.0.insert(module, File { path, text });
        }

        /// The modules whose files a file imports from, its own left out.
        fn imports(&self, module: &Module) -> BTreeSet<Module> {
            let text = &self.0[module].text;
            let paths = paths(&without_re_exports(text));
            paths.iter().filter_map(|path| self.resolve(module, path, 0)).filter(|found| found != module).collect()
        }

        /// The module whose file defines what `path` means in `module`. A name that is only passed on leads to where it
        /// comes from.
        fn resolve(&self, module: &Module, path: &[String], depth: usize) -> Option<Module> {
            let mut at = module.clone();
            let mut rest = path;
            match path.first()?.as_str() {
                "crate" => (at, rest) = (Vec::new(), &path[1..]),
                "super" | "self" => {
                    while let Some(step @ ("super" | "self")) = rest.first().map(String::as_str) {
                        if step == "super" {
                            at.pop()?;
                        }
                        rest = &rest[1..];
                    }
                }
                first if !self.0.contains_key(&[module.clone(), vec![first.to_owned()]].concat()) => return None,
                _ => {}
            }
            while let Some(next) = rest.first() {
                let inner = [at.clone(), vec![next.clone()]].concat();
                if !self.0.contains_key(&inner) {
                    break;
                }
                (at, rest) = (inner, &rest[1..]);
            }
            let text = &self.0.get(&at)?.text;
            let Some(name) = rest.first().filter(|name| !["*", "self"].contains(&name.as_str())) else {
                return Some(at);
            };
            if depth < 8 && !defines(text, name) {
                let passed_on = paths(text).into_iter().find(|path| path.last() == Some(name) && path.len() > 1);
                if let Some(found) = passed_on.and_then(|path| self.resolve(&at, &path, depth + 1)) {
                    return Some(found);
                }
            }
            Some(at)
        }

        fn shown(&self, module: &Module) -> String {
            self.0[module].path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().display().to_string()
        }
    }

    fn without_comments(text: &str) -> String {
        let code = |line: &str| line.find("//").map_or(line.to_owned(), |at| line[..at].to_owned());
        text.lines().map(code).collect::<Vec<_>>().join("\n")
    }

    /// Cuts out what stands behind `#[cfg(test)]`: a block with its braces, or a line.
    fn without_tests(text: &str) -> String {
        let mut rest = text;
        let mut kept = String::new();
        while let Some((before, after)) = rest.split_once("#[cfg(test)]") {
            kept.push_str(before);
            let end = match (after.find(';'), after.find('{')) {
                (Some(line), Some(block)) if block < line => block_end(after, block),
                (None, Some(block)) => block_end(after, block),
                (Some(line), _) => line + 1,
                (None, None) => after.len(),
            };
            rest = &after[end..];
        }
        kept + rest
    }

    /// Behind the brace that closes the one at `open`. Braces in texts come in pairs, as those of formats do.
    fn block_end(text: &str, open: usize) -> usize {
        let mut depth = 0;
        for (at, letter) in text[open..].char_indices() {
            match letter {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return open + at + 1;
            }
        }
        text.len()
    }

    fn words(text: &str) -> impl Iterator<Item = (usize, &str)> {
        let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
        let starts = text.char_indices().scan(false, move |inside, (at, letter)| {
            let begins = is_word(letter) && !*inside;
            *inside = is_word(letter);
            Some(begins.then_some(at))
        });
        starts.flatten().map(move |at| (at, text[at..].split(|letter| !is_word(letter)).next().unwrap()))
    }

    /// Modules that lie in files of their own: `mod name;`.
    fn declared(text: &str) -> Vec<String> {
        let statement = |(at, word): (usize, &str)| {
            let name = text[at + word.len()..].trim_start();
            let name = (word == "mod").then(|| name.split_once(';')).flatten()?.0.trim();
            name.chars().all(|letter| letter.is_alphanumeric() || letter == '_').then(|| name.to_owned())
        };
        words(text).filter_map(statement).collect()
    }

    fn defines(text: &str, name: &str) -> bool {
        const KINDS: [&str; 8] = ["struct", "enum", "trait", "type", "fn", "const", "static", "macro_rules"];
        let all: Vec<&str> = words(text).map(|(_, word)| word).collect();
        all.windows(2).any(|pair| KINDS.contains(&pair[0]) && pair[1] == name)
    }

    /// What a file passes on it need not use itself.
    fn without_re_exports(text: &str) -> String {
        let mut kept = String::new();
        let mut inside = false;
        for line in text.split_inclusive('\n') {
            let start = line.trim_start();
            inside |= ["pub use ", "pub(crate) use ", "pub(super) use "].iter().any(|words| start.starts_with(words));
            if !inside {
                kept.push_str(line);
            }
            inside &= !line.contains(';');
        }
        kept
    }

    /// All paths of `use` lines, taken apart, and those in the code that have more than one step.
    fn paths(text: &str) -> Vec<Vec<String>> {
        let mut found = Vec::new();
        let mut behind = 0;
        for (at, word) in words(text) {
            let rest = &text[at..];
            if at < behind {
                // In a `use` line that was taken apart.
            } else if word == "use" {
                let tree = rest["use".len()..].split(';').next().unwrap();
                take_apart(tree, &[], &mut found);
                behind = at + "use".len() + tree.len();
            } else if rest[word.len()..].starts_with("::") && !text[..at].ends_with("::") {
                let path: String =
                    rest.chars().take_while(|letter| letter.is_alphanumeric() || "_:".contains(*letter)).collect();
                found.push(path.split("::").filter(|step| !step.is_empty()).map(str::to_owned).collect());
            }
        }
        found
    }

    fn take_apart(tree: &str, before: &[String], found: &mut Vec<Vec<String>>) {
        let tree = tree.trim();
        if let Some((steps, list)) = tree.strip_suffix('}').and_then(|tree| tree.split_once('{')) {
            let steps = steps.split("::").map(str::trim).filter(|step| !step.is_empty()).map(str::to_owned);
            let before: Vec<String> = before.iter().cloned().chain(steps).collect();
            let mut depth = 0;
            let parts = list.split(move |letter| {
                depth += i32::from(letter == '{') - i32::from(letter == '}');
                letter == ',' && depth == 0
            });
            parts.filter(|part| !part.trim().is_empty()).for_each(|part| take_apart(part, &before, found));
        } else {
            let name = tree.split(" as ").next().unwrap();
            let steps = name.split("::").map(|step| step.trim().to_owned()).filter(|step| !step.is_empty());
            found.push(before.iter().cloned().chain(steps).collect());
        }
    }

    fn root() -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR"))
    }

    #[test]
    fn no_room_imports_from_a_higher_one() {
        let sources = Sources::of(&root().join("src/lib.rs"));
        let height = |room: &String| {
            let found = ROOMS.iter().position(|name| name == room);
            found.unwrap_or_else(|| panic!("{room}: a room that has no place in ROOMS yet"))
        };
        let mut upwards = Vec::new();
        let mut seen = 0;
        for module in sources.0.keys().filter(|module| !module.is_empty()) {
            for used in sources.imports(module) {
                let Some(room) = used.first().filter(|room| *room != &module[0] && !OUTSIDE.contains(&room.as_str()))
                else {
                    continue;
                };
                seen += 1;
                if height(room) > height(&module[0]) {
                    upwards.push(format!("{} imports {}", sources.shown(module), sources.shown(&used)));
                }
            }
        }
        assert!(upwards.is_empty(), "imports go down only, see ROOMS: {upwards:#?}");
        assert!(seen > 100, "only {seen} imports between rooms were found: the reader of sources is wrong");
    }

    /// A file may use what the head of its own room defines: the words of the room. That is no circle.
    #[test]
    fn no_circle_of_imports_is_larger_than_two_files() {
        let mut crates = vec![root().join("src/lib.rs"), root().join("jepsen/src/lib.rs")];
        for folder in fs::read_dir(root().join("crates")).unwrap() {
            let folder = folder.unwrap().path().join("src");
            crates.extend([folder.join("lib.rs"), folder.join("main.rs")].into_iter().find(|file| file.exists()));
        }
        assert!(crates.len() > 6, "these are all crates: {crates:?}");
        for root in crates {
            let sources = Sources::of(&root);
            let imports: BTreeMap<&Module, BTreeSet<Module>> = sources
                .0
                .keys()
                .map(|module| {
                    (module, sources.imports(module).into_iter().filter(|used| !module.starts_with(used)).collect())
                })
                .collect();
            let reached: BTreeMap<&Module, BTreeSet<&Module>> =
                imports.keys().map(|module| (*module, reach(module, &imports))).collect();
            for module in imports.keys() {
                let circle: Vec<String> = reached[*module]
                    .iter()
                    .filter(|other| reached[**other].contains(*module))
                    .map(|other| sources.shown(other))
                    .collect();
                assert!(circle.len() <= 2, "these files import each other: {circle:#?}");
            }
        }
    }

    /// All that is imported by `module`, and by what it imports.
    fn reach<'a>(module: &Module, imports: &'a BTreeMap<&Module, BTreeSet<Module>>) -> BTreeSet<&'a Module> {
        let mut found = BTreeSet::new();
        let mut open: Vec<&Module> = imports[module].iter().collect();
        while let Some(next) = open.pop() {
            if found.insert(next) {
                open.extend(&imports[next]);
            }
        }
        found
    }

    /// An operation is the same whatever brings it: only the dispatcher opens envelopes.
    #[test]
    fn operations_know_nothing_of_envelopes_and_sockets() {
        const OF_CARRIERS: [&str; 5] = ["boomerang_envelope", "BoomerangEnvelope", "tonic", "axum", "net"];
        let sources = Sources::of(&root().join("src/lib.rs"));
        let api: Module = vec!["server".into(), "api".into()];
        let operations: Vec<&Module> =
            sources.0.keys().filter(|module| module.starts_with(&api) && **module != api).collect();
        assert!(operations.len() > 20, "these are all: {operations:?}");
        let mut found = Vec::new();
        for module in operations {
            for path in paths(&sources.0[module].text) {
                if path.iter().any(|step| OF_CARRIERS.contains(&step.as_str())) {
                    found.push(format!("{}: {}", sources.shown(module), path.join("::")));
                }
            }
        }
        assert!(found.is_empty(), "these know what brings a request: {found:#?}");
    }

    #[test]
    fn sources_are_read_as_they_are_meant() {
        let text = "
            mod inner;
            use crate::a::{self, b::C, d as e};
            pub use inner::{
                X,
            };
            fn f() { super::g::h(); } // crate::no
            #[cfg(test)]
            mod tests { use crate::no; }
        ";
        let text = without_tests(&without_comments(text));
        assert_eq!(declared(&text), ["inner"]);
        let found: Vec<String> = paths(&without_re_exports(&text)).iter().map(|path| path.join("::")).collect();
        assert_eq!(found, ["crate::a::self", "crate::a::b::C", "crate::a::d", "super::g::h"]);
    }
}
