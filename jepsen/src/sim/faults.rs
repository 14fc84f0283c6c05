//! What is broken, and when: a schedule that follows from the seed, and the end of all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use boomerang::firing::hand_over::hand_over;
use boomerang_task::GroupId;
use boomerang_task::locks::Mutex;
use rand::RngExt;
use rand::rngs::SmallRng;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::net::{Link, NodeId};
use super::world::{SYNC_MS, World, chance};
use crate::history::{Stage, What};

/// From one fault to the next.
const PAUSE_MS: (u64, u64) = (50, 900);
/// How long most of them last.
const LASTS_MS: (u64, u64) = (100, 2_500);
/// Too long for a lease.
const STALL_MS: (u64, u64) = (350, 600);
/// A disk that takes this long for a sync has a bad moment.
const SLOW_SYNC_MS: (u64, u64) = (20, 400);

struct Faults {
    world: Arc<World>,
    rng: SmallRng,
    /// What is under way, and ends by itself.
    under_way: JoinSet<()>,
    /// Then what is under way ends at once.
    over: CancellationToken,
    /// How many faults slow a node's disk down.
    slow_disks: Arc<Mutex<BTreeMap<NodeId, u32>>>,
}

/// Waits, unless all faults are over.
async fn lasting(over: CancellationToken, lasts: Duration) {
    let _ = over.run_until_cancelled(sleep(lasts)).await;
}

/// Breaks things until the time of the plan is over, and then mends all of it.
pub async fn run(world: &Arc<World>) {
    let mut faults = Faults {
        world: world.clone(),
        rng: chance(world.seed, 4),
        under_way: JoinSet::new(),
        over: CancellationToken::new(),
        slow_disks: Arc::default(),
    };
    let until = Instant::now() + world.plan.safety;
    world.receivers.set_broken(true);
    while Instant::now() < until {
        sleep(faults.some_ms(PAUSE_MS)).await;
        faults.one();
    }
    faults.heal().await;
}

impl Faults {
    fn some_ms(&mut self, (from, until): (u64, u64)) -> Duration {
        Duration::from_millis(self.rng.random_range(from..until))
    }

    fn some_node(&mut self) -> NodeId {
        self.rng.random_range(1..=self.world.plan.nodes)
    }

    fn some_group(&mut self) -> GroupId {
        GroupId(self.rng.random_range(1..=self.world.plan.shards))
    }

    /// More often than not a leader: it is the one that can do harm.
    fn victim(&mut self) -> NodeId {
        let group = self.some_group();
        let leader = self.world.leader(group).filter(|_| self.rng.random_bool(0.6));
        leader.unwrap_or_else(|| self.some_node())
    }

    fn one(&mut self) {
        match self.rng.random_range(0..100) {
            0..26 => self.partition(),
            26..30 => self.stall(),
            30..60 => self.crash(),
            60..65 => self.crash_all(),
            65..75 => self.slow_links(),
            75..82 => self.slow_disk(),
            82..92 => self.flush(),
            _ => self.hand_over(),
        }
    }

    fn partition(&mut self) {
        let victim = self.victim();
        let others: Vec<NodeId> = self.world.nodes().filter(|node| *node != victim).collect();
        let (mut ways, how): (Vec<Link>, _) = match self.rng.random_range(0..4) {
            // Nobody hears it.
            0 => (others.iter().map(|other| (victim, *other)).collect(), "is not heard"),
            // It hears nobody.
            1 => (others.iter().map(|other| (*other, victim)).collect(), "hears nobody"),
            2 => {
                let other = others[self.rng.random_range(0..others.len())];
                (vec![(victim, other), (other, victim)], "and one other do not hear each other")
            }
            _ => (others.iter().flat_map(|other| [(victim, *other), (*other, victim)]).collect(), "is cut off"),
        };
        ways.sort_unstable();
        let breaks = self.rng.random_bool(0.4);
        let (world, lasts, over) = (self.world.clone(), self.some_ms(LASTS_MS), self.over.clone());
        let detail = format!("node {victim} {how}: {ways:?}, connections break: {breaks}");
        world.note("partition", Stage::Begin, detail.clone());
        for way in &ways {
            if breaks { world.net.cut_and_break(*way) } else { world.net.cut(*way) }
        }
        self.under_way.spawn(async move {
            lasting(over, lasts).await;
            ways.into_iter().for_each(|way| world.net.mend(way));
            world.note("partition", Stage::End, detail);
        });
    }

    /// What the others say comes too late for a lease. They hear their leader all the time, so its term goes on.
    fn stall(&mut self) {
        let victim = self.victim();
        let (world, lasts, over) = (self.world.clone(), self.some_ms(STALL_MS), self.over.clone());
        let ways: Vec<Link> = self.world.nodes().filter(|node| *node != victim).map(|other| (other, victim)).collect();
        world.note("stall", Stage::Begin, format!("node {victim}"));
        ways.iter().for_each(|way| world.net.cut(*way));
        self.under_way.spawn(async move {
            lasting(over, lasts).await;
            ways.into_iter().for_each(|way| world.net.mend(way));
            world.note("stall", Stage::End, format!("node {victim}"));
        });
    }

    fn crash(&mut self) {
        let victim = self.victim();
        self.crash_node(victim);
    }

    fn crash_all(&mut self) {
        for node in self.world.nodes() {
            self.crash_node(node);
        }
    }

    fn crash_node(&mut self, node: NodeId) {
        let power = self.rng.random_bool(0.6);
        let (world, away, over) = (self.world.clone(), self.some_ms(LASTS_MS), self.over.clone());
        if !world.crash(node, power) {
            return;
        }
        let fault = if power { "power" } else { "kill" };
        world.note(fault, Stage::Begin, format!("node {node}"));
        self.under_way.spawn(async move {
            lasting(over, away).await;
            world.start(node).await;
            world.note(fault, Stage::End, format!("node {node}"));
        });
    }

    fn slow_links(&mut self) {
        let victim = self.victim();
        let (world, lasts, over) = (self.world.clone(), self.some_ms(LASTS_MS), self.over.clone());
        let others = self.world.nodes().filter(|node| *node != victim);
        let ways: Vec<Link> = others.flat_map(|other| [(victim, other), (other, victim)]).collect();
        world.note("slow-links", Stage::Begin, format!("node {victim}"));
        ways.iter().for_each(|way| world.net.slow(*way));
        self.under_way.spawn(async move {
            lasting(over, lasts).await;
            ways.into_iter().for_each(|way| world.net.hurry(way));
            world.note("slow-links", Stage::End, format!("node {victim}"));
        });
    }

    fn slow_disk(&mut self) {
        let (victim, sync_ms) = (self.victim(), self.rng.random_range(SLOW_SYNC_MS.0..SLOW_SYNC_MS.1));
        let (world, lasts, over) = (self.world.clone(), self.some_ms(LASTS_MS), self.over.clone());
        world.note("slow-disk", Stage::Begin, format!("node {victim}, {sync_ms} ms"));
        world.pace(victim).sync_ms.store(sync_ms, Ordering::SeqCst);
        let slow = self.slow_disks.clone();
        *slow.lock().entry(victim).or_default() += 1;
        self.under_way.spawn(async move {
            lasting(over, lasts).await;
            let left = {
                let mut slow = slow.lock();
                let count = slow.entry(victim).or_default();
                *count -= 1;
                *count
            };
            if left == 0 {
                world.pace(victim).sync_ms.store(SYNC_MS, Ordering::SeqCst);
            }
            world.note("slow-disk", Stage::End, format!("node {victim}"));
        });
    }

    /// As a memtable does when it is full.
    fn flush(&mut self) {
        let node = self.some_node();
        let Some(life) = self.world.life(node) else { return };
        life.store.flush_state(false).expect("memory does not fail");
        self.world.note("flush", Stage::Note, format!("node {node}"));
    }

    fn hand_over(&mut self) {
        let group = self.some_group();
        let Some(life) = self.world.leading(group) else { return };
        let world = self.world.clone();
        world.note("hand-over", Stage::Note, format!("{group}, from node {}", life.node));
        tokio::spawn(async move {
            let Some(group) = life.groups.get(group) else { return };
            // It need not work: the others may not be there.
            let _ = hand_over(&life.ledger, &group, None, &BTreeSet::new()).await;
        });
    }

    /// Everything is whole again, and stays so.
    async fn heal(mut self) {
        self.over.cancel();
        // To their ends: a node that is being started must not be left half started.
        while let Some(ended) = self.under_way.join_next().await {
            ended.expect("no fault panics");
        }
        let world = &self.world;
        world.net.mend_all();
        for node in world.nodes() {
            world.pace(node).sync_ms.store(SYNC_MS, Ordering::SeqCst);
            world.start(node).await;
            if let Some(life) = world.life(node) {
                life.clock.set_right();
            }
        }
        world.receivers.set_broken(false);
        world.recorder.record(What::Healed);
    }
}
