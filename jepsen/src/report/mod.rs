//! A history and its verdicts as a page with pictures.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;

use crate::check::Verdict;
use crate::history::History;
use crate::history::edn::{self, Meta};

pub fn write(folder: &Path, history: &History, _verdicts: &[Verdict], meta: &Meta) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    edn::write(history, meta, BufWriter::new(File::create(folder.join("history.edn"))?))
}
