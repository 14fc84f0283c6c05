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
fn the_vocabulary_does_without_network_and_chance() {
    let compiled = compiled_for("boomerang-task");
    for package in ["tokio", "prost", "rand"] {
        assert!(!compiled.contains(package), "boomerang-task needs {package}");
    }
}
