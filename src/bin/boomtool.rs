//! The client's tool on the command line. Parses, builds a runtime, runs; the code is in `boomerang::tool`.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage.

use std::process::ExitCode;

use boomerang::tool::{self, args::Cli};

fn main() -> ExitCode {
    let cli = Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(tool::run(cli)),
        Err(error) => {
            eprintln!("error: cannot start the runtime: caused by: {error}");
            ExitCode::FAILURE
        }
    }
}
