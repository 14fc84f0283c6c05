//! `jepsen`: runs, simulates and checks. Parses and calls; the code is in the library.
//!
//! Exit codes: 0 every promise was kept, 1 one was broken or the run failed, 2 wrong usage.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use boomerang::sabotage::Fault;
use boomerang::when::parse_duration;
use clap::{Args, Parser, Subcommand};
use jepsen::check::{self, Limits, Verdict};
use jepsen::cluster::{ClusterSettings, find_binaries};
use jepsen::fault::Kind;
use jepsen::history::edn::{self, Meta};
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
  jepsen check jepsen-report/history.edn"
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
    #[command(after_help = "\
Needs root for namespaces, /dev/net/tun and loop mounts; without them everything runs on loopback, and only what can be
done to processes is done. The same seed makes the same choices; what comes of them also depends on the machine.")]
    Run(Run),
    /// Run simulated clusters, one schedule per seed, in one thread each
    #[command(
        after_help = "A schedule that breaks a promise is named by its seed: `jepsen sim --seed N --schedules 1` runs it again."
    )]
    Sim(Sim),
    /// Judge a history that was written before
    Check {
        /// The file history.edn of a report
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// So much before its due instant a delivery may come
        #[arg(long, value_name = "DURATION", default_value = "0ms", value_parser = parse_duration)]
        early: Duration,
        /// Where a report goes; without it, verdicts are only shown
        #[arg(long, value_name = "FOLDER")]
        out: Option<PathBuf>,
    },
}

#[derive(Args)]
struct Run {
    /// How long faults go on
    #[arg(long, value_name = "DURATION", default_value = "3m", value_parser = parse_duration)]
    time: Duration,
    /// Makes the choices; made up and shown when there is none
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Which faults, or 'mixed' for all of them
    #[arg(long, value_name = "KIND,KIND", default_value = "mixed", value_delimiter = ',')]
    faults: Vec<String>,
    /// Which loads
    #[arg(long, value_name = "LOAD,LOAD", value_delimiter = ',', default_values = load::NAMES)]
    loads: Vec<String>,
    /// Operations per second of all loads together
    #[arg(long, value_name = "N", default_value_t = 80)]
    rate: u32,
    #[arg(long, value_name = "N", default_value_t = 5)]
    nodes: usize,
    #[arg(long, value_name = "N", default_value_t = 6)]
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
    /// Where the report goes: a page, the history as EDN, the verdicts, the logs of all nodes
    #[arg(long, value_name = "FOLDER", default_value = "jepsen-report")]
    out: PathBuf,
    /// No namespaces, even where they are permitted
    #[arg(long)]
    loopback: bool,
    /// What the nodes are broken by on purpose, in a build with assertions
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    sabotage: Vec<Fault>,
}

#[derive(Args)]
struct Sim {
    /// The seed of the first schedule; those that follow have the next ones. Made up and shown when there is none
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How many
    #[arg(long, value_name = "N", default_value_t = 200)]
    schedules: u64,
    /// Threads, each with schedules of its own [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// What the nodes are broken by on purpose, in a build with assertions
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    sabotage: Vec<Fault>,
    /// Where the history of a broken schedule is written
    #[arg(long, value_name = "FOLDER", default_value = "jepsen-report")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match EnvFilter::try_new(&cli.log) {
        Ok(filter) => tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init(),
        Err(error) => return usage(&format!("--log: {error}")),
    }
    match cli.command {
        Command::Run(run) => start(run),
        Command::Sim(sim) => simulate(sim),
        Command::Check { file, early, out } => judge(&file, early, out.as_deref()),
    }
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
    let kinds = match kinds(&asked.faults) {
        Ok(kinds) => kinds,
        Err(why) => return usage(&format!("--faults: {why}")),
    };
    if let Some(name) = asked.loads.iter().find(|name| !load::NAMES.contains(&name.as_str())) {
        return usage(&format!("--loads: nothing is called '{name}'; there are {}", load::NAMES.join(", ")));
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
        ("time", format!("{}s", asked.time.as_secs())),
        ("faults", asked.faults.join(",")),
        ("loads", asked.loads.join(",")),
        ("rate", asked.rate.to_string()),
        ("nodes", asked.nodes.to_string()),
        ("shards", asked.shards.to_string()),
        ("after", format!("{}s", asked.after.as_secs())),
        ("late", format!("{}ms", asked.late.as_millis())),
        ("sabotage", asked.sabotage.iter().map(|fault| fault.name()).collect::<Vec<_>>().join(",")),
    ];
    let named = named.into_iter().filter(|(_, value)| !value.is_empty());
    let settings: BTreeMap<String, String> = named.map(|(name, value)| (name.to_owned(), value)).collect();
    let flags: Vec<String> = settings.iter().map(|(name, value)| format!("--{name} {value}")).collect();
    println!("jepsen run {}", flags.join(" "));
    let settings = RunSettings {
        cluster: ClusterSettings {
            nodes: asked.nodes,
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
    let say = |text: &str| println!("{:>6.1} s  {text}", began.elapsed().as_secs_f64());
    match runtime.block_on(run::run(settings, say)) {
        Err(error) => failed(&error),
        Ok(outcome) => {
            show(&outcome.verdicts);
            println!("{} events; {}", outcome.events, outcome.report.display());
            if outcome.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    }
}

fn kinds(names: &[String]) -> Result<Vec<Kind>, String> {
    match names {
        [all] if all == "mixed" => Ok(Kind::ALL.to_vec()),
        [none] if none == "none" => Ok(Vec::new()),
        names => names.iter().map(|name| name.parse()).collect(),
    }
}

/// Violations shown of each checker; the report has all of them.
const SHOWN: usize = 5;

fn show(verdicts: &[Verdict]) {
    for verdict in verdicts {
        let counts: Vec<String> = verdict.counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let holds = if verdict.holds() { "holds " } else { "BROKEN" };
        println!("{holds}  {:<12} {}", verdict.checker, counts.join(", "));
        for violation in verdict.violations.iter().take(SHOWN) {
            println!("          {}", violation.what);
        }
        if verdict.violations.len() > SHOWN {
            println!("          and {} more", verdict.violations.len() - SHOWN);
        }
    }
}

fn simulate(asked: Sim) -> ExitCode {
    let seed = asked.seed.unwrap_or_else(|| rand::random_range(0..1 << 32));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = asked.threads.unwrap_or(cores);
    println!("jepsen sim --schedules {} --seed {seed}", asked.schedules);
    let began = std::time::Instant::now();
    let say = |text: &str| println!("{:>6.1} s  {text}", began.elapsed().as_secs_f64());
    let summary = sim::many(&Many { seed, schedules: asked.schedules, threads, sabotage: asked.sabotage }, say);
    let (schedules, events, took) = (summary.schedules, summary.events, summary.took.as_secs_f64());
    println!("{schedules} schedules, {events} events, {took:.0} s");
    let Some(broken) = summary.broken else { return ExitCode::SUCCESS };
    show(&broken.outcome.verdicts);
    println!("to see it again: {}", broken.command);
    let meta = Meta { seed: Some(broken.outcome.seed), settings: BTreeMap::new() };
    match report::write(&asked.out, &broken.outcome.history, &broken.outcome.verdicts, &meta) {
        Ok(()) => println!("{}", asked.out.join("index.html").display()),
        Err(error) => eprintln!("error: cannot write the report: {error}"),
    }
    ExitCode::FAILURE
}

fn judge(file: &Path, early: Duration, out: Option<&Path>) -> ExitCode {
    let (history, meta) = match edn::read_file(file) {
        Ok(read) => read,
        Err(error) => return failed(&format!("{}: {error}", file.display())),
    };
    let early_us = u64::try_from(early.as_micros()).unwrap_or(u64::MAX);
    let verdicts = check::all(&history, &Limits { early_us, ..Limits::default() });
    show(&verdicts);
    if let Some(out) = out {
        if let Err(error) = report::write(out, &history, &verdicts, &meta) {
            return failed(&format!("cannot write the report to {}: {error}", out.display()));
        }
        println!("{}", out.join("index.html").display());
    }
    if verdicts.iter().all(Verdict::holds) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
