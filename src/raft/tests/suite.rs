//! openraft's conformance suite on the store as it is.

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

use super::bench::Bench;
use crate::raft::log_store::LogStore;
use crate::raft::state_machine::StateMachine;
use crate::raft::types::TypeConfig;
use crate::task::GroupId;

struct Fresh;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, (Bench, tempfile::TempDir)> for Fresh {
    async fn build(&self) -> Result<((Bench, tempfile::TempDir), LogStore, StateMachine), StorageError<TypeConfig>> {
        let temp = tempfile::tempdir().expect("a temporary folder");
        let bench = Bench::open(temp.path());
        let (log, mut machine) = (bench.log(GroupId(1)), bench.machine(GroupId(1)));
        machine.gaps_allowed = true;
        Ok(((bench, temp), log, machine))
    }
}

#[tokio::test]
async fn openraft_finds_nothing_wrong_with_log_and_state_machine() {
    Suite::test_all(Fresh).await.unwrap();
}
