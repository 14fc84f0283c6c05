//! The command, from the first process to the exit code: a cluster that is broken on purpose is told from one that is not.

use std::fs;
use std::path::Path;
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

fn stored(subcommand: &str, file: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_jepsen")).arg(subcommand).arg(file).args(more).output().unwrap()
}

const STORED: &str = r#"{"version":1,"began_ms":1000000,"seed":7,"settings":{"late":"2s"},"events":2}
{"index":0,"at_us":1000,"what":{"call":[1,{"get":{"token":1,"task":"t1"}}]}}
{"index":1,"at_us":2000,"what":{"end":[1,{"ok":"not_found"}]}}
"#;

#[test]
fn a_stored_history_is_judged_and_exported() {
    let folder = tempfile::tempdir().unwrap();
    let (file, report) = (folder.path().join("history.jsonl"), folder.path().join("report"));
    fs::write(&file, STORED).unwrap();
    let judged = stored("check", &file, &["--out", report.to_str().unwrap()]);
    assert!(judged.status.success() && told(&judged).contains("holds   reads"), "{}", told(&judged));
    assert_eq!(fs::read_to_string(report.join("history.jsonl")).unwrap(), STORED);
    let exported = stored("export", &file, &[]);
    let edn = r#"{:index 0, :time 1000000, :type :invoke, :process 1, :f :get, :value {:token 1, :task "t1"}}
{:index 1, :time 2000000, :type :ok, :process 1, :f :get, :value {:answer :not-found}}
"#;
    assert_eq!(String::from_utf8_lossy(&exported.stdout), edn);
    assert!(exported.status.success(), "{}", told(&exported));
}

#[test]
fn a_history_that_is_cut_short_is_neither_judged_nor_exported() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("history.jsonl");
    fs::write(&file, &STORED[..STORED.len() - 10]).unwrap();
    for subcommand in ["check", "export"] {
        let refused = stored(subcommand, &file, &[]);
        assert_eq!((refused.status.code(), refused.stdout.len()), (Some(1), 0), "{subcommand}: {}", told(&refused));
        let expected = format!("error: {}: line 3 of the history: it is cut off", file.display());
        assert!(told(&refused).starts_with(&expected), "{subcommand}: {}", told(&refused));
    }
}
