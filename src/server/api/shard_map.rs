//! Shows which node leads which shard, as far as this one knows.

use std::sync::Arc;

use super::operation::{Operation, Respond};
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::wire::proto::ShardMapRequest;

impl Operation for ShardMapRequest {
    async fn here(self, service: &Arc<Service>, _: Arc<Session>, respond: Respond<Self>) {
        respond(Ok(service.router.map()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::rig::Rig;
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_leads_what_is_shown_to_anybody_who_is_in() {
        let rig = Rig::start().await;
        let map = rig.ask(&rig.stranger(), ShardMapRequest {}).await.unwrap();
        let leaders: Vec<u64> = map.shards.iter().map(|leader| leader.node_id).collect();
        assert_eq!((leaders, map.cluster.unwrap().node_id), (vec![1, 0], 1));
    }
}
