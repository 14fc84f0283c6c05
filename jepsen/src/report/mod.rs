//! A history and its verdicts as a page with pictures.
//!
//! [`write()`] makes three files: `history.edn` for other checkers, `verdicts.json` for programs, and `index.html` for people, which
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
use crate::history::{History, edn};

/// How a run was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    pub seed: u64,
    /// To be typed again.
    pub command: String,
    pub nodes: usize,
}

#[derive(Serialize)]
struct Verdicts<'a> {
    command: &'a str,
    seed: u64,
    nodes: usize,
    events: usize,
    holds: bool,
    verdicts: &'a [Verdict],
}

/// Writes all three files into `folder`, which is made if it is not there.
pub fn write(folder: &Path, history: &History, verdicts: &[Verdict], meta: &Meta) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let settings =
        BTreeMap::from([("command".to_owned(), meta.command.clone()), ("nodes".to_owned(), meta.nodes.to_string())]);
    let recorded = edn::Meta { seed: Some(meta.seed), settings };
    edn::write(history, &recorded, BufWriter::new(File::create(folder.join("history.edn"))?))?;
    let all = Verdicts {
        command: &meta.command,
        seed: meta.seed,
        nodes: meta.nodes,
        events: history.events.len(),
        holds: verdicts.iter().all(Verdict::holds),
        verdicts,
    };
    fs::write(folder.join("verdicts.json"), serde_json::to_string_pretty(&all)?)?;
    fs::write(folder.join("index.html"), page::page(history, verdicts, meta))
}

#[cfg(test)]
mod tests;
