//! Processes that are killed, at a chosen instant or at any.
//!
//! The child is this test binary again, asked by its environment for one of the [`MODES`]. It tells on its standard
//! output what it was promised; the parent sends SIGKILL, opens what is left, and holds the store to the promises.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use boomerang_testkit::seed;
use futures::StreamExt;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage, RaftStateMachine};
use openraft::type_config::TypeConfigExt;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::bench::{Bench, append, apply, copy};
use super::log::whole_log;
use super::world::{TERM, World, rows_of};
use crate::raft::types::{TypeConfig, Vote, log_id};
use crate::store::Store;
use crate::store::export::Staging;
use crate::store::rows::Applied;
use crate::task::GroupId;

const GROUP: GroupId = GroupId(1);
const CHURNING: [GroupId; 3] = [GroupId(1), GroupId(2), GroupId(3)];

const MODE: &str = "BOOMERANG_TEST_CHILD";
const FOLDER: &str = "BOOMERANG_TEST_FOLDER";
const CHILD_SEED: &str = "BOOMERANG_TEST_SEED";

type Mode = (&'static str, fn(&Path, u64));

/// What a child does, by name.
const MODES: [Mode; 5] = [
    ("churn", |folder, seed| run(churn(folder, seed))),
    ("purge", |folder, seed| run(purge(folder, seed))),
    ("stage", |folder, seed| run(stage(folder, seed, false))),
    ("ingest", |folder, seed| run(stage(folder, seed, true))),
    ("groups", |folder, seed| run(super::groups::serve_until_killed(folder, seed))),
];

fn run(what: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(what);
}

/// Not a test of its own: what the children run. Without their environment it does nothing.
#[test]
fn child_process() {
    let Ok(mode) = std::env::var(MODE) else { return };
    let (folder, seed) = (std::env::var(FOLDER).unwrap(), std::env::var(CHILD_SEED).unwrap().parse().unwrap());
    let (_, what) = MODES.iter().find(|(name, _)| *name == mode).expect("a known mode");
    what(Path::new(&folder), seed);
}

/// Says something to the parent. It may be killed before it has heard.
pub fn tell(line: &str) {
    let mut out = std::io::stdout().lock();
    // The test harness writes to the same stream and leaves its line open.
    writeln!(out, "\n@{line}").and_then(|()| out.flush()).expect("the parent listens");
}

pub async fn tell_and_wait_for_the_end(line: &str) {
    tell(line);
    std::future::pending::<()>().await;
}

pub struct Child {
    process: std::process::Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Child {
    pub fn start(mode: &str, folder: &Path, seed: u64) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "raft::tests::crash::child_process", "--nocapture", "--test-threads=1"])
            .env(MODE, mode)
            .env(FOLDER, folder)
            .env(CHILD_SEED, seed.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        Self { process, out }
    }

    /// The next thing it tells; `None` when it is dead.
    pub fn next(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.out.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            // The last line of a killed process may be half a line.
            if let Some(told) = line.strip_prefix('@').and_then(|line| line.strip_suffix('\n')) {
                return Some(told.to_owned());
            }
        }
    }

    pub fn wait_for(&mut self, wanted: &str) {
        while self.next().unwrap_or_else(|| panic!("the child ended before it said {wanted}")) != wanted {}
    }

    /// SIGKILL, and what it had told before that.
    pub fn kill(mut self) -> Vec<String> {
        self.process.kill().unwrap();
        let told = std::iter::from_fn(|| self.next()).collect();
        let status = self.process.wait().unwrap();
        assert!(status.code().is_none(), "it was killed and did not end by itself: {status}");
        told
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Appends, applies before the disk has it, flushes and purges, for three groups at once, until it is killed.
async fn churn(folder: &Path, seed: u64) {
    let bench = Arc::new(Bench::open(folder));
    let flushing = bench.store.clone();
    std::thread::spawn(move || {
        loop {
            flushing.flush_state(true).unwrap();
        }
    });
    let groups = CHURNING.map(|group| tokio::spawn(churn_group(bench.clone(), group, seed)));
    futures::future::join_all(groups).await;
}

async fn churn_group(bench: Arc<Bench>, group: GroupId, seed: u64) {
    let (mut log, mut machine) = (bench.log(group), bench.machine(group));
    let next = log.get_log_state().await.unwrap().last_log_id.map_or(0, |id| id.index + 1);
    let applied = machine.applied_state().await.unwrap().0.map_or(0, |id| id.index + 1);
    let tail = log.entries_stream(applied..next).await;
    machine.apply(tail.map(|entry| entry.map(|entry| (entry, None))).boxed()).await.unwrap();
    let mut world = World::at(seed, group, next);
    world.assert_stored(&bench.store);

    let vote = log.read_vote().await.unwrap().map_or(1, |vote| vote.leader_id.term + 1);
    log.save_vote(&Vote::new(vote, 1)).await.unwrap();
    tell(&format!("vote {} {vote}", group.0));
    let mut rng = StdRng::seed_from_u64(seed ^ next);
    let mut flights = Vec::new();
    loop {
        let entries = world.take(rng.random_range(1..6));
        let (done, flushed) = TypeConfig::oneshot();
        log.append(entries.clone(), IOFlushed::signal(done)).await.unwrap();
        let last = entries.last().unwrap().log_id.index;
        apply(&mut machine, entries).await;
        flights.push(tokio::spawn(async move {
            flushed.await.unwrap().unwrap();
            tell(&format!("synced {} {last}", group.0));
        }));
        if flights.len() > 8 {
            futures::future::join_all(flights.drain(..)).await;
        }
        if rng.random_ratio(1, 20) {
            // Up to anything that is applied, durable or not: to purge no more than is sound is the log's duty.
            let purged = rng.random_range(last.saturating_sub(30)..=last);
            log.purge(log_id(TERM, purged)).await.unwrap();
        }
    }
}

#[tokio::test]
async fn rows_and_what_was_applied_agree_after_any_kill() {
    let seed = seed::one();
    let mut rng = seed.rng();
    let temp = tempfile::tempdir().unwrap();
    let mut promised: BTreeMap<(String, u16), u64> = BTreeMap::new();
    let (mut behind, mut purged) = (0, 0);
    for round in 0..10 {
        let mut child = Child::start("churn", temp.path(), *seed);
        let mut told = Vec::new();
        let enough = rng.random_range(6..250);
        while told.len() < enough {
            told.push(child.next().unwrap_or_else(|| panic!("round {round}: the child failed, see above")));
        }
        told.extend(child.kill());
        for line in &told {
            let [what, group, number] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let known = promised.entry((what.to_owned(), group.parse().unwrap())).or_default();
            *known = (*known).max(number.parse().unwrap());
        }
        // Looked at in a copy: what the next child opens was not closed in order.
        let left = copy(temp.path());
        let bench = Bench::open(left.path());
        for group in CHURNING {
            let promise = |what: &str| promised.get(&(what.to_owned(), group.0)).copied().unwrap_or(0);
            let mut log = bench.log(group);
            let entries = whole_log(&mut log).await;
            let state = log.get_log_state().await.unwrap();
            let last = state.last_log_id.map_or(0, |id| id.index);
            assert!(last >= promise("synced"), "round {round} {group}: {last} of {} promised", promise("synced"));
            let vote = log.read_vote().await.unwrap().unwrap().leader_id.term;
            assert!(vote >= promise("vote"), "round {round} {group}: vote {vote}");

            let mut machine = bench.machine(group);
            let applied = machine.applied_state().await.unwrap().0;
            let applied_next = applied.map_or(0, |id| id.index + 1);
            assert!(applied <= state.last_log_id, "round {round} {group}: the state is ahead of its log");
            assert!(state.last_purged_log_id <= applied, "round {round} {group}: purged before it was durable");
            World::at(*seed, group, applied_next).assert_stored(&bench.store);
            // The log holds what the seed makes, and leads from the state to the end.
            let mut world = World::at(*seed, group, last + 1 - entries.len() as u64);
            assert_eq!(entries, world.take(entries.len() as u64));
            let tail = entries.into_iter().filter(|entry| entry.log_id.index >= applied_next);
            apply(&mut machine, tail).await;
            world.assert_stored(&bench.store);
            behind += u32::from(applied_next <= last);
            purged += u32::from(state.last_purged_log_id.is_some());
        }
    }
    assert!(behind > 0 && purged > 0, "the kills came early and late: {behind} {purged}");
}

/// What is asked of the child and of the log afterwards.
const PURGED_ENTRIES: u64 = 60;
const PURGED_UP_TO: u64 = 49;
const FLUSHED: u64 = 20;

async fn purge(folder: &Path, seed: u64) {
    let bench = Bench::open(folder);
    let (mut log, mut machine) = (bench.log(GROUP), bench.machine(GROUP));
    let entries = World::new(seed, GROUP).take(PURGED_ENTRIES);
    append(&mut log, &entries).await;
    let mut entries = entries.into_iter();
    apply(&mut machine, entries.by_ref().take(FLUSHED as usize)).await;
    bench.store.flush_state(true).unwrap();
    apply(&mut machine, entries).await;
    let durable = bench.store.durable_applied(GROUP).unwrap();
    assert_eq!(durable, Some(Applied { term: TERM, index: FLUSHED - 1 }), "the rest is in memory alone");
    log.purge(log_id(TERM, PURGED_UP_TO)).await.unwrap();
    tell_and_wait_for_the_end("purged").await;
}

#[tokio::test]
async fn purge_never_outruns_durable_state() {
    let (temp, seed) = (tempfile::tempdir().unwrap(), seed::one());
    let mut child = Child::start("purge", temp.path(), *seed);
    child.wait_for("purged");
    child.kill();
    let bench = Bench::open(temp.path());
    let (mut log, mut machine) = (bench.log(GROUP), bench.machine(GROUP));
    let entries = whole_log(&mut log).await;
    assert_eq!(entries.len() as u64, PURGED_ENTRIES - PURGED_UP_TO - 1, "it was purged all the same");
    let applied = machine.applied_state().await.unwrap().0.map(|id| id.index);
    assert!(applied >= Some(PURGED_UP_TO), "purged up to {PURGED_UP_TO}, and the state is at {applied:?}");
    apply(&mut machine, entries.into_iter().filter(|entry| Some(entry.log_id.index) > applied)).await;
    World::at(*seed, GROUP, PURGED_ENTRIES).assert_stored(&bench.store);
}

/// The rows before, the rows that come, and those of a neighbour.
const ROWS_BEFORE: u64 = 50;
const ROWS_AFTER: u64 = 300;
const NEIGHBOUR: GroupId = GroupId(2);

async fn stage(folder: &Path, seed: u64, ingest: bool) {
    let bench = Bench::open(folder);
    apply(&mut bench.machine(GROUP), World::new(seed, GROUP).take(ROWS_BEFORE)).await;
    apply(&mut bench.machine(NEIGHBOUR), World::new(seed, NEIGHBOUR).take(ROWS_BEFORE)).await;
    bench.store.flush_state(true).unwrap();
    let rows = other_rows(seed);
    let mut staging = Staging::begin(&bench.store, GROUP, folder.join("staging").join("in")).unwrap();
    let (first, second) = rows.split_at(rows.len() / 2);
    staging.add(first).unwrap();
    if !ingest {
        tell_and_wait_for_the_end("half").await;
    }
    staging.add(second).unwrap();
    let staged = staging.finish().unwrap();
    tell("staged");
    staged.ingest().unwrap();
    tell_and_wait_for_the_end("ingested").await;
}

/// Rows of another history of the same group.
fn other_rows(seed: u64) -> Vec<crate::store::Row> {
    let temp = tempfile::tempdir().unwrap();
    let bench = Bench::open(temp.path());
    let entries = World::new(seed + 1, GROUP).take(ROWS_AFTER);
    futures::executor::block_on(apply(&mut bench.machine(GROUP), entries));
    rows_of(&bench.store, GROUP)
}

fn assert_before(store: &Store, seed: u64) {
    World::at(seed, GROUP, ROWS_BEFORE).assert_stored(store);
    World::at(seed, NEIGHBOUR, ROWS_BEFORE).assert_stored(store);
}

fn assert_after(store: &Store, seed: u64) {
    World::at(seed + 1, GROUP, ROWS_AFTER).assert_stored(store);
    World::at(seed, NEIGHBOUR, ROWS_BEFORE).assert_stored(store);
}

#[tokio::test]
async fn a_kill_while_a_snapshot_is_staged_has_no_effect_and_the_next_try_succeeds() {
    let (temp, seed) = (tempfile::tempdir().unwrap(), seed::one());
    let mut child = Child::start("stage", temp.path(), *seed);
    child.wait_for("half");
    child.kill();
    let folder = temp.path().join("staging").join("in");
    assert!(folder.exists(), "something is left over");
    let bench = Bench::open(temp.path());
    assert_before(&bench.store, *seed);
    let mut staging = Staging::begin(&bench.store, GROUP, folder.clone()).unwrap();
    staging.add(&other_rows(*seed)).unwrap();
    staging.finish().unwrap().ingest().unwrap();
    assert_after(&bench.store, *seed);
    assert!(!folder.exists(), "nothing is left over");
}

#[tokio::test]
async fn a_kill_around_the_ingest_leaves_all_or_nothing() {
    let seed = seed::one();
    // Killed while it ingests: somewhere between these two words.
    for wait_for in ["staged", "staged", "staged", "ingested"] {
        let temp = tempfile::tempdir().unwrap();
        let mut child = Child::start("ingest", temp.path(), *seed);
        child.wait_for(wait_for);
        let told = child.kill();
        let done = wait_for == "ingested" || told.iter().any(|line| line == "ingested");
        let bench = Bench::open(temp.path());
        let applied = bench.machine(GROUP).applied_state().await.unwrap().0.unwrap().index;
        println!("killed after '{wait_for}': applied {applied}");
        if done || applied == ROWS_AFTER - 1 {
            assert_after(&bench.store, *seed);
        } else {
            assert_before(&bench.store, *seed);
        }
    }
}
