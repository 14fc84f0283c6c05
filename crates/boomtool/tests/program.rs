//! The program as a shell runs it: what it prints where, and its exit codes. Cargo builds the program for this test, and so
//! for those of the server that run it.

use std::process::{Command, Output, Stdio};

fn boomtool(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_boomtool"));
    command.args(args).stdin(Stdio::null()).env_remove("BOOMERANG_ADDR");
    command.output().unwrap()
}

#[test]
fn results_go_to_standard_output_and_errors_to_the_other_one() {
    let help = boomtool(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&help.stdout).contains("Usage: boomtool"), "{help:?}");

    let wrong = boomtool(&["task", "fly"]);
    assert_eq!((wrong.status.code(), wrong.stdout.as_slice()), (Some(2), &b""[..]));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("unrecognized subcommand 'fly'"), "{wrong:?}");

    // Port 1 is nobody's.
    let nobody = boomtool(&["--addr", "127.0.0.1:1", "--password", "x", "task", "list"]);
    assert_eq!((nobody.status.code(), nobody.stdout.as_slice()), (Some(1), &b""[..]));
    let said = String::from_utf8_lossy(&nobody.stderr);
    assert!(said.contains("cannot connect to 127.0.0.1:1") && said.contains("hint: is a node running?"), "{said}");
}
