//! A history as it is stored: lines of JSON, the first for the whole and then one for each event.
//!
//! ```json
//! {"version":1,"began_ms":1700000000000,"seed":7,"settings":{"nodes":"5"},"events":3}
//! {"index":0,"at_us":1200,"what":{"call":[3,{"cancel":{"token":9,"task":"0190..."}}]}}
//! {"index":1,"at_us":1900,"what":{"end":[3,{"ok":"cancelled"}]}}
//! {"index":2,"at_us":2100,"what":{"fault":{"fault":"kill","stage":"begin","detail":"node 2"}}}
//! ```
//!
//! `what` is [`What`] and what is in it, by the names of types and fields; the process of a call or an
//! end stands in front. Whoever changes those types so that histories look different raises [`VERSION`].
//!
//! [`read`] takes back what [`write()`] wrote, and refuses anything else with the line it stands in. A history that is
//! cut short is refused, too: what the cluster still knew stands at the end, and without it what was not yet due would
//! seem lost. It must not judge, nor mend, what it reads.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Event, History, Meta, What};

/// Version of the stored form; no other one is read.
pub const VERSION: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum StoredError {
    #[error("the history cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("line {line} of the history: {why}")]
    Line { line: usize, why: String },
    #[error("the history ends after line {line}, with {found} of {expected} events: it was not written to its end")]
    CutShort { line: usize, found: usize, expected: usize },
}

/// The first line.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    version: u32,
    began_ms: u64,
    seed: Option<u64>,
    settings: BTreeMap<String, String>,
    /// Number of lines that follow.
    events: usize,
}

/// The one field of a first line that every version has.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// Each other line.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<W> {
    /// The place of the event, by which verdicts name it.
    index: usize,
    at_us: u64,
    what: W,
}

/// Writes all of it. `to` had better be buffered.
pub fn write(history: &History, meta: &Meta, mut to: impl Write) -> io::Result<()> {
    let Meta { seed, settings } = meta.clone();
    let head = Head { version: VERSION, began_ms: history.began_ms, seed, settings, events: history.events.len() };
    write_line(&mut to, &head)?;
    for (index, Event { at_us, what }) in history.events.iter().enumerate() {
        write_line(&mut to, &Line { index, at_us: *at_us, what })?;
    }
    to.flush()
}

fn write_line(to: &mut impl Write, line: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *to, line)?;
    to.write_all(b"\n")
}

/// Reads what [`write()`] wrote.
pub fn read(from: impl BufRead) -> Result<(History, Meta), StoredError> {
    let mut head: Option<Head> = None;
    let mut events = Vec::new();
    let mut last = 0;
    for (line, text) in (1..).zip(from.split(b'\n')) {
        let text = text?;
        let at = |why| StoredError::Line { line, why };
        match &head {
            None => head = Some(read_head(&text).map_err(at)?),
            Some(head) => events.push(read_event(&text, events.len(), head.events).map_err(at)?),
        }
        last = line;
    }
    let nothing = || StoredError::Line { line: 1, why: "there is nothing in it".to_owned() };
    let Head { began_ms, seed, settings, events: expected, .. } = head.ok_or_else(nothing)?;
    if events.len() < expected {
        return Err(StoredError::CutShort { line: last, found: events.len(), expected });
    }
    Ok((History { began_ms, events }, Meta { seed, settings }))
}

/// Reads the history of a file; what it was recorded under is for people.
pub fn read_file(file: &Path) -> Result<(History, Meta), StoredError> {
    read(BufReader::new(File::open(file)?))
}

fn read_head(line: &[u8]) -> Result<Head, String> {
    let Versioned { version } = parse(line)?;
    if version != VERSION {
        return Err(format!("it has version {version} of the form, and this program reads version {VERSION}"));
    }
    parse(line)
}

fn read_event(line: &[u8], place: usize, expected: usize) -> Result<Event, String> {
    if place >= expected {
        return Err(format!("the first line promises only {expected} events"));
    }
    let Line { index, at_us, what } = parse::<Line<What>>(line)?;
    if index != place {
        return Err(format!("event {place} belongs here, not {index}"));
    }
    Ok(Event { at_us, what })
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<T, String> {
    serde_json::from_slice(line).map_err(|error| {
        let column = error.column();
        if error.is_eof() {
            return format!("it is cut off after column {column}: whoever wrote it was stopped");
        }
        // It counts lines from the start of this one.
        let why = error.to_string();
        let why = why.strip_suffix(&format!(" at line {} column {column}", error.line())).unwrap_or(&why);
        format!("{why}, at column {column}")
    })
}

#[cfg(test)]
pub(crate) mod tests;
