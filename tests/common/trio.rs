//! Three nodes of one cluster, each a process of its own.

use std::collections::BTreeMap;

use boomerang::wire::proto::{self, Status, boomerang_envelope::Payload};

use super::eventually;
use super::node::{ADMIN_PASSWORD, NodeProcess, free_address};
use super::raw::Raw;

pub const SHARDS: u16 = 6;

pub struct Trio {
    pub nodes: Vec<NodeProcess>,
}

impl Trio {
    /// Returns when every shard has a leader, and each node leads some.
    pub fn start(flags: &[&str]) -> Self {
        let peers: Vec<String> = (0..3).map(|_| free_address()).collect();
        let list: Vec<String> = peers.iter().zip(1..).map(|(peer, number)| format!("{number}={peer}")).collect();
        let list = list.join(",");
        let shards = SHARDS.to_string();
        // Each waits for the others.
        let nodes = std::thread::scope(|scope| {
            let starts: Vec<_> = peers
                .iter()
                .zip(["1", "2", "3"])
                .map(|(peer, number)| {
                    let own = ["--node-id", number, "--peer-addr", peer, "--peers", &list, "--shards", &shards];
                    let tcp = free_address();
                    let flags: Vec<String> = own
                        .iter()
                        .chain(flags)
                        .map(|flag| (*flag).to_owned())
                        .chain(["--tcp-addr".into(), tcp])
                        .collect();
                    scope.spawn(move || {
                        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
                        NodeProcess::start(&flags)
                    })
                })
                .collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        let trio = Self { nodes };
        eventually("each node leads some shards", || {
            let leaders = trio.leaders(0)?;
            (leaders.values().collect::<std::collections::BTreeSet<_>>().len() == 3).then_some(())
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
            protocol: boomerang::wire::PROTOCOL,
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
        let Payload::AuthResponse(session) = raw.ask("", Payload::AuthHandshake(handshake)) else { panic!() };
        assert_eq!(session.status, Status::Ok as i32, "{}", session.error_message);
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
