//! What is durable when, what a torn WAL leaves behind, and the entries in memory against those on disk.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use boomerang_testkit::seed;
use futures::{StreamExt, TryStreamExt, poll};
use openraft::entry::{Entry, EntryPayload};
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage, RaftStateMachine};
use openraft::type_config::TypeConfigExt;
use rand::{RngExt, rngs::StdRng};

use super::bench::{Bench, PowerCut, append, apply, copy, wal_files};
use super::world::{TERM, World, rows_of};
use crate::raft::log_store::LogStore;
use crate::raft::types::{Command, LogEntry, TypeConfig, Vote, log_id};
use crate::store::LogWrite;
use crate::store::keys::Key;
use crate::task::GroupId;

const GROUP: GroupId = GroupId(1);

/// All entries of a log, which is checked to have no hole between what was purged and its end.
pub async fn whole_log(log: &mut LogStore) -> Vec<LogEntry> {
    let state = log.get_log_state().await.unwrap();
    let entries = log.try_get_log_entries(..).await.unwrap();
    let first = state.last_purged_log_id.map_or(0, |id| id.index + 1);
    for (expected, entry) in (first..).zip(&entries) {
        assert_eq!(entry.log_id.index, expected, "a log has no holes");
    }
    let last = entries.last().map(|entry| entry.log_id);
    assert_eq!(state.last_log_id, last.or(state.last_purged_log_id), "the end is the last entry");
    entries
}

#[tokio::test]
async fn a_vote_is_durable_when_it_is_said_to_be() {
    let temp = tempfile::tempdir().unwrap();
    let (bench, rounds) = Bench::open_unsynced(temp.path());
    let mut cut = PowerCut::new(&bench);
    let mut log = bench.log(GROUP);
    for term in 1..4 {
        let (before, vote) = (Vote::new(term - 1, 1), Vote::new_committed(term, 1));
        let mut log_of_vote = log.clone();
        let mut saved = Box::pin(log_of_vote.save_vote(&vote));
        assert!(poll!(&mut saved).is_pending(), "nothing is on disk yet");
        let found = Bench::open(cut.cut().path()).log(GROUP).read_vote().await.unwrap();
        assert_eq!(found.map(|vote| vote.leader_id), (term > 1).then_some(before.leader_id));
        cut.sync(&rounds);
        saved.await.unwrap();
        let after = cut.cut();
        assert_eq!(Bench::open(after.path()).log(GROUP).read_vote().await.unwrap(), Some(vote));
    }
    assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new_committed(3, 1)));
}

#[tokio::test]
async fn entries_are_durable_when_their_callback_is_called_and_the_rest_leaves_no_hole() {
    let seed = seed::one();
    let temp = tempfile::tempdir().unwrap();
    let (bench, rounds) = Bench::open_unsynced(temp.path());
    let mut cut = PowerCut::new(&bench);
    let mut log = bench.log(GROUP);
    let entries = World::new(*seed, GROUP).take(40);
    for (part, chunk) in entries.chunks(10).enumerate() {
        let (done, mut flushed) = TypeConfig::oneshot();
        log.append(chunk.to_vec(), IOFlushed::signal(done)).await.unwrap();
        assert_eq!(whole_log(&mut log).await.len(), 10 * (part + 1), "entries can be read at once");
        assert!(poll!(&mut flushed).is_pending(), "nothing is on disk yet");
        let after = cut.cut();
        assert_eq!(whole_log(&mut Bench::open(after.path()).log(GROUP)).await, entries[..10 * part]);
        cut.sync(&rounds);
        flushed.await.expect("answered by the round").unwrap();
        let after = cut.cut();
        assert_eq!(whole_log(&mut Bench::open(after.path()).log(GROUP)).await, entries[..10 * (part + 1)]);
    }
}

/// A follower may apply what a majority elsewhere has on disk before its own disk has it. So the state must take its
/// log along when it is flushed: a state ahead of its log would be a hole.
#[tokio::test]
async fn a_flushed_state_takes_its_log_to_disk_with_it() {
    let temp = tempfile::tempdir().unwrap();
    let (bench, _never_synced) = Bench::open_unsynced(temp.path());
    let cut = PowerCut::new(&bench);
    let (mut log, mut machine) = (bench.log(GROUP), bench.machine(GROUP));
    let seed = seed::one();
    let entries = World::new(*seed, GROUP).take(60);
    for (part, chunk) in entries.chunks(20).enumerate() {
        log.append(chunk.to_vec(), IOFlushed::noop()).await.unwrap();
        apply(&mut machine, chunk.to_vec()).await;
        let after = cut.cut();
        let bench_after = Bench::open(after.path());
        assert_eq!(whole_log(&mut bench_after.log(GROUP)).await, entries[..20 * part], "what was flushed before");
        World::at(*seed, GROUP, 20 * part as u64).assert_stored(&bench_after.store);
        bench.store.flush_state(true).unwrap();
    }
    let bench_after = Bench::open(cut.cut().path());
    assert_eq!(whole_log(&mut bench_after.log(GROUP)).await, entries);
    World::at(*seed, GROUP, 60).assert_stored(&bench_after.store);
}

/// What a machine can leave at the end of a file it was writing.
#[derive(Debug, Clone, Copy)]
enum Damage {
    Cut,
    Zeros,
    Garbage,
    /// One bit; the rest is as it was.
    Bit,
}

fn damage(path: &Path, at: u64, len: u64, kind: Damage, rng: &mut StdRng) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    match kind {
        Damage::Cut => file.set_len(at).unwrap(),
        Damage::Zeros => file.write_all_at(&vec![0; (len - at) as usize], at).unwrap(),
        Damage::Garbage => {
            let bytes: Vec<u8> = (at..len).map(|_| rng.random()).collect();
            file.write_all_at(&bytes, at).unwrap();
        }
        Damage::Bit => {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << rng.random_range(0..8)], at).unwrap();
        }
    }
}

#[tokio::test]
async fn a_torn_wal_costs_only_what_came_after_the_tear() {
    let seed = seed::one();
    let mut rng = seed.rng();
    let temp = tempfile::tempdir().unwrap();
    let (bench, rounds) = Bench::open_unsynced(temp.path());
    let mut cut = PowerCut::new(&bench);
    let groups = [GroupId(1), GroupId(2)];
    let mut logs = groups.map(|group| bench.log(group));
    let mut machines = groups.map(|group| bench.machine(group));
    let entries = groups.map(|group| World::new(*seed, group).take(90));
    // A flushed part in a closed file, then a synced part, then one that is neither.
    for part in 0..9 {
        for group in 0..2 {
            let chunk = &entries[group][part * 10..(part + 1) * 10];
            logs[group].append(chunk.to_vec(), IOFlushed::noop()).await.unwrap();
            apply(&mut machines[group], chunk.to_vec()).await;
        }
        match part {
            2 => bench.store.flush_state(true).unwrap(),
            5 => cut.sync(&rounds),
            _ => {}
        }
    }
    let wal = wal_files(&temp.path().join("db"));
    let (newest, len) = wal.last().unwrap();
    let synced = cut.synced_len(newest);
    assert!(wal.len() >= 2 && synced > 0 && synced < *len, "all three parts are there: {wal:?}");

    let mut lost = [0; 2];
    for round in 0..48 {
        let kind = [Damage::Cut, Damage::Zeros, Damage::Garbage, Damage::Bit][round % 4];
        let above = round % 3 != 0;
        let at = if above { rng.random_range(synced..*len) } else { rng.random_range(0..*len) };
        let torn = copy(temp.path());
        damage(&torn.path().join("db").join(newest.file_name().unwrap()), at, *len, kind, &mut rng);
        let bench = Bench::open(torn.path());
        for (group, entries) in groups.into_iter().zip(&entries) {
            let found = whole_log(&mut bench.log(group)).await;
            let kept = if at >= synced { 60 } else { 30 };
            assert!(found.len() >= kept, "{kind:?} at {at} of {len}: {} of {kept} left", found.len());
            assert_eq!(found, entries[..found.len()], "{kind:?} at {at}: a prefix");
            lost[usize::from(above)] += 90 - found.len();
            let applied = bench.machine(group).applied_state().await.unwrap().0.unwrap().index;
            assert_eq!(applied, 29, "the state is that of the flush");
            World::at(*seed, group, 30).assert_stored(&bench.store);
            // And the log leads on from it.
            let mut machine = bench.machine(group);
            apply(&mut machine, found[30..].to_vec()).await;
            World::at(*seed, group, found.len() as u64).assert_stored(&bench.store);
        }
    }
    assert!(lost.iter().all(|lost| *lost > 0), "the damage did something: {lost:?}");
}

#[tokio::test]
async fn a_hole_in_the_log_is_damage_and_not_a_shorter_log() {
    let seed = seed::one();
    let entries = World::new(*seed, GROUP).take(200);
    // Within what is read at a time, and as the first and the last of it.
    for missing in [10, 68, 69] {
        let temp = tempfile::tempdir().unwrap();
        let bench = Bench::open(temp.path());
        append(&mut bench.log(GROUP), &entries).await;
        let (key, until) = (Key::log_entry(GROUP, missing), Key::log_entry(GROUP, missing + 1));
        bench.store.write_log(vec![LogWrite::DeleteRange(key, until)]).unwrap();
        // A new one, which remembers nothing.
        let mut log = bench.log(GROUP);
        let wanted = format!("entry {missing} is missing");
        let error = log.try_get_log_entries(5..).await.unwrap_err().to_string();
        assert!(error.contains(&wanted), "{error}");
        let stream = log.entries_stream(5..).await;
        let error = stream.try_collect::<Vec<_>>().await.unwrap_err().to_string();
        assert!(error.contains(&wanted), "{error}");
    }
}

/// The last entries are kept in memory, and must say what the disk says, whatever was purged, cut off and written anew.
#[tokio::test]
async fn entries_in_memory_are_those_on_disk() {
    let seed = seed::one();
    let mut rng = seed.rng();
    let temp = tempfile::tempdir().unwrap();
    let bench = Bench::open(temp.path());
    let mut log = bench.log(GROUP);
    let mut model: BTreeMap<u64, LogEntry> = BTreeMap::new();
    let (mut next, mut purged, mut term) = (0, None, TERM);
    for step in 0..400 {
        match rng.random_range(0..10) {
            0 if !model.is_empty() => {
                let index = rng.random_range(model.keys().next().copied().unwrap()..next);
                purged = Some(model[&index].log_id);
                log.purge(model[&index].log_id).await.unwrap();
                // Asked again for less, it leaves things as they are.
                let less = rng.random_range(0..=index);
                log.purge(log_id(TERM, less)).await.unwrap();
                model = model.split_off(&(index + 1));
            }
            1 if !model.is_empty() => {
                let index = rng.random_range(model.keys().next().copied().unwrap()..next);
                let last =
                    index.checked_sub(1).map(|index| model.get(&index).map_or(purged, |entry| Some(entry.log_id)));
                log.truncate_after(last.flatten()).await.unwrap();
                model.split_off(&index);
                (next, term) = (index, term + 1);
            }
            _ => {
                let entries: Vec<LogEntry> = (0..rng.random_range(1..30))
                    .map(|offset| {
                        let payload = match rng.random_range(0..20) {
                            0..=16 => vec![0; rng.random_range(0..100)],
                            17 | 18 => vec![0; 60_000],
                            _ => vec![0; 600_000],
                        };
                        let payload = EntryPayload::Normal(Command(payload.into()));
                        Entry { log_id: log_id(term, next + offset), payload }
                    })
                    .collect();
                log.append(entries.clone(), IOFlushed::noop()).await.unwrap();
                next += entries.len() as u64;
                model.extend(entries.into_iter().map(|entry| (entry.log_id.index, entry)));
            }
        }
        let first = model.keys().next().copied().unwrap_or(next);
        assert_eq!(log.get_log_state().await.unwrap().last_log_id, model.values().last().map(|e| e.log_id).or(purged));
        for _ in 0..4 {
            let from = rng.random_range(first.saturating_sub(5)..=next);
            let until = rng.random_range(from..=next + 3);
            let wanted: Vec<&LogEntry> = model.range(from..until).map(|(_, entry)| entry).collect();
            let found = log.try_get_log_entries(from..until).await.unwrap();
            assert!(found.iter().eq(wanted.iter().copied()), "step {step}: {from}..{until}");
            let stream: Vec<_> = log.entries_stream(from..until).await.try_collect().await.unwrap();
            assert_eq!(stream, found);
            if from >= first && from < next && until > from {
                let some = log.limited_get_log_entries(from, until).await.unwrap();
                assert!(!some.is_empty() && some == found[..some.len()], "step {step}: {from}..{until}");
                let bytes: usize = some
                    .iter()
                    .skip(1)
                    .map(|e| if let EntryPayload::Normal(c) = &e.payload { c.0.len() } else { 0 })
                    .sum();
                assert!(bytes <= 1024 * 1024, "a message to a follower has a bound");
            }
        }
    }
    // And again without memory of any of it.
    let found = whole_log(&mut bench.log(GROUP)).await;
    assert!(found.iter().eq(model.values()));
}

#[tokio::test]
async fn rows_go_with_what_was_applied() {
    let temp = tempfile::tempdir().unwrap();
    let bench = Bench::open(temp.path());
    let seed = seed::one();
    let mut world = World::new(*seed, GROUP);
    let mut machine = bench.machine(GROUP);
    // One call may span several writes; the rows are right after each call.
    for count in [1, 1, 7, 300, 2] {
        apply(&mut machine, world.take(count)).await;
        world.assert_stored(&bench.store);
    }
    assert!(rows_of(&bench.store, GroupId(2)).is_empty());
    drop(machine);
    // A stream that fails leaves the entries before the failure or none, and never a half.
    let mut machine = bench.machine(GROUP);
    let before = world.next;
    let entries: Vec<_> = world.take(20).into_iter().map(|entry| Ok((entry, None))).collect();
    let broken = entries.into_iter().chain([Err(std::io::Error::other("cut off"))]);
    machine.apply(futures::stream::iter(broken).boxed()).await.unwrap_err();
    let applied = bench.machine(GROUP).applied_state().await.unwrap().0.unwrap().index;
    World::at(*seed, GROUP, applied + 1).assert_stored(&bench.store);
    assert!(applied + 1 >= before);
}
