//! The line of a group that is really there, before a disk that is full as long as the test wants it.

use std::sync::Arc;

use tokio::sync::{Barrier, mpsc, watch};
use tokio::time::timeout;

use super::{Ask, DiskState, Dispatches, Proposer, ProposerParts, Refused};
use crate::clock::SystemClock;
use crate::raft::Observer;
use crate::raft::alone::{Alone, GROUP, NEVER};
use crate::shard::{Claim, Reply};
use crate::task::{GroupId, TaskId};

/// Holds nothing back.
struct Nothing;

impl Dispatches for Nothing {
    fn hold(&self, _: GroupId, _: u64, _: TaskId) -> Claim {
        Claim::NotDispatched
    }

    fn release(&self, _: GroupId, _: u64, _: TaskId) {}

    fn is_out(&self, _: GroupId, _: TaskId) -> bool {
        false
    }
}

/// A node with one shard, which it leads.
struct Node {
    alone: Alone,
    proposer: Proposer,
    disk: watch::Sender<DiskState>,
}

impl Node {
    async fn start(disk: DiskState) -> Self {
        let alone = Alone::start(|_| Arc::new(Vec::<Arc<dyn Observer>>::new())).await;
        let group = alone.groups.get(GROUP).unwrap();
        let wait = group.raft.wait(Some(NEVER));
        let leads = wait.metrics(
            |metrics| {
                let term = metrics.last_applied.map(|id| id.committed_leader_id().term);
                metrics.state.is_leader() && term == Some(metrics.current_term)
            },
            "it leads its shard",
        );
        leads.await.unwrap();
        let (disk_out, disk) = watch::channel(disk);
        let proposer = Proposer::start(ProposerParts {
            groups: alone.groups.clone(),
            clock: Arc::new(SystemClock::new()),
            dispatches: Arc::new(Nothing),
            disk,
            store: alone.store(),
            shards: 1,
            keep_history: true,
        });
        Self { alone, proposer, disk: disk_out }
    }

    async fn stop(self) {
        drop(self.proposer);
        self.alone.stop().await;
    }
}

/// Asks for nothing but an answer, and is no new work.
const OLD_WORK: Ask = Ask::Arm(0);

/// Messages that take all places of the shard between them, and each wants more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_fill_a_line_do_not_wait_for_each_other() {
    const MESSAGES: usize = 17;
    const AT_FIRST: usize = 480;
    const IN_ALL: usize = 1_000;
    let node = Node::start(DiskState::Full("on purpose".into())).await;
    let all_have_some = Arc::new(Barrier::new(MESSAGES));
    let (answers_out, mut answers) = mpsc::unbounded_channel();
    let mut messages = Vec::new();
    for _ in 0..MESSAGES {
        let (proposer, all_have_some, answers) = (node.proposer.clone(), all_have_some.clone(), answers_out.clone());
        messages.push(tokio::spawn(async move {
            let mut admission = proposer.admission();
            for n in 0..IN_ALL {
                if n == AT_FIRST {
                    all_have_some.wait().await;
                }
                let answers = answers.clone();
                admission.put(GROUP, OLD_WORK, Box::new(move |answer| answers.send(answer).unwrap())).await;
            }
            admission.send();
        }));
    }
    drop(answers_out);
    node.disk.send_replace(DiskState::Fine);
    for n in 0..MESSAGES * IN_ALL {
        let answer = timeout(NEVER, answers.recv()).await.unwrap_or_else(|_| panic!("only {n} were answered"));
        assert_eq!(answer.unwrap(), Ok(Reply::Stored));
    }
    assert!(answers.recv().await.is_none(), "each of them once");
    for message in messages {
        message.await.unwrap();
    }
    node.stop().await;
}

/// New work is refused while the runtime that does it is stuck, and not only after that.
#[test]
fn a_runtime_that_is_stuck_is_seen_while_it_is() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let node = runtime.block_on(async { tokio::spawn(Node::start(DiskState::Fine)).await.unwrap() });
    let refused = |wanted: bool| {
        let deadline = std::time::Instant::now() + NEVER;
        loop {
            match node.proposer.busy(GROUP) {
                Some(Refused::Overloaded { why, .. }) if wanted && why.contains("behind with its work") => return,
                None if !wanted => return,
                found => assert!(std::time::Instant::now() < deadline, "refused: {wanted}; at last: {found:?}"),
            }
            std::thread::yield_now();
        }
    };
    refused(false);
    let (go_on, stuck) = std::sync::mpsc::channel::<()>();
    runtime.spawn(async move { stuck.recv().unwrap_err() });
    refused(true);
    drop(go_on);
    refused(false);
    runtime.block_on(async { tokio::spawn(node.stop()).await.unwrap() });
}
