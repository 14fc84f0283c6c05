//! A shard as a stream and back, and the same state by every way that leads to it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use boomerang_testkit::seed;
use futures::FutureExt;
use openraft::storage::{RaftSnapshotBuilder, RaftStateMachine};
use rand::RngExt;

use super::bench::{Bench, apply};
use super::world::{TERM, World, membership, rows_of};
use crate::inspect::{digest, dump};
use crate::raft::state_machine::{SnapshotData, decode_membership};
use crate::raft::types::{SnapshotMeta, StoredMembership, log_id};
use crate::store::export::{Export, Staged, Staging, export};
use crate::store::keys::Key;
use crate::store::rows::Applied;
use crate::store::{Row, Store, codec};
use crate::task::{GroupId, TaskId};

const GROUP: GroupId = GroupId(1);
const NEIGHBOUR: GroupId = GroupId(2);
/// While it is exported.
const WRITTEN: u64 = 10 + 3 * 1_500;
/// The writer waits for the reader, or there would be one moment only.
const AHEAD_MAX: u64 = 400;

fn meta_at(index: u64) -> SnapshotMeta {
    let last_membership = StoredMembership::new(Some(log_id(TERM, 0)), membership());
    SnapshotMeta { last_log_id: Some(log_id(TERM, index)), last_membership }
}

async fn rows_in(mut export: Export) -> Vec<Row> {
    let mut rows = Vec::new();
    while let Some(chunk) = export.chunks.recv().await {
        rows.extend(chunk.unwrap());
    }
    rows
}

fn staged(store: &Store, folder: &Path, rows: &[Row]) -> Staged {
    let mut staging = Staging::begin(store, GROUP, folder.join("staging").join("in")).unwrap();
    // In pieces, as they come from a peer.
    rows.chunks(17).for_each(|rows| staging.add(rows).unwrap());
    staging.finish().unwrap()
}

fn text(store: &Store) -> String {
    let mut out = Vec::new();
    dump(store, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_is_of_one_moment_while_entries_are_applied() {
    let (temp, seed) = (tempfile::tempdir().unwrap(), seed::one());
    let bench = Bench::open(temp.path());
    let mut machine = bench.machine(GROUP);
    let mut world = World::new(*seed, GROUP);
    apply(&mut machine, world.take(10)).await;
    let seen = Arc::new(AtomicU64::new(0));
    let seen_by_writer = seen.clone();
    let writer = tokio::spawn(async move {
        while world.next < WRITTEN {
            if world.next < seen_by_writer.load(Ordering::Relaxed) + AHEAD_MAX {
                apply(&mut machine, world.take(3)).await;
            }
            tokio::task::yield_now().await;
        }
    });
    // Follows the writer, so that each moment is compared with what was applied by then.
    let mut world = World::new(*seed, GROUP);
    let mut moments = Vec::new();
    while moments.last().is_none_or(|last| last + 1 < WRITTEN) {
        let head = vec![Key::applied(GROUP), Key::membership(GROUP), Key::task(GROUP, TaskId::from_stored([0; 16]))];
        let export = export(bench.store.clone(), GROUP, head).await.unwrap();
        let [Some(applied), Some(member), None] = &export.head[..] else { panic!("three answers, in their order") };
        let applied: Applied = codec::decode("last applied", applied).unwrap();
        assert_eq!(decode_membership(member).unwrap(), meta_at(0).last_membership);
        world.take(applied.index + 1 - world.next);
        world.assert_rows(rows_in(export).await);
        moments.push(applied.index);
        seen.store(applied.index, Ordering::Relaxed);
    }
    writer.await.unwrap();
    assert!(moments.len() as u64 >= WRITTEN / AHEAD_MAX, "it was written to meanwhile: {moments:?}");
}

#[tokio::test]
async fn an_export_that_nobody_takes_ends() {
    let seed = seed::one();
    let temp = tempfile::tempdir().unwrap();
    let bench = Bench::open(temp.path());
    apply(&mut bench.machine(GROUP), World::new(*seed, GROUP).take(3000)).await;
    let export = export(bench.store.clone(), GROUP, Vec::new()).await.unwrap();
    drop(export);
    // Its thread, which held the database, is gone by now: whoever closes it is the last.
    let path = bench.folder.clone();
    drop(bench);
    Store::open(&path.join("db")).expect("nobody else has it open");
}

#[tokio::test]
async fn an_export_that_nobody_waits_for_ends() {
    let temp = tempfile::tempdir().unwrap();
    let bench = Bench::open(temp.path());
    let mut asked = Box::pin(export(bench.store.clone(), GROUP, Vec::new()));
    let _: Option<_> = asked.as_mut().now_or_never();
    drop(asked);
    drop(bench);
    Store::open(&temp.path().join("db")).expect("nobody else has it open");
}

#[tokio::test]
async fn an_installed_snapshot_replaces_its_group_and_no_other() {
    let seed = seed::one();
    let (from_temp, to_temp) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (from, to) = (Bench::open(from_temp.path()), Bench::open(to_temp.path()));
    let mut source = from.machine(GROUP);
    let mut world = World::new(*seed, GROUP);
    apply(&mut source, world.take(400)).await;

    // Another history of this group, partly flushed, and a neighbour's.
    let mut machine = to.machine(GROUP);
    let mut other = World::new(*seed + 1, GROUP);
    apply(&mut machine, other.take(150)).await;
    to.store.flush_state(true).unwrap();
    apply(&mut machine, other.take(100)).await;
    let mut neighbour = World::new(*seed, NEIGHBOUR);
    let mut neighbour_machine = to.machine(NEIGHBOUR);
    apply(&mut neighbour_machine, neighbour.take(150)).await;

    let rows = rows_of(&from.store, GROUP);
    let staged = staged(&to.store, to_temp.path(), &rows);
    other.assert_stored(&to.store);
    machine.install_snapshot(&meta_at(399), SnapshotData::Staged(staged)).await.unwrap();
    assert_eq!(machine.applied_state().await.unwrap(), (meta_at(399).last_log_id, meta_at(399).last_membership));
    assert_eq!(digest(&to.store, GROUP).unwrap(), digest(&from.store, GROUP).unwrap(), "{}", text(&to.store));
    world.assert_stored(&to.store);
    neighbour.assert_stored(&to.store);
    assert_eq!(to.store.durable_applied(GROUP).unwrap(), Some(Applied { term: TERM, index: 399 }), "it is durable");

    // Rows that came in files are removed by SingleDelete like those that were written, and stay away.
    for step in 0..4 {
        let entries = world.take(200);
        apply(&mut source, entries.clone()).await;
        apply(&mut machine, entries).await;
        apply(&mut neighbour_machine, neighbour.take(50)).await;
        match step {
            1 => to.store.flush_state(true).unwrap(),
            2 => to.store.compact_state(),
            _ => {}
        }
        world.assert_stored(&to.store);
        neighbour.assert_stored(&to.store);
        assert_eq!(digest(&to.store, GROUP).unwrap(), digest(&from.store, GROUP).unwrap());
    }
    to.store.compact_state();
    drop((to, machine, neighbour_machine));
    let to = Bench::open(to_temp.path());
    world.assert_stored(&to.store);
    neighbour.assert_stored(&to.store);
    // A group can come twice; the second time it meets what the first one brought.
    let staged = self::staged(&to.store, to_temp.path(), &rows);
    to.machine(GROUP).install_snapshot(&meta_at(399), SnapshotData::Staged(staged)).await.unwrap();
    World::at(*seed, GROUP, 400).assert_stored(&to.store);
    to.store.compact_state();
    World::at(*seed, GROUP, 400).assert_stored(&to.store);
    neighbour.assert_stored(&to.store);
}

#[tokio::test]
async fn a_snapshot_that_is_not_what_it_says_is_refused() {
    let (temp, seed) = (tempfile::tempdir().unwrap(), seed::one());
    let bench = Bench::open(temp.path());
    apply(&mut bench.machine(GROUP), World::new(*seed, GROUP).take(50)).await;
    apply(&mut bench.machine(NEIGHBOUR), World::new(*seed, NEIGHBOUR).take(5)).await;
    let mut rows = rows_of(&bench.store, GROUP);
    let folder = temp.path().join("staging").join("in");
    let refused =
        |rows: &[Row]| Staging::begin(&bench.store, GROUP, folder.clone()).unwrap().add(rows).unwrap_err().to_string();
    assert!(refused(&rows_of(&bench.store, NEIGHBOUR)).contains("another group"));
    rows.swap(3, 4);
    assert!(refused(&rows).contains("not in order"));
    rows[3] = rows[4].clone();
    assert!(refused(&rows).contains("not in order"), "a key cannot come twice");
    assert!(!folder.exists(), "nothing is left over");

    let mut machine = bench.machine(GROUP);
    let marker = machine.install_snapshot(&meta_at(49), SnapshotData::Marker).await.unwrap_err().to_string();
    assert!(marker.contains("holds no rows"), "{marker}");
    let rows = rows_of(&bench.store, GROUP);
    // Refused before anything is lost: the shard is as it was.
    let staged = staged(&bench.store, temp.path(), &rows[..rows.len() - 3]);
    let error = machine.install_snapshot(&meta_at(60), SnapshotData::Staged(staged)).await.unwrap_err().to_string();
    assert!(error.contains("it says it holds"), "{error}");
    World::at(*seed, GROUP, 50).assert_stored(&bench.store);
}

#[tokio::test]
async fn the_marker_is_what_is_durable_and_a_forced_one_is_everything() {
    let (temp, seed) = (tempfile::tempdir().unwrap(), seed::one());
    let bench = Bench::open(temp.path());
    let mut world = World::new(*seed, GROUP);
    let mut machine = bench.machine(GROUP);
    apply(&mut machine, world.take(20)).await;
    bench.store.flush_state(true).unwrap();
    apply(&mut machine, world.take(20)).await;
    let mut build = async |force| {
        machine.try_create_snapshot_builder(force).await.unwrap().build_snapshot().await.unwrap().meta.last_log_id
    };
    assert_eq!(build(false).await, Some(log_id(TERM, 19)));
    assert_eq!(build(true).await, Some(log_id(TERM, 39)));
    assert_eq!(build(false).await, Some(log_id(TERM, 39)), "a forced one makes it durable first");
}

#[tokio::test]
async fn every_way_to_an_index_leads_to_the_same_state() {
    let seed = seed::one();
    let mut rng = seed.rng();
    const ENTRIES: u64 = 500;
    let mut digests = Vec::new();
    let temps: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
    // At once; in small pieces with flushes and reopenings; and from its middle, twice, by a snapshot.
    let bench = Bench::open(temps[0].path());
    apply(&mut bench.machine(GROUP), World::new(*seed, GROUP).take(ENTRIES)).await;
    World::at(*seed, GROUP, ENTRIES).assert_stored(&bench.store);
    digests.push(digest(&bench.store, GROUP).unwrap());

    let mut bench = Bench::open(temps[1].path());
    let mut world = World::new(*seed, GROUP);
    let middle = rng.random_range(1..ENTRIES);
    let mut rows = None;
    while world.next < ENTRIES {
        let end = if world.next < middle { middle } else { ENTRIES };
        let count = rng.random_range(1..30).min(end - world.next);
        apply(&mut bench.machine(GROUP), world.take(count)).await;
        if world.next == middle {
            rows = Some(rows_of(&bench.store, GROUP));
        }
        match rng.random_range(0..10) {
            0..=2 => bench.store.flush_state(true).unwrap(),
            3 => {
                drop(bench);
                bench = Bench::open(temps[1].path());
            }
            4 => bench.store.compact_state(),
            _ => {}
        }
    }
    digests.push(digest(&bench.store, GROUP).unwrap());

    let rows = rows.expect("the middle was met");
    for temp in &temps[2..] {
        let bench = Bench::open(temp.path());
        let mut machine = bench.machine(GROUP);
        let staged = staged(&bench.store, temp.path(), &rows);
        machine.install_snapshot(&meta_at(middle - 1), SnapshotData::Staged(staged)).await.unwrap();
        apply(&mut machine, World::at(*seed, GROUP, middle).take(ENTRIES - middle)).await;
        digests.push(digest(&bench.store, GROUP).unwrap());
    }
    for digest in &digests[1..] {
        assert_eq!(digest, &digests[0], "middle {middle}");
    }
    println!("{}", digests[0]);
}
