//! `jepsen`: runs, simulates, checks and reports. Parses and calls; the code is in the library.

fn main() {}
