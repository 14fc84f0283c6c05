//! What can be typed after `boomtool dlq`.

use clap::{Args, Subcommand, ValueEnum};

use boomerang_client::{DeadLetterChoice, DeadLetterFilter};
use boomerang_task::when::parse_instant;
use boomerang_task::{ClientId, DeadLetterId, FailureClass, InstantMs, Invalid, TaskId};

/// What can be done with dead letters.
#[derive(Debug, Subcommand)]
pub enum DlqCommand {
    /// List dead letters, the oldest first
    #[command(after_help = "\
Examples:
  boomtool dlq list --died-after 2030-01-01T00:00:00Z --class timeout
  boomtool dlq list --all --json | jq -r .dead_letter_id")]
    List(DlqList),
    /// Show one dead letter
    #[command(after_help = "\
Examples:
  boomtool dlq get 0190b2c4-...@1896076800000")]
    Get {
        /// Dead letter id, as 'dlq list' printed it: TASK@MILLISECONDS
        #[arg(value_name = "ID")]
        id: DeadLetterId,
    },
    /// Register dead letters again, due at once with all their attempts
    #[command(
        long_about = "Register dead letters again, due at once with all their attempts.\n\n\
            Each becomes a new task and is removed, in one step. Its deliveries name the original task and occurrence. \
            The exit code is 0 only when all that were named were there.",
        after_help = "\
Examples:
  boomtool dlq replay 0190b2c4-...@1896076800000
  boomtool dlq replay --all --class refused --name-prefix night"
    )]
    Replay(DlqChoice),
    /// Remove dead letters for good
    #[command(after_help = "\
Examples:
  boomtool dlq purge 0190b2c4-...@1896076800000
  boomtool dlq purge --all --died-before 2030-01-01T00:00:00Z --yes")]
    Purge {
        /// Do not ask whether --all is meant
        #[arg(long)]
        yes: bool,
        /// Which ones.
        #[command(flatten)]
        choice: DlqChoice,
    },
}

/// `dlq list`.
#[derive(Debug, Args)]
pub struct DlqList {
    /// Show at most so many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: u64,
    /// Show all of them
    #[arg(long, conflicts_with = "limit")]
    pub all: bool,
    /// Which ones.
    #[command(flatten)]
    pub filter: FilterArgs,
}

/// Some dead letters by their ids, or all that a filter names.
#[derive(Debug, Args)]
pub struct DlqChoice {
    /// Dead letter ids, as 'dlq list' printed them: TASK@MILLISECONDS
    #[arg(value_name = "ID", required_unless_present = "all")]
    pub ids: Vec<DeadLetterId>,
    /// All of them, or all that the filters name
    #[arg(long, conflicts_with = "ids")]
    pub all: bool,
    /// Which ones.
    #[command(flatten)]
    pub filter: FilterArgs,
}

impl DlqChoice {
    /// As the client wants it.
    pub fn choice(&self) -> Result<DeadLetterChoice, Invalid> {
        match (self.all, self.filter.filter()) {
            (true, filter) => Ok(DeadLetterChoice::Filter(filter)),
            (false, filter) if filter != DeadLetterFilter::default() => {
                Err(Invalid::new("filters go with --all; dead letters that are named need none"))
            }
            (false, _) => Ok(DeadLetterChoice::Ids(self.ids.clone())),
        }
    }
}

/// Which dead letters.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Filters")]
pub struct FilterArgs {
    /// Only those of this client
    #[arg(long, value_name = "ID")]
    pub client_id: Option<ClientId>,
    /// Only those that died after this instant: RFC 3339, or milliseconds since 1970
    #[arg(long, value_name = "INSTANT", value_parser = parse_instant)]
    pub died_after: Option<InstantMs>,
    /// Only those that died before this instant
    #[arg(long, value_name = "INSTANT", value_parser = parse_instant)]
    pub died_before: Option<InstantMs>,
    /// Only those of this task
    #[arg(long, value_name = "ID")]
    pub task: Option<TaskId>,
    /// Only those whose last attempt failed in this way
    #[arg(long, value_name = "CLASS")]
    pub class: Option<ClassArg>,
    /// Only those of tasks whose name begins so
    #[arg(long, value_name = "TEXT")]
    pub name_prefix: Option<String>,
}

impl FilterArgs {
    /// As the client wants it.
    pub fn filter(&self) -> DeadLetterFilter {
        DeadLetterFilter {
            client_id: self.client_id.clone(),
            died_after_ms: self.died_after,
            died_before_ms: self.died_before,
            task_id: self.task,
            class: self.class.map(FailureClass::from),
            name_prefix: self.name_prefix.clone().unwrap_or_default(),
        }
    }
}

/// The values of `--class`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ClassArg {
    /// Nobody listened
    Refused,
    /// No connection, or no answer, in time
    Timeout,
    /// The receiver answered no
    BadStatus,
    /// The answer could not be understood
    BadAnswer,
    /// The connection broke before the answer
    Broken,
    /// No such host, no way to it, or no TLS with it
    Unreachable,
    /// More than the protocol can carry
    TooLarge,
    /// Not sent: the destination was known to be down
    CircuitOpen,
    /// Not sent: callbacks must not go to that address
    Forbidden,
}

impl From<ClassArg> for FailureClass {
    fn from(class: ClassArg) -> Self {
        match class {
            ClassArg::Refused => FailureClass::Refused,
            ClassArg::Timeout => FailureClass::Timeout,
            ClassArg::BadStatus => FailureClass::BadStatus,
            ClassArg::BadAnswer => FailureClass::BadAnswer,
            ClassArg::Broken => FailureClass::Broken,
            ClassArg::Unreachable => FailureClass::Unreachable,
            ClassArg::TooLarge => FailureClass::TooLarge,
            ClassArg::CircuitOpen => FailureClass::CircuitOpen,
            ClassArg::Forbidden => FailureClass::Forbidden,
        }
    }
}
