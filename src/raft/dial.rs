//! How one node gets a connection to another.
//!
//! Over TCP, see [`super::peer_credentials`]. A simulation connects nodes by bytes of its own, on which everything else
//! runs as it always does.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::codegen::Service;
use tonic::codegen::http::Uri;
use tonic::transport::server::Connected;

/// Bytes in both directions, and in order, as TCP has them.
pub trait Bytes: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Bytes for T {}

/// One end of a connection.
pub struct Wire(Box<dyn Bytes>);

impl Wire {
    pub fn new(bytes: impl Bytes) -> Self {
        Self(Box::new(bytes))
    }
}

/// Who makes connections.
pub trait Dial: Send + Sync + 'static {
    /// Node and `address` as they were given to [`super::PeerNetwork::set`].
    fn dial(&self, node_id: u64, address: &str) -> BoxFuture<'static, io::Result<Wire>>;
}

/// A [`Dial`] to one node, as tonic takes it.
#[derive(Clone)]
pub(super) struct Dialer {
    pub dial: Arc<dyn Dial>,
    pub node_id: u64,
    pub address: String,
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<Wire>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<TokioIo<Wire>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let dialed = self.dial.dial(self.node_id, &self.address);
        Box::pin(async { Ok(TokioIo::new(dialed.await?)) })
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_read(context, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_shutdown(context)
    }
}

impl Connected for Wire {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}
