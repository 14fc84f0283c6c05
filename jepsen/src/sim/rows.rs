//! The rows that say where replicas are to be, as etcd keeps them, and the way from there to a node: it takes time, and now and
//! then long.

use std::sync::Arc;
use std::time::Duration;

use boomerang::placement::{Cluster, GroupRow, Table};
use boomerang::random;
use boomerang_task::GroupId;
use boomerang_task::locks::Mutex;
use rand::RngExt;
use tokio::sync::Notify;
use tokio::time::sleep;

/// From the rows to a node.
const WAY_MS: (u64, u64) = (1, 30);
const LONG_WAY_MS: (u64, u64) = (100, 2_500);
const LONG_WAYS: f64 = 0.15;

/// The rows as etcd has them. Whoever waits for a change is woken in turn, always in the same order.
pub struct Rows {
    table: Mutex<Arc<Table>>,
    changed: Notify,
}

impl Rows {
    pub fn new(table: Table) -> Self {
        Self { table: Mutex::new(Arc::new(table)), changed: Notify::new() }
    }

    pub fn now(&self) -> Arc<Table> {
        self.table.lock().clone()
    }

    pub fn put(&self, group: GroupId, row: GroupRow) {
        Arc::make_mut(&mut *self.table.lock()).insert(group, row);
        self.changed.notify_waiters();
    }
}

/// Tells a node of the rows, late, and after it has stored them. Until it is dropped.
pub async fn learn(cluster: Cluster, known: Arc<Mutex<Arc<Table>>>, rows: Arc<Rows>) {
    let mut rng = random::source();
    loop {
        let table = rows.now();
        let (from, until) = if rng.random_bool(LONG_WAYS) { LONG_WAY_MS } else { WAY_MS };
        sleep(Duration::from_millis(rng.random_range(from..until))).await;
        *known.lock() = table.clone();
        cluster.set_table((*table).clone());
        let changed = rows.changed.notified();
        if *rows.now() == *table {
            changed.await;
        }
    }
}
