//! Where replicas are to be: the rows as etcd keeps them, the plan of the server that changes them, and operators who drain
//! nodes and move replicas while things are broken.
//!
//! There is one controller, which asks another node what it knows of the others each time it looks. Between the rows and
//! a node there is a way that takes time, and now and then long: nodes act on what is old. A node that starts knows what
//! it had stored of them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use boomerang::inspect::digest;
use boomerang::placement::agent::{has_followed, unsettled};
use boomerang::placement::etcd::controller::FRESH;
use boomerang::placement::nodes::own_status;
use boomerang::placement::plan::{self, NodeState, Nodes, move_replica};
use boomerang::placement::{GroupRow, Table};
use boomerang_task::GroupId;
use boomerang_task::locks::Mutex;
use rand::RngExt;
use rand::rngs::SmallRng;
use tokio::time::{Instant, sleep};

use super::Plan;
use super::net::NodeId;
use super::node::Life;
use super::rows::Rows;
use super::world::{World, chance};
use crate::history::Stage;

/// From one look of the controller to the next.
const LOOK_MS: (u64, u64) = (300, 1_000);
/// A node that is away for longer is given up.
const GRACE: Duration = Duration::from_secs(1);
/// While things are broken, so many looks come with a wish of an operator.
const WISHES: f64 = 0.6;
const DRAINED_MAX: usize = 2;
/// So often somebody looks whether everything is where it is to be: nobody says that a replica was released.
const SETTLED_EVERY: Duration = Duration::from_millis(100);

/// The rows, and what operators want.
pub struct Placement {
    pub rows: Arc<Rows>,
    drained: Mutex<BTreeSet<NodeId>>,
}

impl Placement {
    pub fn new(plan: &Plan) -> Self {
        let there = |_| NodeState { alive: true, ..NodeState::default() };
        let nodes: Nodes = (1..=plan.nodes).map(|node| (node, there(node))).collect();
        let mut table = plan::first_rows(Table::new(), plan.shards, &nodes, plan.replicas);
        table.remove(&GroupId::CLUSTER);
        Self { rows: Arc::new(Rows::new(table)), drained: Mutex::default() }
    }

    fn drained(&self) -> BTreeSet<NodeId> {
        self.drained.lock().clone()
    }

    fn drain(&self, node: NodeId, drain: bool) {
        let mut drained = self.drained.lock();
        if drain {
            drained.insert(node)
        } else {
            drained.remove(&node)
        };
    }
}

/// Changes rows, until it is dropped.
pub async fn control(world: Arc<World>) {
    let mut rng = chance(world.seed, 5);
    let placement = &world.placement;
    loop {
        sleep(Duration::from_millis(rng.random_range(LOOK_MS.0..LOOK_MS.1))).await;
        let asked = world.life(rng.random_range(1..=world.plan.nodes));
        let Some(life) = asked else { continue };
        if !world.receivers.is_broken() {
            placement.drained().into_iter().for_each(|node| undrain(&world, node));
        } else if rng.random_bool(WISHES) {
            wish(&world, &mut rng);
        }
        let table = placement.rows.now();
        let unsettled = unsettled(&life.cluster, &*life.clock, &table, FRESH);
        for change in plan::plan(&table, &nodes(&world), world.plan.replicas, &unsettled) {
            write(&world, change.group, change.row);
        }
    }
}

fn write(world: &World, group: GroupId, row: GroupRow) {
    let at: Vec<String> = row.voters().map(|at| format!("{} on node {}", at.replica, at.node_id)).collect();
    world.note("row", Stage::Note, format!("{group}, epoch {}: {}", row.epoch, at.join(", ")));
    world.placement.rows.put(group, row);
}

fn undrain(world: &World, node: NodeId) {
    world.placement.drain(node, false);
    world.note("undrain", Stage::Note, format!("node {node}"));
}

/// The nodes, as a controller sees them that is told by etcd who is there.
fn nodes(world: &World) -> Nodes {
    let drained = world.placement.drained();
    let state = |node| {
        let away = world.away_since(node).map(|since| since.elapsed());
        let gone = away.is_some_and(|away| away > GRACE);
        (node, NodeState { zone: String::new(), alive: away.is_none(), draining: drained.contains(&node), gone })
    };
    world.nodes().map(state).collect()
}

/// What operators come up with.
fn wish(world: &World, rng: &mut SmallRng) {
    let mut some_node = || rng.random_range(1..=world.plan.nodes);
    let (one, other) = (some_node(), some_node());
    let drained = world.placement.drained();
    match rng.random_range(0..3) {
        0 if drained.len() < DRAINED_MAX && !drained.contains(&one) => {
            world.placement.drain(one, true);
            world.note("drain", Stage::Note, format!("node {one}"));
        }
        1 if drained.contains(&one) => undrain(world, one),
        _ => {
            let group = GroupId(rng.random_range(1..=world.plan.shards));
            if let Ok(row) = move_replica(&world.placement.rows.now(), &nodes(world), group, one, other) {
                world.note("move", Stage::Note, format!("{group}, from node {one} to node {other}"));
                write(world, group, row);
            }
        }
    }
}

/// Waits until every group is where its row wants it and nothing of it is anywhere else; what is still missing when
/// patience is over.
pub async fn settle(world: &World, within: Duration) -> Vec<String> {
    let until = Instant::now() + within;
    loop {
        let missing = missing(world);
        if missing.is_empty() || Instant::now() >= until {
            return missing;
        }
        sleep(SETTLED_EVERY).await;
    }
}

fn missing(world: &World) -> Vec<String> {
    let table = world.placement.rows.now();
    let groups = table.iter().filter_map(|(group, row)| {
        let Some(life) = world.leading(*group) else { return Some(format!("{group} has no leader")) };
        let status = own_status(&life.cluster, &*life.clock);
        let status = status.groups.into_iter().find(|status| status.group == u32::from(group.0))?;
        (!has_followed(&status, row)).then(|| format!("{group} does not follow {row:?}: {status:?}"))
    });
    let lives = world.nodes().filter_map(|node| world.life(node));
    let nodes = lives.flat_map(|life| {
        let wrong = table.iter().filter_map(move |(group, row)| is_wrong(&life, *group, row));
        wrong.collect::<Vec<_>>()
    });
    let drained = world.placement.drained().into_iter().map(|node| format!("node {node} is still drained"));
    groups.chain(nodes).chain(drained).collect()
}

/// What a node holds of a group and should not, or the other way round.
fn is_wrong(life: &Life, group: GroupId, row: &GroupRow) -> Option<String> {
    let (held, wanted) = (life.groups.get(group).map(|held| held.replica), row.on(life.node).map(|at| at.replica));
    if held != wanted {
        return Some(format!("node {} holds replica {held:?} of {group}, and not {wanted:?}", life.node));
    }
    if held.is_some() {
        return None;
    }
    let rows = digest(&life.store, group).expect("memory does not fail").rows;
    (rows > 0).then(|| format!("node {} has released {group} and has {rows} rows of it", life.node))
}
