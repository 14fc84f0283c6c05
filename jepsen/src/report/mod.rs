//! A history and its verdicts as a page with pictures.
//!
//! [`write()`] makes three files: `history.jsonl` and `verdicts.json` for programs, and `index.html` for people, which
//! needs nothing else: no scripts, no fonts, no network. It shows what the checkers said and judges nothing itself.
//!
//! - [`figures`]: what is counted; [`series`]: the same over time, in as many steps as a picture has room for
//! - [`chart`]: pictures, as SVG; [`page`]: the text around them

mod chart;
mod figures;
mod page;
mod series;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::Path;

use serde::Serialize;

use crate::check::Verdict;
use crate::history::{History, Meta, stored};

/// Among what a history was recorded under: what was typed, so that it can be typed again.
pub const COMMAND: &str = "command";

#[derive(Serialize)]
struct Verdicts<'a> {
    seed: Option<u64>,
    settings: &'a BTreeMap<String, String>,
    events: usize,
    holds: bool,
    verdicts: &'a [Verdict],
}

/// Writes all three files into `folder`, which is made if it is not there.
pub fn write(folder: &Path, history: &History, verdicts: &[Verdict], meta: &Meta) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    stored::write(history, meta, BufWriter::new(File::create(folder.join("history.jsonl"))?))?;
    let all = Verdicts {
        seed: meta.seed,
        settings: &meta.settings,
        events: history.events.len(),
        holds: verdicts.iter().all(Verdict::holds),
        verdicts,
    };
    fs::write(folder.join("verdicts.json"), serde_json::to_string_pretty(&all)?)?;
    fs::write(folder.join("index.html"), page::page(history, verdicts, meta))
}

#[cfg(test)]
mod tests;
