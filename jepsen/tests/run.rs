//! The command, from the first process to the exit code: a cluster that is broken on purpose is told from one that is not.

use std::process::{Command, Output};

use jepsen::cluster::find_binaries;

/// On loopback, so that it can be run by anybody; with loads whose tasks are due soon.
fn run(more: &[&str]) -> Option<Output> {
    let Some(binaries) = find_binaries() else {
        eprintln!("skipped: there is no boomerang beside this test; `cargo build` makes it");
        return None;
    };
    let out = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_jepsen"));
    command.args(["run", "--loopback", "--nodes", "3", "--shards", "3", "--seed", "3", "--rate", "60"]);
    command.args(["--time", "8s", "--after", "4s", "--late", "2s", "--faults", "kill", "--loads", "races,dedup"]);
    command.arg("--binaries").arg(binaries).arg("--out").arg(out.path()).args(more);
    let output = command.output().unwrap();
    assert!(out.path().join("index.html").exists(), "{}", told(&output));
    Some(output)
}

fn told(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_cluster_that_keeps_its_promises_passes() {
    let Some(output) = run(&[]) else { return };
    let told = told(&output);
    assert!(output.status.success(), "{told}");
    for checker in ["lost", "answers", "unique", "digests", "reads"] {
        assert!(told.contains(&format!("holds   {checker}")), "{told}");
    }
}

#[test]
fn processes_that_are_broken_on_purpose_are_found_out() {
    let Some(output) = run(&["--sabotage", "fire-early,forget-dedup,apply-differs"]) else { return };
    let told = told(&output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    for checker in ["early", "unique", "digests"] {
        assert!(told.contains(&format!("BROKEN  {checker}")), "{checker}: {told}");
    }
}
