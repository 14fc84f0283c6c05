//! Three nodes of one cluster, each a process of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use boomerang_wire::proto::{self, Status, boomerang_envelope::Payload};

use super::cluster::{Cluster, SHARDS};
use super::eventually_within;
use super::node::{ADMIN_PASSWORD, NodeProcess};
use super::raw::Raw;

/// A node gets what it is to lead when all has been well for five seconds; an election begins them anew.
const SPREAD_WITHIN: Duration = Duration::from_secs(60);

pub struct Trio {
    pub nodes: Vec<NodeProcess>,
}

impl Trio {
    /// Returns when each node leads its share of the shards.
    pub fn start() -> Self {
        let Cluster { nodes } = Cluster::with_peers(3, &[]);
        Self::of(nodes)
    }

    /// The same, of nodes that have been started.
    pub fn of(nodes: Vec<NodeProcess>) -> Self {
        let trio = Self { nodes };
        // By then none is handed over any more.
        eventually_within(SPREAD_WITHIN, "each node leads its share, and all know", || {
            let seen: Option<BTreeSet<_>> = (0..3).map(|node| trio.leaders(node)).collect();
            let seen = seen.ok_or("somebody knows of no leader")?;
            let [leaders] = <[_; 1]>::try_from(Vec::from_iter(&seen)).map_err(|_| "they do not agree")?;
            let share = |node| leaders.values().filter(|leader| **leader == node).count();
            (0..3).all(|node| share(node) == usize::from(SHARDS) / 3).then_some(()).ok_or("not evenly spread")
        });
        trio
    }

    /// The shards by the node that leads them (its place in `nodes`), as node `asked` knows; `None` while one has none.
    pub fn leaders(&self, asked: usize) -> Option<BTreeMap<u32, usize>> {
        let map = self.extended(asked, false).map();
        let by_number = |(shard, leader): (u32, &proto::ShardLeader)| {
            (leader.node_id > 0).then(|| (shard, usize::try_from(leader.node_id).unwrap() - 1))
        };
        (0..).zip(&map.shards).map(by_number).collect()
    }

    /// A session of the administrator, of a client that knows all fields.
    pub fn extended(&self, node: usize, redirects: bool) -> Extended {
        let handshake = proto::AuthHandshake {
            client_id: "admin".into(),
            password: ADMIN_PASSWORD.into(),
            protocol: boomerang_wire::PROTOCOL,
            redirects,
            ..Default::default()
        };
        Extended::open(&self.nodes[node], handshake)
    }
}

/// A client that sends one request at a time and sees every field of the answer.
pub struct Extended {
    raw: Raw,
    pub session: proto::AuthResponse,
}

impl Extended {
    pub fn open(node: &NodeProcess, handshake: proto::AuthHandshake) -> Self {
        let mut raw = Raw::connect(node.started.tcp);
        let answer = raw.ask("", Payload::AuthHandshake(handshake));
        let Payload::AuthResponse(session) = answer else { panic!("not the answer to a handshake: {answer:?}") };
        assert_eq!(session.status(), Status::Ok, "a handshake was refused: {}", session.error_message);
        Self { raw, session }
    }

    pub fn ask(&mut self, payload: Payload) -> Payload {
        self.raw.ask(&self.session.session_id, payload)
    }

    pub fn map(&mut self) -> proto::ShardMapResponse {
        match self.ask(Payload::ShardMapRequest(proto::ShardMapRequest {})) {
            Payload::ShardMapResponse(map) => map,
            other => panic!("not a map: {other:?}"),
        }
    }
}
