//! What is stored, looked at from outside: for people, and to compare replicas.
//!
//! This room knows the meaning of every row, also of those that only `raft` and `shard` can decode, and so stands above
//! them. It reads and never writes, and shows no secret: no password, no key, no hash of one.
//!
//! - [`rows`]: each row decoded, and as a line; [`mod@digest`]: whether two replicas hold the same
//! - `folder`: the data folder of a node that does not run; `summary`: all of it on a page; `task`: what there is of one
//!   task; [`inspect`] puts them together as `boomerang inspect`

pub mod digest;
mod folder;
pub mod rows;
mod summary;
mod task;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::path::PathBuf;

pub use digest::{Digest, DigestThreads, digest};
pub use rows::dump;

use crate::store::StoreError;
use crate::store::folder::FolderError;
use crate::task::{GroupId, SHARDS_MAX, TaskId};
use folder::StoppedFolder;
use rows::{Line, each_line};
use summary::Summary;

/// What is asked of a data folder.
#[derive(Debug, Clone, clap::Args)]
pub struct Asked {
    /// The data folder of a node that does not run (what its --data-dir says)
    data_dir: PathBuf,
    /// Only this group, in more detail: 0 is the cluster's own, shard N is held by group N + 1
    #[arg(long, value_name = "N", value_parser = parse_group)]
    group: Option<GroupId>,
    /// Every row instead of the summary, one per line, in the order in which they are stored
    #[arg(long, conflicts_with = "task")]
    rows: bool,
    /// Every row that names this task, and every log entry that is still there and does
    #[arg(long, value_name = "ID", conflicts_with = "group")]
    task: Option<TaskId>,
    /// JSON instead of text: the summary as one object on one line, rows as one object per line
    #[arg(long)]
    json: bool,
}

fn parse_group(text: &str) -> Result<GroupId, String> {
    let number = text.strip_prefix('g').unwrap_or(text).parse().ok();
    let group = number.filter(|number| *number <= SHARDS_MAX);
    group.map(GroupId).ok_or_else(|| format!("is not the number of a group, 0 to {SHARDS_MAX}"))
}

/// Why a data folder cannot be shown, or what is wrong with what was shown.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    #[error(
        "a node is running on {path}{holder}; stop it first (SIGTERM), or ask it while it runs: boomtool cluster shards, \
         boomtool task get, /metrics"
    )]
    Running { path: String, holder: String },
    #[error("cannot read {path}: {source}")]
    Unreadable { path: String, source: io::Error },
    #[error("{path} is empty: no node was ever started on it")]
    Empty { path: String },
    #[error("{path} holds no boomerang.json, so it is not the data folder of a node{hint}")]
    NotADataFolder { path: String, hint: String },
    #[error("{path} holds no database: a first start on it was cut off before anything was stored")]
    NoDatabase { path: String },
    #[error(
        "{path} has format {found}, of a version before the first release; this binary cannot read it, the one that wrote \
         it can"
    )]
    Older { path: String, found: u32 },
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("there is nothing of group {group} in {path}; it holds {held}")]
    NoGroup { group: u16, path: String, held: String },
    #[error("task {id}: {why}")]
    NoTask { id: TaskId, why: String },
    #[error("{count} {} damaged or missing; {shown}", if *count == 1 { "row is" } else { "rows are" })]
    Damaged { count: u64, shown: &'static str },
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
}

/// Shows to `out` what is asked for. An error after all was shown says that some of it is damaged.
pub fn inspect(asked: &Asked, out: &mut dyn Write) -> Result<(), InspectError> {
    let folder = StoppedFolder::open(&asked.data_dir)?;
    let shown = match asked.task {
        Some(id) => task::show(&folder, id, &mut Lines { out, json: asked.json, damaged: 0 }),
        None if asked.rows => show_rows(&folder, asked.group, &mut Lines { out, json: asked.json, damaged: 0 }),
        None => show_summary(&folder, asked, out),
    };
    // Whoever reads it has seen enough.
    match shown {
        Err(InspectError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        shown => shown,
    }
}

fn show_summary(folder: &StoppedFolder, asked: &Asked, out: &mut dyn Write) -> Result<(), InspectError> {
    let summary = Summary::of(folder, asked.group)?;
    if asked.json {
        let json = serde_json::to_string(&summary).map_err(io::Error::other)?;
        writeln!(out, "{json}")?;
    } else {
        summary.write(asked.group.is_some(), out)?;
    }
    out.flush()?;
    match summary.damaged_rows {
        0 => Ok(()),
        count => {
            Err(InspectError::Damaged { count, shown: "--rows shows what cannot be read, with '?' and the reason" })
        }
    }
}

fn show_rows(folder: &StoppedFolder, group: Option<GroupId>, lines: &mut Lines<'_>) -> Result<(), InspectError> {
    let mut some = false;
    each_line(&folder.store, group, |line| {
        some = true;
        lines.write(line)
    })?;
    match group {
        Some(group) if !some => Err(summary::no_group(folder, group)?),
        _ => lines.end(),
    }
}

/// Rows on their way out.
struct Lines<'a> {
    out: &'a mut dyn Write,
    json: bool,
    damaged: u64,
}

impl Lines<'_> {
    fn write(&mut self, line: &Line) -> Result<(), InspectError> {
        self.damaged += u64::from(line.value.is_err());
        if self.json {
            let json = serde_json::to_string(line).map_err(io::Error::other)?;
            writeln!(self.out, "{json}")?;
        } else {
            writeln!(self.out, "{line}")?;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), InspectError> {
        self.out.flush()?;
        match self.damaged {
            0 => Ok(()),
            count => Err(InspectError::Damaged { count, shown: "they are marked with '?' and the reason" }),
        }
    }
}
