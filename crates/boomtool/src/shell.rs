//! `boomtool shell`: a prompt that takes every command, on a connection that is kept from one line to the next.
//!
//! A line is cut into words as a shell does it, and then parsed and run as if `boomtool` stood before it; what it does
//! not say about the connection is taken from the shell's own flags. Without a terminal there is no prompt, and lines
//! come from standard input as they are.

use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::CommandFactory;
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Behavior, Config, Editor};

use super::args::task::TaskCommand;
use super::args::{Cli, Command, Global, ShellArgs};
use super::output::note;
use super::{Context, ToolError, execute, report};
use boomerang_client::Client;

const PROMPT: &str = "boomtool> ";

/// What stands before something that is not for a history.
const SECRET_FLAGS: [&str; 4] = ["--password", "--new-password", "--token", "--secret"];

const HELP: &str = "\
Every command of boomtool, without the word boomtool:

  task      register, get, list, update, pause, resume, cancel
  dlq       list, get, replay, purge
  client    add, remove, key, revoke-key
  listen    receive callbacks
  bench     measure a node

  help COMMAND, or COMMAND --help    more about a command
  Ctrl-C                             ends a command
  exit, or Ctrl-D                    ends the shell
";

/// The connection of the line before, and the flags it was made with.
#[derive(Default)]
pub(super) struct Kept(tokio::sync::Mutex<Option<(Global, Client)>>);

impl Kept {
    /// The same connection again, unless this line is about another node or client.
    pub async fn connect(&self, global: &Global) -> Result<Client, ToolError> {
        let key = Global { json: false, ..global.clone() };
        let mut kept = self.0.lock().await;
        if let Some((of, client)) = &*kept
            && *of == key
        {
            return Ok(client.clone());
        }
        let client = Client::connect(global.options()?).await?;
        *kept = Some((key, client.clone()));
        Ok(client)
    }
}

/// Where lines come from.
enum Input {
    Prompt { editor: Box<Editor<(), FileHistory>>, history: Option<PathBuf> },
    Piped(Box<dyn BufRead + Send>),
}

enum Next {
    Line(String),
    /// Ctrl-C at the prompt: whatever stood there is forgotten.
    Nothing,
    End,
}

impl Input {
    fn prompt(args: &ShellArgs) -> Result<Self, ToolError> {
        // Results may go elsewhere while somebody sits at the terminal.
        let config = Config::builder().behavior(Behavior::PreferTerm).build();
        let mut editor = Editor::with_config(config).map_err(terminal)?;
        let history = if args.no_history { None } else { args.history.clone().or_else(history_path) };
        if let Some(path) = &history {
            // There is none yet at the first time.
            let _ = editor.load_history(path);
        }
        Ok(Input::Prompt { editor: Box::new(editor), history })
    }

    /// The next line. Blocks.
    fn read(&mut self) -> Result<Next, ToolError> {
        match self {
            Input::Prompt { editor, history } => match editor.readline(PROMPT) {
                Ok(line) => {
                    remember(editor, history.as_deref(), &line);
                    Ok(Next::Line(line))
                }
                Err(ReadlineError::Interrupted) => Ok(Next::Nothing),
                Err(ReadlineError::Eof) => Ok(Next::End),
                Err(error) => Err(terminal(error)),
            },
            Input::Piped(input) => {
                let mut line = String::new();
                match input.read_line(&mut line) {
                    Ok(0) => Ok(Next::End),
                    Ok(_) => Ok(Next::Line(line)),
                    Err(source) => Err(ToolError::file(Path::new("-"), source)),
                }
            }
        }
    }

    /// The same without holding up the connection.
    async fn next(mut self) -> Result<(Self, Next), ToolError> {
        let reading = tokio::task::spawn_blocking(move || {
            let next = self.read();
            (self, next)
        });
        let (input, next) = reading.await.expect("reading a line does not panic");
        Ok((input, next?))
    }
}

fn terminal(error: ReadlineError) -> ToolError {
    ToolError::File { path: PathBuf::from("the terminal"), source: io::Error::other(error) }
}

fn history_path() -> Option<PathBuf> {
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let state = of("XDG_STATE_HOME").or_else(|| Some(of("HOME")?.join(".local/state")))?;
    Some(state.join("boomtool/history"))
}

/// A history that cannot be written is not worth a word at every line.
fn remember(editor: &mut Editor<(), FileHistory>, path: Option<&Path>, line: &str) {
    if !may_be_remembered(line) || !editor.add_history_entry(line).unwrap_or(false) {
        return;
    }
    if let Some(path) = path {
        if let Some(folder) = path.parent() {
            let _ = std::fs::create_dir_all(folder);
        }
        let _ = editor.append_history(path);
    }
}

fn may_be_remembered(line: &str) -> bool {
    !line.trim().is_empty() && !SECRET_FLAGS.iter().any(|flag| line.contains(flag))
}

pub(super) async fn run(args: ShellArgs, context: Context) -> Result<(), ToolError> {
    let input = match context.interactive {
        true => Input::prompt(&args)?,
        false => Input::Piped(Box::new(BufReader::new(io::stdin()))),
    };
    serve(input, Context { kept: Some(Arc::default()), ..context }).await
}

async fn serve(mut input: Input, context: Context) -> Result<(), ToolError> {
    let prompted = matches!(input, Input::Prompt { .. });
    if prompted {
        note("'help' tells what can be done, 'exit' or Ctrl-D ends");
    }
    let mut failed = 0;
    loop {
        let line;
        (input, line) = match input.next().await? {
            (input, Next::Line(line)) => (input, line),
            (input, Next::Nothing) => (input, String::new()),
            (_, Next::End) => break,
        };
        match one(&line, &context).await {
            Line::Done => {}
            Line::Failed => failed += 1,
            Line::Interrupted if prompted => note("interrupted"),
            Line::Interrupted => return Err(ToolError::Undone("interrupted".into())),
            Line::Closed(error) => return Err(error),
            Line::Exit => break,
        }
    }
    if let Some((_, client)) = context.kept.as_ref().expect("this is a shell").0.lock().await.take() {
        client.close().await;
    }
    match failed {
        0 => Ok(()),
        // Whoever sat at the prompt has seen it.
        _ if prompted => Ok(()),
        _ => Err(ToolError::Undone(format!("{failed} of the lines failed"))),
    }
}

/// What became of a line. Errors have been printed.
enum Line {
    Done,
    Failed,
    Interrupted,
    /// Nobody reads the results any more.
    Closed(ToolError),
    Exit,
}

async fn one(line: &str, shell: &Context) -> Line {
    let Some(mut words) = shlex::split(line) else {
        note("error: a quote is not closed");
        return Line::Failed;
    };
    // Out of habit.
    if words.first().is_some_and(|word| word == "boomtool") {
        words.remove(0);
    }
    let result = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => Ok(()),
        ["exit" | "quit"] => return Line::Exit,
        ["help"] => shell.output.raw(HELP),
        _ => match parse(words, shell) {
            Ok((command, context)) => {
                // These end in their own way, with a summary or a last look.
                let ends_itself = matches!(&command, Command::Listen(_)) || is_watch(&command);
                let running = Box::pin(execute(command, context));
                tokio::select! {
                    result = running => result,
                    _ = tokio::signal::ctrl_c(), if !ends_itself => return Line::Interrupted,
                }
            }
            // What was asked for with --help.
            Err(error) if error.exit_code() == 0 => shell.output.raw(&error.to_string()),
            Err(error) => {
                note(error.to_string().trim_end());
                return Line::Failed;
            }
        },
    };
    match result {
        Ok(()) => Line::Done,
        Err(error @ ToolError::Output(_)) => Line::Closed(error),
        Err(error) => {
            report(&error);
            Line::Failed
        }
    }
}

fn is_watch(command: &Command) -> bool {
    match command {
        Command::Task(TaskCommand::Get(args)) => args.watch.is_some(),
        Command::Task(TaskCommand::List(args)) => args.watch.is_some(),
        _ => false,
    }
}

/// A line as a command, with the shell's flags where it has none of its own.
fn parse(words: Vec<String>, shell: &Context) -> Result<(Command, Context), clap::Error> {
    let words = std::iter::once("boomtool".to_owned()).chain(words);
    let matches = Cli::command().try_get_matches_from(words)?;
    let Cli { mut global, command } = Cli::of(&matches)?;
    if matches!(command, Command::Shell(_)) {
        let kind = clap::error::ErrorKind::InvalidSubcommand;
        return Err(Cli::command().error(kind, "this is the shell already"));
    }
    global.inherit(&shell.global, &matches);
    let mut output = shell.output.clone();
    output.json = global.json;
    Ok((command, Context { global, output, ..shell.clone() }))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::super::tests::prepare;
    use super::*;
    use boomerang_client::fake::{self, Fake};
    use boomerang_wire::proto::boomerang_envelope::Payload;

    /// Runs lines as if they came through a pipe.
    async fn shell(flags: &str, lines: &'static str) -> (String, Result<(), ToolError>) {
        let (_, context, printed) = prepare(&format!("shell {flags}"));
        let context = Context { kept: Some(Arc::default()), ..context };
        let result = serve(Input::Piped(Box::new(lines.as_bytes())), context).await;
        (printed.text(), result)
    }

    /// A node that takes one connection at a time and registers everything.
    async fn node() -> (String, Arc<AtomicU64>) {
        let fake = Fake::start().await;
        let address = fake.address();
        let sessions = Arc::new(AtomicU64::new(0));
        let count = sessions.clone();
        tokio::spawn(async move {
            loop {
                let mut peer = fake.accept().await;
                while let Some(request) = peer.next().await {
                    let answer = match request.payload.unwrap() {
                        Payload::AuthHandshake(_) => {
                            count.fetch_add(1, Ordering::Relaxed);
                            fake::welcome("s", 0)
                        }
                        _ => fake::registered(1_896_076_800_000),
                    };
                    peer.send(request.request_id, answer).await;
                }
            }
        });
        (address, sessions)
    }

    #[tokio::test]
    async fn lines_share_a_connection_and_an_error_does_not_end_it() {
        let (address, sessions) = node().await;
        let lines = "
            # a comment, and an empty line

            task register 'two words' --in 5s
            task register --in
            task register 'open
            boomtool task register y --in 5s --json
            shell
            task register - --in 5s
            exit
            task register z --in 5s
        ";
        let (printed, result) = shell(&format!("--addr {address}"), lines).await;
        assert_eq!(result.unwrap_err().to_string(), "4 of the lines failed");
        let lines: Vec<&str> = printed.lines().collect();
        assert_eq!(lines.len(), 2, "{printed}");
        assert!(lines[0].contains("  due 2030-") && lines[1].starts_with('{'), "{printed}");
        assert_eq!(sessions.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn help_is_no_failure() {
        let (printed, result) = shell("", "help\nhelp task register\ntask list --help\n").await;
        result.unwrap();
        for part in ["exit, or Ctrl-D", "--dedup-key", "--watch"] {
            assert!(printed.contains(part), "{part}: {printed}");
        }
    }

    #[test]
    fn secrets_are_not_remembered() {
        assert!(may_be_remembered("task list"));
        for line in ["", "  ", "client add x --new-password y", "task list --token=t", "listen --http a:1 --secret s"] {
            assert!(!may_be_remembered(line), "{line}");
        }
    }
}
