//! `jepsen`: runs, simulates, checks and exports. Parses and calls; the code is in the library.
//!
//! Exit codes: 0 every promise was kept, or all was exported; 1 one was broken, or something failed; 2 wrong usage.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use boomerang::sabotage::Fault;
use boomerang_task::SHARDS_MAX;
use boomerang_task::when::{format_duration, parse_duration};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, value_parser};
use jepsen::check::{self, Limits, Verdict};
use jepsen::cluster::{ClusterSettings, find_binaries};
use jepsen::fault::Kind;
use jepsen::history::{Meta, edn, stored};
use jepsen::load::{self, LoadSettings};
use jepsen::report;
use jepsen::run::{self, RunSettings};
use jepsen::sim::{self, Many};
use tracing_subscriber::EnvFilter;

/// Fault tests of Boomerang: a real cluster under faults, or a simulated one, and checkers that say which promise was broken.
#[derive(Parser)]
#[command(
    name = "jepsen",
    version,
    after_help = "\
Examples:
  jepsen run --time 5m
  jepsen run --time 1h --seed 7 --faults kill,partition,clock
  jepsen sim --schedules 10000 --seed 1
  jepsen check jepsen-report/history.jsonl
  jepsen export jepsen-report/history.jsonl > history.edn"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// What to log, for example 'info' or 'jepsen=debug'
    #[arg(long, global = true, value_name = "FILTER", default_value = "jepsen=warn")]
    log: String,
}

#[derive(Subcommand)]
enum Command {
    /// Run a cluster of real processes under load and faults, each node in a network namespace of its own
    #[command(
        after_help = "Needs root for namespaces, /dev/net/tun and loop mounts; without them everything runs on loopback, and \
                      what is done to networks and disks is left out. The same seed makes the same choices; what comes of \
                      them also depends on the machine."
    )]
    Run(Run),
    /// Run simulated clusters, one schedule per seed, until all are done or one has broken a promise
    #[command(
        after_help = "A schedule that breaks a promise is named by its seed: `jepsen sim --schedules 1 --seed N` runs it again, \
                      with the same build."
    )]
    Sim(Sim),
    /// Judge a history that was written before
    #[command(
        after_help = "Limits are those of `jepsen run`; what the run itself says (`nodes`) is not in a history. Schedules of \
                      `jepsen sim` have tighter limits for lateness, and clocks that are always a little wrong where the seed \
                      is odd, which wants --early 300ms here."
    )]
    Check(Check),
    /// Print a history that was written before as EDN, for other checkers, such as Jepsen's own
    #[command(after_help = "\
One line for each event, as Jepsen has them, for example:
  {:index 0, :time 1200000, :type :invoke, :process 3, :f :cancel, :value {:token 9, :task \"t\"}}
  {:index 1, :time 1900000, :type :ok, :process 3, :f :cancel, :value {:answer :cancelled}}

Operations begin with :invoke and end with :ok, :fail or, when nobody knows whether they happened, :info. What \
receivers saw, what was broken, and what the cluster said of itself is :info of the processes :receiver, :nemesis and \
:observer.

:time is nanoseconds since the run began, and instants in :value, such as :due-ms, are milliseconds since 1970. When \
the run began, its seed and its settings are in the first line of FILE alone.

Example:
  jepsen export jepsen-report/history.jsonl > history.edn")]
    Export(Export),
}

#[derive(Args)]
struct Check {
    /// The file history.jsonl of a report
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// So much before its due instant a delivery may come, also while no clock is wrong
    #[arg(long, value_name = "DURATION", default_value = "0ms", value_parser = parse_duration)]
    early: Duration,
    /// How late a task may be when all has been well again for a while [default: as in the run, or 500ms]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    late: Option<Duration>,
    /// Where a report goes; without it, verdicts are only shown
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

#[derive(Args)]
struct Export {
    /// The file history.jsonl of a report
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// All faults.
const MIXED: &str = "mixed";
/// Load alone.
const NONE: &str = "none";
/// Each shard has three replicas, and the machines of a run have addresses of one byte.
const NODES: std::ops::RangeInclusive<i64> = 3..=99;

fn sabotage() -> impl TypedValueParser<Value = Fault> {
    PossibleValuesParser::new(Fault::ALL.map(Fault::name)).try_map(|name| name.parse::<Fault>())
}

#[derive(Args)]
struct Run {
    /// How long faults go on
    #[arg(long, value_name = "DURATION", default_value = "3m", value_parser = parse_duration)]
    time: Duration,
    /// Makes the choices; made up and shown when there is none
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Which faults; 'mixed' is all of them
    #[arg(long, value_name = "KIND,KIND", default_value = MIXED, value_delimiter = ',')]
    #[arg(value_parser = PossibleValuesParser::new([MIXED, NONE].into_iter().chain(Kind::ALL.map(Kind::name))))]
    faults: Vec<String>,
    /// Which loads
    #[arg(long, value_name = "LOAD,LOAD", value_delimiter = ',', default_values = load::NAMES, hide_default_value = true)]
    #[arg(value_parser = PossibleValuesParser::new(load::NAMES))]
    loads: Vec<String>,
    /// Operations per second of all loads together
    #[arg(long, value_name = "N", default_value_t = 80, value_parser = value_parser!(u32).range(1..))]
    rate: u32,
    /// Nodes of the cluster, from 3 to 99
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = value_parser!(u8).range(NODES))]
    nodes: u8,
    /// Shards of the cluster, each with three replicas
    #[arg(long, value_name = "N", default_value_t = 6)]
    #[arg(value_parser = value_parser!(u16).range(1..=i64::from(SHARDS_MAX)))]
    shards: u16,
    /// How long the load goes on when all is healed
    #[arg(long, value_name = "DURATION", default_value = "25s", value_parser = parse_duration)]
    after: Duration,
    /// How late a task may be when all has been well again for a while; more on a machine that has other work
    #[arg(long, value_name = "DURATION", default_value = "500ms", value_parser = parse_duration)]
    late: Duration,
    /// Folder of boomerang and boomtool [default: that of this program]
    #[arg(long, value_name = "FOLDER")]
    binaries: Option<PathBuf>,
    /// Where the report goes: a page, the history, the verdicts, the logs of all nodes
    #[arg(long, value_name = "FOLDER", default_value = "jepsen-report")]
    out: PathBuf,
    /// No namespaces, even where they are permitted
    #[arg(long)]
    loopback: bool,
    /// What the nodes are broken by on purpose, in a build with assertions
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',', value_parser = sabotage())]
    sabotage: Vec<Fault>,
}

#[derive(Args)]
struct Sim {
    /// The seed of the first schedule; those that follow have the next ones. Made up and shown when there is none
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How many
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = value_parser!(u64).range(1..))]
    schedules: u64,
    /// Threads, each with schedules of its own [default: one per core]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// What the nodes are broken by on purpose, in a build with assertions
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',', value_parser = sabotage())]
    sabotage: Vec<Fault>,
    /// Where the report of a schedule goes that has broken a promise
    #[arg(long, value_name = "FOLDER", default_value = "jepsen-report")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match EnvFilter::try_new(&cli.log) {
        Ok(filter) => tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init(),
        Err(error) => return usage(&format!("--log: {error}")),
    }
    match cli.command {
        Command::Run(run) => start(run),
        Command::Sim(sim) => simulate(sim),
        Command::Check(check) => judge(check),
        Command::Export(export) => print_edn(&export),
    }
}

/// Whoever reads it may have seen enough; the report is written all the same.
fn tell(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}

fn usage(error: &str) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::from(2)
}

fn failed(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}

fn start(asked: Run) -> ExitCode {
    let seed = asked.seed.unwrap_or_else(|| rand::random_range(0..1 << 32));
    let is_asked = |kind: &Kind| asked.faults.iter().any(|name| name == MIXED || name == kind.name());
    let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(is_asked).collect();
    if asked.time.is_zero() && !kinds.is_empty() {
        return usage("--time: in no time nothing is broken; `--faults none` is load alone");
    }
    let Some(binaries) = asked.binaries.clone().or_else(find_binaries) else {
        return usage(
            "--binaries: there is no boomerang and no boomtool beside this program; `cargo build` makes them",
        );
    };
    for program in ["boomerang", "boomtool"] {
        if !binaries.join(program).is_file() {
            return usage(&format!("--binaries: there is no {program} in {}", binaries.display()));
        }
    }
    let named = [
        ("seed", seed.to_string()),
        ("time", shown(asked.time)),
        ("faults", asked.faults.join(",")),
        ("loads", asked.loads.join(",")),
        ("rate", asked.rate.to_string()),
        ("nodes", asked.nodes.to_string()),
        ("shards", asked.shards.to_string()),
        ("after", shown(asked.after)),
        (LATE, shown(asked.late)),
        ("sabotage", asked.sabotage.iter().map(|fault| fault.name()).collect::<Vec<_>>().join(",")),
    ];
    let named = named.into_iter().filter(|(_, value)| !value.is_empty());
    let mut settings: BTreeMap<String, String> = named.map(|(name, value)| (name.to_owned(), value)).collect();
    let flags: Vec<String> = settings.iter().map(|(name, value)| format!("--{name} {value}")).collect();
    let command = format!("jepsen run {}", flags.join(" "));
    tell(&command);
    settings.insert(report::COMMAND.to_owned(), command);
    let settings = RunSettings {
        cluster: ClusterSettings {
            nodes: usize::from(asked.nodes),
            shards: asked.shards,
            seed,
            sabotage: asked.sabotage,
            loopback: asked.loopback,
            logs: Some(asked.out.join("logs")),
            ..ClusterSettings::new(binaries)
        },
        load: LoadSettings { loads: asked.loads, seed, rate: asked.rate },
        kinds,
        time: asked.time,
        seed,
        after: asked.after,
        late: asked.late,
        out: asked.out,
        settings,
    };
    let runtime = tokio::runtime::Runtime::new().expect("the system has room for a runtime");
    let began = std::time::Instant::now();
    let say = |text: &str| tell(&format!("{:>6.1} s  {text}", began.elapsed().as_secs_f64()));
    match runtime.block_on(run::run(settings, say)) {
        Err(error) => failed(&error),
        Ok(outcome) => {
            show(&outcome.verdicts);
            tell(&format!("{} events; {}", outcome.events, outcome.report.display()));
            if outcome.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    }
}

/// What a run was recorded under tells later how it was judged.
const LATE: &str = "late";

fn shown(span: Duration) -> String {
    format_duration(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
}

/// Violations shown of each checker; the report has all of them.
const SHOWN: usize = 5;

fn show(verdicts: &[Verdict]) {
    for verdict in verdicts {
        let counts: Vec<String> = verdict.counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let holds = if verdict.holds() { "holds " } else { "BROKEN" };
        tell(&format!("{holds}  {:<12} {}", verdict.checker, counts.join(", ")));
        for violation in verdict.violations.iter().take(SHOWN) {
            tell(&format!("          {}", violation.what));
        }
        if verdict.violations.len() > SHOWN {
            tell(&format!("          and {} more", verdict.violations.len() - SHOWN));
        }
    }
}

fn simulate(asked: Sim) -> ExitCode {
    let seed = asked.seed.unwrap_or_else(|| rand::random_range(0..1 << 32));
    if seed.checked_add(asked.schedules).is_none() {
        return usage(&format!("--seed: no {} seeds follow {seed}", asked.schedules));
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = asked.threads.map_or(cores, usize::from);
    tell(&format!("jepsen sim --schedules {} --seed {seed}", asked.schedules));
    let began = std::time::Instant::now();
    let say = |text: &str| tell(&format!("{:>6.1} s  {text}", began.elapsed().as_secs_f64()));
    let summary = sim::many(&Many { seed, schedules: asked.schedules, threads, sabotage: asked.sabotage }, say);
    let (schedules, events, took) = (summary.schedules, summary.events, summary.took.as_secs_f64());
    tell(&format!("{schedules} schedules, {events} events, {took:.0} s"));
    let Some(broken) = summary.broken else { return ExitCode::SUCCESS };
    show(&broken.outcome.verdicts);
    tell(&format!("to see it again: {}", broken.command));
    let settings = BTreeMap::from([(report::COMMAND.to_owned(), broken.command)]);
    let meta = Meta { seed: Some(broken.outcome.seed), settings };
    match report::write(&asked.out, &broken.outcome.history, &broken.outcome.verdicts, &meta) {
        Ok(()) => tell(&format!("{}", asked.out.join("index.html").display())),
        Err(error) => eprintln!("error: cannot write the report: {error}"),
    }
    ExitCode::FAILURE
}

fn judge(asked: Check) -> ExitCode {
    let (history, meta) = match stored::read_file(&asked.file) {
        Ok(read) => read,
        Err(error) => return failed(&format!("{}: {error}", asked.file.display())),
    };
    let us = |span: Duration| u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
    let recorded = || meta.settings.get(LATE).and_then(|late| parse_duration(late).ok());
    let default = Limits::default();
    let late_us = asked.late.or_else(recorded).map_or(default.late_us, us);
    let verdicts = check::all(&history, &Limits { early_us: us(asked.early), late_us, ..default });
    show(&verdicts);
    if let Some(out) = asked.out {
        if let Err(error) = report::write(&out, &history, &verdicts, &meta) {
            return failed(&format!("cannot write the report to {}: {error}", out.display()));
        }
        tell(&format!("{}", out.join("index.html").display()));
    }
    if verdicts.iter().all(Verdict::holds) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print_edn(asked: &Export) -> ExitCode {
    let history = match stored::read_file(&asked.file) {
        Ok((history, _)) => history,
        Err(error) => return failed(&format!("{}: {error}", asked.file.display())),
    };
    match edn::write(&history, BufWriter::new(io::stdout().lock())) {
        // Whoever reads it may have seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => failed(&format!("cannot write: {error}")),
        _ => ExitCode::SUCCESS,
    }
}
