//! What an operation is: a request that can be done on this node, and perhaps only by several together.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::oneshot;

use crate::propose::Refused;
use crate::server::Service;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::server::scan::Part;
use crate::task::GroupId;
use crate::wire::operations::Request;

/// Takes the answer to a request; called once, on any thread.
pub(in crate::server) type Respond<R> = Box<dyn FnOnce(Result<<R as Request>::Answer, Problem>) + Send>;

/// What comes of reading one node's part of an answer: its items as they go to the node that puts the parts together.
pub(in crate::server) type PartRead = BoxFuture<'static, Result<Part<Bytes>, Problem>>;

/// What a client can ask for. Whoever calls has found out who asks, and who leads what it is about; the rest is the
/// operation's own: what makes sense, who may, what it does.
///
/// Its messages are those of `proto/client.proto`, without the envelope: whatever brings a request (TCP, another node) makes
/// them, and turns the answer or the problem into what it speaks itself.
pub(in crate::server) trait Operation: Request {
    /// Does it on this node, whoever leads what it is about: the proposer refuses what this node does not lead. Calls
    /// `respond` with the answer, perhaps later. Returns when the next request of the same connection may be read: for what
    /// changes state that is before the answer, and after its place among other changes is certain.
    fn here(
        self,
        service: &Arc<Service>,
        session: Arc<Session>,
        respond: Respond<Self>,
    ) -> impl Future<Output = ()> + Send;

    /// Does it in a cluster, when it needs the answers of several leaders, or may have that of any.
    fn among_nodes(
        self,
        service: &Arc<Service>,
        session: Arc<Session>,
        respond: Respond<Self>,
    ) -> impl Future<Output = ()> + Send {
        self.here(service, session, respond)
    }

    /// This node's part of an answer that is put together from those of several nodes: what lies in `groups`.
    fn part(self, _service: &Arc<Service>, _session: Arc<Session>, _groups: Vec<GroupId>) -> PartRead {
        Box::pin(async { Err(Problem::invalid("no part can be made of this")) })
    }

    /// How many bytes its answer may have; 0 for those that are always small.
    fn answer_bytes_max(&self, _frame_bytes_max: usize) -> usize {
        0
    }
}

/// Does a request on this node, and waits for the answer.
pub(in crate::server) async fn done_here<O: Operation>(
    service: &Arc<Service>,
    session: Arc<Session>,
    request: O,
) -> Result<O::Answer, Problem> {
    let (out, answer) = oneshot::channel();
    let respond = Box::new(move |answer| {
        // Whoever asked may be gone.
        let _ = out.send(answer);
    });
    request.here(service, session, respond).await;
    answer.await.unwrap_or_else(|_| Err(Refused::Stopping.into()))
}
