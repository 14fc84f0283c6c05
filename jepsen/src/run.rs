//! One run against real processes, from the first process to the verdict.
//!
//! ```text
//!   start cluster, load --> faults, for as long as asked --> heal --> load goes on --> stop --> what is left, digests
//!                                                                                                   |
//!                                                             report <-- verdicts <-- checkers <----'
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use boomerang::clock::{Clock, SystemClock};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::check::{self, Limits, Verdict, Violation};
use crate::cluster::{Cluster, ClusterError, ClusterSettings};
use crate::fault::{self, Kind};
use crate::history::{End, History, Meta, Recorder, Stage, Watch, What};
use crate::load::{Load, LoadError, LoadSettings, Target};
use crate::report;

/// So many deliveries come before the first fault, to see that all is well.
const CALM: usize = 150;
const CALM_WITHIN: Duration = Duration::from_secs(30);
/// Tasks may be due so long after they were registered, and be tried again after that.
const PATIENCE: Duration = Duration::from_secs(150);
const TOLD_EVERY: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("cannot write the report to {folder}: {source}")]
    Report { folder: PathBuf, source: std::io::Error },
}

pub struct RunSettings {
    pub cluster: ClusterSettings,
    pub load: LoadSettings,
    /// Which faults, and for how long.
    pub kinds: Vec<Kind>,
    pub time: Duration,
    pub seed: u64,
    /// How long the load goes on after everything was healed.
    pub after: Duration,
    /// How late a task may be a while after that.
    pub late: Duration,
    /// Where the report goes.
    pub out: PathBuf,
    /// As it was asked for, by name.
    pub settings: BTreeMap<String, String>,
}

/// What came of a run.
pub struct Outcome {
    pub verdicts: Vec<Verdict>,
    pub events: usize,
    pub report: PathBuf,
}

impl Outcome {
    pub fn holds(&self) -> bool {
        self.verdicts.iter().all(Verdict::holds)
    }
}

/// The clock of this process, which nobody sets wrong.
struct RunWatch {
    clock: SystemClock,
    began_us: u64,
}

impl Watch for RunWatch {
    fn now_us(&self) -> u64 {
        self.clock.now_us().saturating_sub(self.began_us)
    }
}

fn recorder() -> Recorder {
    let clock = SystemClock::new();
    // In whole milliseconds, as due instants are.
    let began_ms = clock.now_ms();
    Recorder::new(began_ms, RunWatch { clock, began_us: began_ms * 1000 })
}

/// For whoever waits.
fn so_far(history: &History) -> String {
    let mut counts = [0u64; 4];
    for event in &history.events {
        let kind = match &event.what {
            What::End(_, End::Ok(_)) => 0,
            What::End(_, _) => 1,
            What::Delivered(_) => 2,
            What::Fault(note) if note.stage == Stage::Begin => 3,
            _ => continue,
        };
        counts[kind] += 1;
    }
    let [answered, not, delivered, faults] = counts;
    format!("{answered} answered, {not} not, {delivered} delivered, {faults} faults")
}

/// Runs once. `say` hears how far it is.
pub async fn run(settings: RunSettings, say: impl Fn(&str)) -> Result<Outcome, RunError> {
    let recorder = recorder();
    let RunSettings { cluster, load, kinds, time, seed, after, late, out, settings } = settings;
    say(&format!("starting {} nodes and etcd", cluster.nodes));
    let cluster = Cluster::start(cluster, recorder.clone()).await?;
    let target = Target {
        addresses: cluster.addresses(),
        password: cluster.password().to_owned(),
        receiver_host: cluster.receiver_host(),
    };
    let mut load = Load::start(&target, &load, recorder.clone()).await?;
    // All goes well before anything is broken.
    let calm = recorder.until(|history| (history.deliveries().count() >= CALM).then_some(()));
    if tokio::time::timeout(CALM_WITHIN, calm).await.is_err() {
        say("not much is delivered, though nothing is broken yet");
    }
    say(&format!("faults for {time:?}"));
    let stop = CancellationToken::new();
    let faults = fault::run::run(&cluster, seed, &kinds, &stop);
    let over = async {
        let until = Instant::now() + time;
        while Instant::now() < until {
            tokio::time::sleep_until(until.min(Instant::now() + TOLD_EVERY)).await;
            say(&recorder.look(so_far));
        }
        stop.cancel();
    };
    let (begun, ()) = tokio::join!(faults, over);
    say(&format!("{begun} faults; healing"));
    let mut troubles = Vec::new();
    if begun == 0 && !kinds.is_empty() {
        troubles.push("no fault has begun: nothing was put to the test".to_owned());
    }
    match fault::heal(&cluster).await {
        Ok(()) => say(&format!("all is healed; the load goes on for {after:?}")),
        Err(error) => troubles.push(format!("the cluster was not healed: {error}")),
    }
    tokio::time::sleep(after).await;
    load.stop().await;
    say("waiting for what is left");
    // Whatever goes wrong from here on, what was seen is judged and written down.
    if let Err(error) = load.account(PATIENCE).await {
        troubles.push(format!("what is left cannot be known: {error}"));
    }
    if let Err(error) = cluster.record_digests().await {
        troubles.push(format!("replicas cannot be compared: {error}"));
    }
    troubles.extend(cluster.own_ends());
    let history = recorder.so_far();
    say(&format!("checking {} events", history.events.len()));
    let late_us = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
    let mut verdicts = check::all(&history, &Limits { late_us, ..Limits::default() });
    troubles.extend(nothing_seen(&verdicts));
    verdicts.push(no_trouble(troubles));
    let meta = Meta { seed: Some(seed), settings };
    report::write(&out, &history, &verdicts, &meta)
        .map_err(|source| RunError::Report { folder: out.clone(), source })?;
    cluster.stop().await;
    Ok(Outcome { verdicts, events: history.events.len(), report: out.join("index.html") })
}

/// What the run itself has to say.
fn no_trouble(troubles: Vec<String>) -> Verdict {
    let violations: Vec<Violation> = troubles.into_iter().map(|what| Violation { what, events: Vec::new() }).collect();
    Verdict {
        checker: "nodes",
        promise: "No node ends by itself, and a cluster gets whole again when all is mended",
        counts: vec![("violations", violations.len() as u64)],
        violations,
    }
}

/// Verdicts about nothing are worth nothing.
fn nothing_seen(verdicts: &[Verdict]) -> Vec<String> {
    let needed = [("lost", "acknowledged"), ("lost", "deliveries"), ("digests", "groups_compared")];
    let count = |checker: &str, name: &str| {
        let verdict = verdicts.iter().find(|verdict| verdict.checker == checker)?;
        verdict.counts.iter().find(|(counted, _)| *counted == name).map(|(_, count)| *count)
    };
    let missing = needed.into_iter().filter(|(checker, name)| count(checker, name).unwrap_or(0) == 0);
    missing.map(|(checker, name)| format!("nothing was seen: {checker} counts no {name}")).collect()
}
