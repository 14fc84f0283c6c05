//! For tests of the rooms above: a group with tasks of which this is the only replica, on a real database.

use std::sync::Arc;
use std::time::Duration;

use super::groups::{Begin, Groups, GroupsParts};
use super::{Observer, PeerNetwork};
use crate::store::Store;
use crate::store::writer::{Writer, WriterThreads};
use crate::task::GroupId;

/// Nothing here takes this long, on any machine.
pub const NEVER: Duration = Duration::from_secs(30);
/// The one with tasks.
pub const GROUP: GroupId = GroupId(1);

pub struct Alone {
    pub groups: Groups,
    /// To be dropped after the groups have stopped.
    pub writer: (Writer, WriterThreads),
    _temp: tempfile::TempDir,
}

impl Alone {
    /// `observer` may want to read the database as well.
    pub async fn start<O: Observer>(observer: impl FnOnce(&Store) -> Arc<O>) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(&temp.path().join("db")).unwrap();
        let writer = Writer::start(store.clone());
        let groups = Groups::start(GroupsParts {
            cluster: "test".into(),
            node_id: 1,
            shards: 1,
            writer: writer.0.clone(),
            staging: temp.path().join("staging"),
            network: PeerNetwork::alone("test", 1),
            observer: observer(&store),
            store,
        });
        let groups = groups.await.unwrap();
        for id in [GroupId::CLUSTER, GROUP] {
            groups.host(id, Begin::Alone).await.unwrap();
        }
        Self { groups, writer, _temp: temp }
    }

    pub fn store(&self) -> Store {
        self.writer.0.store().clone()
    }

    pub async fn stop(self) {
        self.groups.stop().await.unwrap();
    }
}
