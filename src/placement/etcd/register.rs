//! This node in etcd: what the cluster agrees on, the node's number, and the lease that says that it is there.
//!
//! A number belongs to one data folder for ever. A node that has lost its disk is another node: its replicas have voted,
//! and an empty folder under the old number would vote again. So the folder has an id of its own, made before anything
//! is said to etcd, and whoever comes with another one is refused.

use std::collections::BTreeMap;
use std::time::Duration;

use etcd_client::{Client, GetOptions, PutOptions, Txn, TxnOp};
use tokio::sync::watch;
use tokio::time::sleep;

use super::view::{Config, FORMAT, IdRow};
use super::{EtcdError, Link, absent, answer, backoff, json, wait};
use crate::placement::{GroupRow, NodeInfo};
use crate::raft::ReplicaId;
use crate::task::GroupId;

/// A node that says nothing for this long is away.
const LEASE_SECONDS: i64 = 5;
const KEEP_EVERY: Duration = Duration::from_secs(1);

/// Who registers.
pub struct Applicant {
    pub link: Link,
    pub here: NodeInfo,
    pub folder: String,
    pub shards: u16,
    pub replicas: u16,
    /// The replicas that were in its store when it started.
    pub held: BTreeMap<GroupId, ReplicaId>,
}

/// How it stands.
#[derive(Debug, Clone)]
pub enum Registration {
    /// Not yet, or not any more.
    Trying,
    /// On this lease.
    Done(i64),
    /// It will not be.
    Refused(EtcdError),
}

/// Registers, and does so again whenever the lease is lost, until it is dropped or refused.
pub async fn stay_registered(applicant: Applicant, registration: watch::Sender<Registration>) {
    let mut pauses = backoff();
    let mut said = false;
    loop {
        match applicant.register().await {
            Ok((client, lease)) => {
                registration.send_replace(Registration::Done(lease));
                (pauses, said) = (backoff(), false);
                let error = keep_alive(client, lease).await;
                tracing::warn!(%error, "this node's lease in etcd is lost; registering again");
                registration.send_replace(Registration::Trying);
            }
            Err(error) if error.is_final() => {
                tracing::error!(%error, "the cluster does not take this node");
                registration.send_replace(Registration::Refused(error));
                return;
            }
            Err(error) if !said => {
                tracing::warn!(%error, "this node is not registered in etcd yet");
                said = true;
            }
            Err(_) => {}
        }
        wait(&mut pauses).await;
    }
}

/// Gives the lease back: others need not wait until it is over.
pub async fn leave(link: &Link, lease: i64) {
    let left = async { answer((link.connect().await?).lease_revoke(lease)).await };
    if let Err(error) = left.await {
        tracing::debug!(%error, "the lease ends by itself");
    }
}

async fn keep_alive(mut client: Client, lease: i64) -> EtcdError {
    let kept = async {
        let (mut keeper, mut answers) = answer(client.lease_keep_alive(lease)).await?;
        loop {
            sleep(KEEP_EVERY).await;
            answer(keeper.keep_alive()).await?;
            let kept = answer(answers.message()).await?;
            if kept.is_none_or(|kept| kept.ttl() <= 0) {
                return Err::<(), EtcdError>(EtcdError::Failed("the lease is over".into()));
            }
        }
    };
    kept.await.expect_err("it only ends when something is wrong")
}

impl Applicant {
    async fn register(&self) -> Result<(Client, i64), EtcdError> {
        let mut client = self.link.connect().await?;
        self.agree(&mut client).await?;
        self.take_number(&mut client).await?;
        let lease = answer(client.lease_grant(LEASE_SECONDS, None)).await?.id();
        let on_lease = Some(PutOptions::new().with_lease(lease));
        answer(client.put(self.link.keys.node(self.here.node_id), json(&self.here), on_lease)).await?;
        tracing::info!(node = self.here.node_id, "registered in etcd");
        Ok((client, lease))
    }

    /// On what all nodes have in common; the first one says it.
    async fn agree(&self, client: &mut Client) -> Result<(), EtcdError> {
        let ours = Config { format: FORMAT, shards: self.shards, replicas: self.replicas };
        let Some(found) = self.put_if_absent(client, self.link.keys.config(), json(&ours)).await? else {
            return Ok(());
        };
        let unknown =
            |error: serde_json::Error| EtcdError::Failed(format!("the key config is not understood: {error}"));
        let config: Config = serde_json::from_slice(&found).map_err(unknown)?;
        if config.format > FORMAT {
            return Err(EtcdError::Newer(config.format));
        }
        if config.shards != self.shards {
            return Err(EtcdError::Shards { cluster: config.shards, ours: self.shards });
        }
        if config.replicas != self.replicas {
            let (cluster, given) = (config.replicas, self.replicas);
            tracing::warn!(cluster, given, "--replicas differs from the cluster's, which counts");
        }
        Ok(())
    }

    async fn take_number(&self, client: &mut Client) -> Result<(), EtcdError> {
        let node_id = self.here.node_id;
        let key = self.link.keys.id(node_id);
        let ours = IdRow { folder: self.folder.clone(), node: self.here.clone() };
        if !self.held.is_empty() && answer(client.get(key.clone(), None)).await?.kvs().is_empty() {
            self.check_rows(client).await?;
        }
        let Some(found) = self.put_if_absent(client, key.clone(), json(&ours)).await? else { return Ok(()) };
        let unknown = |error: serde_json::Error| EtcdError::Failed(format!("the key {key} is not understood: {error}"));
        let known: IdRow = serde_json::from_slice(&found).map_err(unknown)?;
        if known.folder != self.folder {
            return Err(EtcdError::OtherFolder(node_id));
        }
        if known != ours {
            answer(client.put(key, json(&ours), None)).await?;
        }
        Ok(())
    }

    /// A number that is not taken comes with groups: those of another cluster would be released here. After etcd was
    /// lost the rows, if there are any yet, were made of what nodes hold, and name this one.
    async fn check_rows(&self, client: &mut Client) -> Result<(), EtcdError> {
        let prefix = self.link.keys.groups();
        let found = answer(client.get(prefix.as_str(), Some(GetOptions::new().with_prefix()))).await?;
        let rows = found.kvs().iter().filter_map(|kv| {
            let group = std::str::from_utf8(kv.key()).ok()?.strip_prefix(&prefix)?.parse().ok().map(GroupId)?;
            Some((group, serde_json::from_slice::<GroupRow>(kv.value()).ok()?))
        });
        let node_id = self.here.node_id;
        let named = |(group, row): (GroupId, GroupRow)| {
            row.on(node_id).is_some_and(|at| self.held.get(&group) == Some(&at.replica))
        };
        if !found.kvs().is_empty() && !rows.into_iter().any(named) {
            return Err(EtcdError::Foreign(node_id));
        }
        Ok(())
    }

    /// What is there already, if anything is.
    async fn put_if_absent(
        &self,
        client: &mut Client,
        key: String,
        value: Vec<u8>,
    ) -> Result<Option<Vec<u8>>, EtcdError> {
        let txn = Txn::new()
            .when([absent(key.clone())])
            .and_then([TxnOp::put(key.clone(), value, None)])
            .or_else([TxnOp::get(key, None)]);
        let done = answer(client.txn(txn)).await?;
        if done.succeeded() {
            return Ok(None);
        }
        let found = done.op_responses().into_iter().find_map(|response| match response {
            etcd_client::TxnOpResponse::Get(found) => found.kvs().first().map(|kv| kv.value().to_vec()),
            _ => None,
        });
        found.map(Some).ok_or_else(|| EtcdError::Failed("a key came and went".into()))
    }
}

/// The lease, as soon as there is one.
pub async fn lease_of(registration: &mut watch::Receiver<Registration>) -> Option<i64> {
    let done = registration.wait_for(|state| matches!(state, Registration::Done(_))).await.ok()?;
    match &*done {
        Registration::Done(lease) => Some(*lease),
        Registration::Trying | Registration::Refused(_) => None,
    }
}

/// A node that has registered once, or never will.
pub async fn first_word(registration: &mut watch::Receiver<Registration>) -> Result<(), EtcdError> {
    let word = registration.wait_for(|state| !matches!(state, Registration::Trying)).await;
    match word.map(|state| state.clone()) {
        Ok(Registration::Refused(error)) => Err(error),
        _ => Ok(()),
    }
}
