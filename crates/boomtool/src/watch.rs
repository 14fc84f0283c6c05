//! The same picture again and again: drawn anew on a terminal, elsewhere one line for each thing that has changed.
//!
//! What is shown are rows with a key. A row is printed when it was not there or was different the time before, and a
//! key that is missing is said to be gone. The first picture is all new.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::ToolError;
use super::output::{Output, note, table};
use boomerang_client::ClientError;

/// To the upper left corner, and everything from there on away.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// One thing in the picture.
pub struct Row {
    /// By which it is known again.
    pub key: String,
    /// For people.
    pub cells: Vec<String>,
    /// For programs.
    pub object: Value,
}

/// What was shown last.
pub struct Board<'a> {
    output: &'a Output,
    titles: &'a [&'a str],
    /// The name of the keys, in objects.
    key_name: &'static str,
    shown: BTreeMap<String, String>,
}

impl<'a> Board<'a> {
    pub fn new(output: &'a Output, titles: &'a [&'a str], key_name: &'static str) -> Self {
        Self { output, titles, key_name, shown: BTreeMap::new() }
    }

    /// Whether pictures are drawn whole, one over the other.
    pub fn is_drawn(&self) -> bool {
        self.output.terminal && !self.output.json
    }

    /// Shows a picture, with a line about it above and whatever else belongs to it below.
    pub fn show(&mut self, about: &str, rows: Vec<Row>, below: &[String]) -> Result<(), ToolError> {
        if self.is_drawn() {
            let mut lines = vec![self.titles.iter().map(|title| (*title).to_owned()).collect()];
            lines.extend(rows.into_iter().map(|row| row.cells));
            let lines = table(&lines).into_iter().chain(below.iter().cloned()).collect::<Vec<_>>();
            return self.output.raw(&format!("{CLEAR}{about}\n\n{}\n", lines.join("\n")));
        }
        let mut before = std::mem::take(&mut self.shown);
        for row in rows {
            let text = if self.output.json { row.object.to_string() } else { row.cells.join("  ") };
            if before.remove(&row.key).as_ref() != Some(&text) {
                self.output.raw(&format!("{text}\n"))?;
            }
            self.shown.insert(row.key, text);
        }
        for key in before.into_keys() {
            self.output.line(|| format!("{key}  gone"), || json!({ self.key_name: key, "gone": true }))?;
        }
        Ok(())
    }
}

/// Whether a look that failed in this way is worth another; if so, says that it did.
pub fn look_again(error: &ClientError) -> bool {
    let passing =
        matches!(error, ClientError::Timeout { .. } | ClientError::ConnectionLost { .. } | ClientError::Connect { .. });
    if passing {
        note(&format!("{error}; looking again"));
    }
    passing
}

/// Waits until it is time to look again. False when it is time to end.
pub async fn again(every: Duration, mut stop: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
    tokio::select! {
        () = tokio::time::sleep(every) => true,
        () = &mut stop => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Printed;
    use super::*;

    fn row(key: &str, state: &str) -> Row {
        let cells = vec![key.to_owned(), state.to_owned()];
        Row { key: key.to_owned(), cells, object: json!({ "id": key, "state": state }) }
    }

    #[test]
    fn only_changes_are_printed() {
        for (json, lines) in [
            (false, "a  new\nb  new\nb  out\na  gone\n"),
            (
                true,
                "{\"id\":\"a\",\"state\":\"new\"}\n{\"id\":\"b\",\"state\":\"new\"}\n{\"id\":\"b\",\"state\":\"out\"}\n\
                 {\"gone\":true,\"id\":\"a\"}\n",
            ),
        ] {
            let printed = Printed::default();
            let output = Output::new(printed.clone(), json, json);
            let mut board = Board::new(&output, &["ID", "STATE"], "id");
            board.show("", vec![row("a", "new"), row("b", "new")], &[]).unwrap();
            board.show("", vec![row("a", "new"), row("b", "out")], &[]).unwrap();
            board.show("", vec![row("b", "out")], &[]).unwrap();
            assert_eq!(printed.text(), lines);
        }
    }

    #[test]
    fn a_terminal_gets_the_whole_picture() {
        let printed = Printed::default();
        let output = Output::new(printed.clone(), false, true);
        let mut board = Board::new(&output, &["ID", "STATE"], "id");
        for _ in 0..2 {
            board.show("two tasks", vec![row("a", "new"), row("bb", "out")], &["below".into()]).unwrap();
        }
        let picture = format!("{CLEAR}two tasks\n\nID  STATE\na   new\nbb  out\nbelow\n");
        assert_eq!(printed.text(), format!("{picture}{picture}"));
    }
}
