//! What can be typed after `boomtool bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum, value_parser};

use super::super::args::{parse_bytes, parse_timeout};
use boomerang_task::Protocol;
use boomerang_task::when::parse_duration;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// How fast tasks are stored, and how long each one takes
    Register(RegisterBench),
    /// How late deliveries are, at a steady rate
    Fire(FireBench),
    /// How fast tasks go out that are all due at one instant
    Drain(DrainBench),
    /// How long shards do not fire when their leader is killed; starts a cluster of its own
    Failover(FailoverBench),
    /// Whether nodes keep their word that are offered twice what they carry; starts a cluster of its own
    Overload(OverloadBench),
}

impl BenchCommand {
    /// Whether it starts nodes, and what is said of others means nothing to it.
    pub fn starts_nodes(&self) -> bool {
        match self {
            BenchCommand::Register(RegisterBench { own, .. })
            | BenchCommand::Fire(FireBench { own, .. })
            | BenchCommand::Drain(DrainBench { own, .. }) => own.nodes.is_some(),
            BenchCommand::Failover(_) | BenchCommand::Overload(_) => true,
        }
    }
}

/// The load, and the receiver of what is fired.
#[derive(Debug, Args)]
#[command(next_help_heading = "Load")]
pub struct LoadArgs {
    /// Connections to the node
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = value_parser!(u16).range(1..=1000))]
    pub connections: u16,
    /// Requests under way on each connection
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = value_parser!(u32).range(1..=100_000))]
    pub inflight: u32,
    /// Size of each payload; its bytes are random
    #[arg(long, value_name = "BYTES", default_value_t = 100)]
    pub payload: usize,
    /// Where the receiver listens; port 0 picks a free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    pub listen: String,
    /// Host by which the node reaches the receiver, when it is not that of --listen
    #[arg(long, value_name = "HOST")]
    pub advertise: Option<String>,
    /// Leave on the node what was not delivered, rather than cancel it
    #[arg(long)]
    pub keep: bool,
    /// Somebody kills nodes or the like meanwhile: what comes twice is counted then and is no failure
    #[arg(long)]
    pub faults: bool,
    /// No progress on standard error (there is none either when that is no terminal)
    #[arg(long)]
    pub quiet: bool,
}

/// The server that a bench starts, where it starts nodes of its own.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Nodes of its own")]
pub struct ServerArgs {
    /// Shards of the nodes it starts [default: 16]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..=4096))]
    pub shards: Option<u16>,
    /// The server to start [default: the 'boomerang' beside this program]
    #[arg(long, value_name = "FILE")]
    pub boomerang: Option<PathBuf>,
    /// A further flag for every node, as --node-flag=--window=10m; may be given several times
    #[arg(long = "node-flag", value_name = "FLAG", allow_hyphen_values = true)]
    pub node_flags: Vec<String>,
    /// By how much the nodes give way to this program, as 'nice -n' means it [default: 0; for overload 10]
    ///
    /// On a machine that has more to do than it can, a load that waits for its own turn measures itself: the report's
    /// 'sent_late_us' says by how much.
    #[arg(long, value_name = "N", value_parser = value_parser!(u8).range(0..=19))]
    pub node_nice: Option<u8>,
}

/// Nodes that live as long as the bench, instead of those of `--addr`.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Nodes of its own")]
pub struct OwnArgs {
    /// Start so many nodes on this machine, one cluster, and stop them at the end [default: the node at --addr]
    ///
    /// 1 is a node that is alone. Their data is in a folder of its own below $TMPDIR, which must be on a real disk, and
    /// goes with them: nothing is cancelled. The report then has 'cost_per_1000': what 1,000 tasks cost the nodes in
    /// flushes of their logs, messages and processor time.
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..=9))]
    pub nodes: Option<u16>,
    /// The server they run.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `bench register`.
#[derive(Debug, Args)]
#[command(
    long_about = "How fast tasks are stored, and how long each one takes.\n\n\
        Every connection keeps --inflight registrations under way; the next is sent when an answer has come. \
        'latency_us' is the time from submitting a registration to its answer, so with many under way it is mostly the \
        time in the queue: for the latency of a lone request, use --connections 1 --inflight 1. With --batch, the \
        latency of a task is that of its request. 'per_second' counts acknowledged \
        registrations; 'slices' are the rates of each tenth of them, in the order in which they were acknowledged, so \
        that a run which becomes slower shows it. Afterwards the tasks are cancelled, which is not part of the measurement. With --nodes, the \
        load goes to nodes that live as long as the bench.",
    after_help = "\
Examples:
  boomtool bench register --tasks 200000 --json
  boomtool bench register --tasks 1000000 --batch 100 --inflight 16
  boomtool bench register --tasks 2000 --connections 1 --inflight 1
  boomtool bench register --tasks 3000000 --batch 100 --inflight 16 --keys
  boomtool bench register --tasks 100000 --nodes 3 --connections 64 --inflight 1
  boomtool bench register --tasks 100000 --nodes 1 --shards 4 --node-flag=--window=10m"
)]
pub struct RegisterBench {
    /// How many tasks
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = value_parser!(u64).range(1..))]
    pub tasks: u64,
    /// How far ahead they are due
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = parse_duration)]
    pub delay: Duration,
    /// So many tasks in each request; --inflight counts requests
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=10_000))]
    pub batch: u32,
    /// Give each task a deduplication key of its own, random and unique; shows what keys cost
    #[arg(long)]
    pub keys: bool,
    /// The nodes.
    #[command(flatten)]
    pub own: OwnArgs,
    /// The load.
    #[command(flatten)]
    pub load: LoadArgs,
}

/// How callbacks travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProtocolArg {
    /// Frames over TCP
    Tcp,
    /// Calls over gRPC
    Grpc,
    /// HTTP/1.1
    Http,
    /// Datagrams that are acknowledged
    Udp,
}

impl From<ProtocolArg> for Protocol {
    fn from(protocol: ProtocolArg) -> Self {
        match protocol {
            ProtocolArg::Tcp => Protocol::Tcp,
            ProtocolArg::Grpc => Protocol::Grpc,
            ProtocolArg::Http => Protocol::Http,
            ProtocolArg::Udp => Protocol::Udp,
        }
    }
}

/// `bench fire`.
#[derive(Debug, Args)]
#[command(
    long_about = "How late deliveries are, at a steady rate.\n\n\
        First --pending tasks are registered that are due far away. Then --tasks tasks, whose due instants are spread \
        evenly over --spread and begin --lead from now. Their receiver is this process. 'lateness_us' is the time from \
        the due instant that the node answered to the arrival, stamped right after the read that brought it. Both \
        clocks must be the same or agree well: trust the figure as far as they do. 'latency_us' is that of the \
        registrations. A task that did not come --wait after the last due instant is lost. One that came twice is a \
        failure too, unless --faults says that there was a reason for it. What is left is cancelled.",
    after_help = "\
Examples:
  boomtool bench fire --tasks 60000 --spread 60s --json             # 1,000 per second
  boomtool bench fire --tasks 60000 --spread 60s --pending 1000000  # the same with a million waiting
  boomtool bench fire --tasks 60000 --spread 60s --protocol http
  boomtool bench fire --tasks 60000 --spread 60s --nodes 3          # on a cluster of its own"
)]
pub struct FireBench {
    /// How many tasks fire
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = value_parser!(u64).range(1..))]
    pub tasks: u64,
    /// The time their due instants are spread over
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_timeout)]
    pub spread: Duration,
    /// How many tasks wait meanwhile
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub pending: u64,
    /// How far ahead those are due
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = parse_timeout)]
    pub pending_delay: Duration,
    /// How they are delivered
    #[arg(long, value_name = "PROTOCOL", default_value = "tcp")]
    pub protocol: ProtocolArg,
    /// Time between the first registration and the first due instant
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = parse_duration)]
    pub lead: Duration,
    /// How long after the last due instant deliveries are waited for
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub wait: Duration,
    /// The nodes.
    #[command(flatten)]
    pub own: OwnArgs,
    /// The load.
    #[command(flatten)]
    pub load: LoadArgs,
}

/// `bench drain`.
#[derive(Debug, Args)]
#[command(
    long_about = "How fast tasks go out that are all due at one instant.\n\n\
        'per_second' is counted from the first delivery to the last, 'lateness_us' from the due instant to each \
        arrival, 'latency_us' is that of the registrations. --lead must leave time to register all of them: those \
        acknowledged after the due instant are counted as 'registered_late'.",
    after_help = "\
Examples:
  boomtool bench drain --tasks 100000 --json
  boomtool bench drain --tasks 50000 --nodes 3 --boomerang target/release/boomerang"
)]
pub struct DrainBench {
    /// How many tasks
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = value_parser!(u64).range(1..))]
    pub tasks: u64,
    /// Time between the first registration and the due instant [default: 2s, and 1s more for every 5,000 tasks]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub lead: Option<Duration>,
    /// How long after the due instant deliveries are waited for
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = parse_duration)]
    pub wait: Duration,
    /// The nodes.
    #[command(flatten)]
    pub own: OwnArgs,
    /// The load.
    #[command(flatten)]
    pub load: LoadArgs,
}

/// `bench failover`.
#[derive(Debug, Args)]
#[command(
    long_about = "How long shards do not fire when the node that leads them is killed.\n\n\
        Starts a cluster of its own on this machine, registers --pending tasks that are due far away, and then keeps a \
        steady stream of tasks firing at --rate. --kills times, one node after the other is killed without warning and \
        started again. 'gap_us' is, for each shard the node led, the time between the last delivery of the old leader \
        and the first of the new one, as their receiver saw it; 'lateness_us' is that of all tasks.",
    after_help = "\
Examples:
  boomtool bench failover --kills 20 --pending 100000 --json
  boomtool bench failover --kills 5 --shards 64 --node-flag=--window=10m"
)]
pub struct FailoverBench {
    /// How many times a node is killed
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = value_parser!(u16).range(1..=10_000))]
    pub kills: u16,
    /// Nodes of the cluster
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = value_parser!(u16).range(2..=9))]
    pub nodes: u16,
    /// How many tasks wait meanwhile, due in an hour
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    pub pending: u64,
    /// How many tasks fire per second
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = value_parser!(u64).range(10..=100_000))]
    pub rate: u64,
    /// Between a node's return and the next kill; leaders go back to where they belong meanwhile
    #[arg(long, value_name = "DURATION", default_value = "12s", value_parser = parse_duration)]
    pub pause: Duration,
    /// How long after the last due instant deliveries are waited for
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub wait: Duration,
    /// The server they run.
    #[command(flatten)]
    pub server: ServerArgs,
    /// The load.
    #[command(flatten)]
    pub load: LoadArgs,
}

/// What `bench overload` offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Kind {
    /// Registrations, one with each request; due in an hour or two
    Single,
    /// The same, --batch with each request
    Batch,
    /// The same, one by one, with a deduplication key each
    Keyed,
    /// Registrations of tasks that are due within seconds
    Fire,
    /// Another payload and another time for tasks that were registered one by one
    Edit,
    /// The first page of all tasks that wait
    List,
    /// Cancellations of tasks that were registered one by one
    Cancel,
}

impl Kind {
    pub const COUNT: usize = 7;
    pub const ALL: [Self; Self::COUNT] =
        [Self::Single, Self::Batch, Self::Keyed, Self::Fire, Self::Edit, Self::List, Self::Cancel];

    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Batch => "batch",
            Self::Keyed => "keyed",
            Self::Fire => "fire",
            Self::Edit => "edit",
            Self::List => "list",
            Self::Cancel => "cancel",
        }
    }

    /// Whether it brings new tasks.
    pub fn registers(self) -> bool {
        matches!(self, Self::Single | Self::Batch | Self::Keyed | Self::Fire)
    }
}

/// `bench overload`.
#[derive(Debug, Args)]
#[command(
    long_about = "Whether nodes keep their word that are offered twice what they carry.\n\n\
        Starts a cluster of its own on this machine and finds out what it carries: registrations one by one, with \
        deduplication keys and in batches, tasks that fire, edits, lists and cancellations, all at once, with more and \
        more requests under way until that brings nothing, or answers become slow. Then, for --time, all of them are \
        offered at --factor times their rates, whatever is answered, and nothing is sent twice. What is refused with \
        OVERLOADED is counted, and is no failure.\n\n\
        Exit code 1: an acknowledged task was lost, early or came twice; a request was neither accepted nor refused; \
        the leader of a shard has changed, or more leases ran out than one in ten seconds; everything was carried; 99 of \
        100 accepted registrations took longer than 500 ms, or refusals longer than 50 ms (of lists, 500 ms); a node \
        took more memory than --memory-max, or ended.",
    after_help = "\
Examples:
  boomtool bench overload --json
  boomtool bench overload --time 1m --factor 3 --shards 4
  boomtool bench overload --kinds single,batch,fire --factor 4
  boomtool bench overload --time 30s --calibrate 2s --nodes 1"
)]
pub struct OverloadBench {
    /// So many times what is carried is offered
    #[arg(long, value_name = "X", default_value_t = 2.0, value_parser = parse_factor)]
    pub factor: f64,
    /// What is offered, separated by commas
    #[arg(long, value_name = "KIND", value_enum, value_delimiter = ',', default_values_t = Kind::ALL)]
    pub kinds: Vec<Kind>,
    /// How long it is offered
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = parse_timeout)]
    pub time: Duration,
    /// How long each look at what is carried takes; there are up to eight, and the first quarter of each does not count
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_timeout)]
    pub calibrate: Duration,
    /// Tasks in each request of those that register many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = value_parser!(u32).range(2..=1_000))]
    pub batch: u32,
    /// Connections to the nodes
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = value_parser!(u16).range(1..=1000))]
    pub connections: u16,
    /// Requests under way at most; what would be one more is not sent, and counted as 'held_back'
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub under_way_max: u32,
    /// Size of each payload; its bytes are random
    #[arg(long, value_name = "BYTES", default_value_t = 100)]
    pub payload: usize,
    /// The largest resident memory that a node may come to
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = parse_bytes)]
    pub memory_max: u64,
    /// How long after the last due instant deliveries are waited for
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = parse_duration)]
    pub wait: Duration,
    /// Nodes of the cluster
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = value_parser!(u16).range(1..=9))]
    pub nodes: u16,
    /// The server they run.
    #[command(flatten)]
    pub server: ServerArgs,
    /// No progress on standard error
    #[arg(long)]
    pub quiet: bool,
}

/// `2`, `1.5`.
fn parse_factor(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(factor) if (0.1..=100.0).contains(&factor) => Ok(factor),
        _ => Err("is no number from 0.1 to 100".into()),
    }
}
