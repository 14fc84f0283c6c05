//! Where results go: data to standard output, for people or as one JSON object per line.
//!
//! A reader that has seen enough (`boomtool task list | head -1`) closes the pipe. That is no failure: the error of the
//! write travels up as [`ToolError::Output`], and the program ends quietly.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use boomerang_task::locks::Mutex;
use data_encoding::HEXLOWER;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use super::ToolError;

/// So often a progress bar is drawn while nothing moves.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Standard output, or a buffer in tests. Cheap to clone; lines of all clones stay whole.
#[derive(Clone)]
pub struct Output {
    writer: Arc<Mutex<Box<dyn Write + Send>>>,
    /// One JSON object per line instead of text.
    pub json: bool,
    /// Somebody looks at it, and what was printed can be drawn over.
    pub terminal: bool,
}

impl Output {
    /// Results go to `writer`, each line as soon as it is whole.
    pub fn new(writer: impl Write + Send + 'static, json: bool, terminal: bool) -> Self {
        Self { writer: Arc::new(Mutex::new(Box::new(writer))), json, terminal }
    }

    /// One line of text, or one object, whichever was asked for.
    pub fn line(&self, text: impl FnOnce() -> String, object: impl FnOnce() -> Value) -> Result<(), ToolError> {
        let mut line = if self.json { object().to_string() } else { text() };
        line.push('\n');
        self.raw(&line)
    }

    /// Text as it is.
    pub fn raw(&self, text: &str) -> Result<(), ToolError> {
        let mut writer = self.writer.lock();
        writer.write_all(text.as_bytes()).and_then(|()| writer.flush()).map_err(ToolError::Output)
    }
}

/// A bar on standard error for long work, or a count when nobody knows how much there is; nothing when standard error
/// is no terminal.
pub fn progress(what: &'static str, total: Option<u64>) -> ProgressBar {
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{msg} [{wide_bar}] {pos} of {len}, {per_sec}, {eta} left"),
        None => (ProgressBar::new_spinner(), "{msg} {spinner} {pos}, {per_sec}"),
    };
    bar.set_style(ProgressStyle::with_template(template).expect("a constant that is right"));
    bar.set_message(what);
    if !bar.is_hidden() {
        bar.enable_steady_tick(PROGRESS_EVERY);
    }
    bar
}

/// What is no result: progress, advice. A closed standard error is nobody's trouble.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// A payload for a terminal: quoted text, or hexadecimal digits; cut to `width` characters.
pub fn payload_text(payload: &[u8], width: usize) -> String {
    // What is cut off need not be looked at; a character has at most 4 bytes.
    let head = &payload[..payload.len().min(width.saturating_add(1).saturating_mul(4))];
    let text = match std::str::from_utf8(head) {
        Ok(text) => Some(text),
        // The cut may have gone through a character.
        Err(error) if error.error_len().is_none() && head.len() < payload.len() => {
            std::str::from_utf8(&head[..error.valid_up_to()]).ok()
        }
        Err(_) => None,
    };
    let shown = match text {
        Some(text) => format!("\"{}\"", text.chars().flat_map(shown_char).collect::<String>()),
        None => format!("0x{}", HEXLOWER.encode(head)),
    };
    if head.len() == payload.len() && shown.chars().count() <= width {
        return shown;
    }
    let cut: String = shown.chars().take(width.saturating_sub(3)).collect();
    format!("{cut}... ({} bytes)", payload.len())
}

/// Control characters do not reach the terminal.
fn shown_char(c: char) -> impl Iterator<Item = char> {
    let escaped: Box<dyn Iterator<Item = char>> =
        if c.is_control() || c == '"' || c == '\\' { Box::new(c.escape_default()) } else { Box::new([c].into_iter()) };
    escaped
}

/// A payload in JSON: `payload` when it is text, `payload_hex` when it is not. Never cut.
pub fn payload_into(object: &mut Map<String, Value>, payload: &[u8]) {
    match std::str::from_utf8(payload) {
        Ok(text) => object.insert("payload".into(), text.into()),
        Err(_) => object.insert("payload_hex".into(), HEXLOWER.encode(payload).into()),
    };
}

/// Rows as aligned columns, the last one as long as it likes. The first row is the head.
pub fn table(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> =
        (0..columns).map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)).collect();
    rows.iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_shown_safely_and_shortly() {
        assert_eq!(payload_text(b"", 20), "\"\"");
        assert_eq!(payload_text(b"hello", 20), "\"hello\"");
        assert_eq!(payload_text("größe".as_bytes(), 20), "\"größe\"");
        assert_eq!(payload_text(b"a\x1b[31m\n", 40), "\"a\\u{1b}[31m\\n\"");
        assert_eq!(payload_text(&[0xff, 0x00], 20), "0xff00");
        assert_eq!(payload_text(&[b'x'; 1000], 10), "\"xxxxxx... (1000 bytes)");
        // Cut in the middle of a character, it is text nevertheless.
        let text = format!("x{}", "€".repeat(100));
        assert!(payload_text(text.as_bytes(), 10).starts_with("\"x€€"), "{}", payload_text(text.as_bytes(), 10));
    }

    #[test]
    fn json_has_text_or_hex() {
        let mut object = Map::new();
        payload_into(&mut object, b"a\"b");
        payload_into(&mut object, &[0xfe]);
        assert_eq!(Value::Object(object).to_string(), r#"{"payload":"a\"b","payload_hex":"fe"}"#);
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["A".into(), "B".into()], vec!["long".into(), "x".into()]];
        assert_eq!(table(&rows), ["A     B", "long  x"]);
    }
}
