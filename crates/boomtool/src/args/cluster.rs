//! What can be typed after `boomtool cluster`.

use clap::{Args, Subcommand};

use boomerang_task::SHARDS_MAX;

/// What can be done with the cluster.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Show the nodes: where they are, what they hold and lead, and whether they answer
    #[command(
        long_about = "Show the nodes: where they are, what they hold and lead, and whether they answer.\n\n\
            STATE is 'ok', 'away' (and since when), 'draining' (it is to hold nothing) or 'not ready' (it starts or \
            stops). CLOCK is how far the node's clock is ahead of that of the node that answers. Any node can be asked.",
        after_help = "\
Examples:
  boomtool cluster status
  boomtool cluster status --json | jq 'select(.state != \"ok\")'"
    )]
    Status,
    /// Show the replicas of each shard: who leads, how far behind the others are
    #[command(
        long_about = "Show the replicas of each shard: who leads, how far behind the others are.\n\n\
            A replica is shown as its node, '*' for the leader, '?' for a learner, '+' for one that is to come and '-' \
            for one that is to go, and how many entries it is behind when it is. STATE is 'ok', 'moving', \
            'under-replicated' (some voters do not answer, or there are too few) or 'no leader'. The shard '-' is the \
            cluster's own group: clients and their passwords.",
        after_help = "\
Examples:
  boomtool cluster shards
  boomtool cluster shards --json | jq 'select(.state != \"ok\")'"
    )]
    Shards,
    /// Check that the replicas of each shard are equal
    #[command(
        long_about = "Check that the replicas of each shard are equal.\n\n\
            Every replica computes a digest of all it holds at one and the same entry of the log, while everything goes \
            on, and the digests are compared. Reads each shard once on each node. RESULT is 'equal', 'DIFFERENT', or why \
            there was nothing to compare. Exit code 1 unless all are equal.",
        after_help = "\
Examples:
  boomtool cluster verify
  boomtool cluster verify --json | jq 'select(.result != \"equal\")'"
    )]
    Verify,
    /// Move one replica of a shard to another node
    #[command(
        long_about = "Move one replica of a shard to another node.\n\n\
            Nothing is lost or delayed by it: the new replica catches up first. The cluster keeps its nodes evenly \
            loaded, so that another replica may go the opposite way. Needs etcd.",
        after_help = "\
Examples:
  boomtool cluster move 3 --from 1 --to 4"
    )]
    Move(MoveArgs),
    /// Empty a node: its replicas go to others, and it gets no new ones
    #[command(
        long_about = "Empty a node: its replicas go to others, and it gets no new ones.\n\n\
            Waits until the node holds nothing, and shows what is left meanwhile; then it can be stopped for good. \
            Ctrl-C ends the waiting and not the draining. Where there are fewer nodes left than copies are wanted, \
            shards go on with fewer copies. Needs etcd.",
        after_help = "\
Examples:
  boomtool cluster drain 3              # then it can be stopped
  boomtool cluster drain 3 --no-wait"
    )]
    Drain {
        /// Number of the node
        #[arg(value_name = "NODE")]
        node: u64,
        /// Return as soon as it is decided
        #[arg(long)]
        no_wait: bool,
    },
    /// Let a drained node hold replicas again
    #[command(after_help = "\
Examples:
  boomtool cluster undrain 3")]
    Undrain {
        /// Number of the node
        #[arg(value_name = "NODE")]
        node: u64,
    },
}

/// `cluster move`.
#[derive(Debug, Args)]
pub struct MoveArgs {
    /// Number of the shard, as 'cluster shards' printed it
    #[arg(value_name = "SHARD", value_parser = clap::value_parser!(u16).range(..i64::from(SHARDS_MAX)))]
    pub shard: u16,
    /// Node that holds the replica now
    #[arg(long, value_name = "NODE")]
    pub from: u64,
    /// Node that is to hold it
    #[arg(long, value_name = "NODE")]
    pub to: u64,
    /// Return as soon as it is decided
    #[arg(long)]
    pub no_wait: bool,
}
