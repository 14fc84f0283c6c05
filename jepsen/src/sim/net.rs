//! The network between simulated nodes: connections as TCP has them, on simulated time.
//!
//! Bytes of one direction come in order and whole, or the connection breaks; between connections anything may overtake
//! anything. What a node writes while the way is cut comes when the way is whole again, as it does after TCP has sent it
//! again, unless whoever waits has given up by then.
//!
//! ```text
//!   writer --> [queue: bytes, and when they arrive] --> reader      one such pipe in each direction
//!                       ^ nothing leaves it while the link is cut
//! ```
//!
//! Each pipe has chance of its own, so that one that carries a little more or less does not change all others.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, MutexGuard, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use boomerang::raft::dial::{Dial, Wire};
use boomerang_task::locks::Mutex;
use bytes::{Buf, Bytes};
use futures::FutureExt;
use futures::future::BoxFuture;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, Sleep};

pub type NodeId = u64;
/// One start of a node.
pub type LifeId = u64;

/// From one node to another.
pub type Link = (NodeId, NodeId);

/// How long bytes are on their way, in milliseconds.
const USUAL_MS: (u64, u64) = (0, 3);
const SLOW_MS: (u64, u64) = (10, 120);
/// What TCP sends again when a link is whole again comes within this.
const SENT_AGAIN_MS: u64 = 200;

#[derive(Clone)]
pub struct Net {
    inner: Arc<Mutex<NetInner>>,
    healed: Arc<Notify>,
}

struct NetInner {
    seed: u64,
    connections: u64,
    /// How many faults cut it.
    cut: BTreeMap<Link, u32>,
    slow: BTreeMap<Link, u32>,
    listeners: BTreeMap<NodeId, (LifeId, mpsc::UnboundedSender<Wire>)>,
    pipes: Vec<Weak<Mutex<Pipe>>>,
}

/// One direction of a connection.
struct Pipe {
    from: (NodeId, LifeId),
    to: (NodeId, LifeId),
    queue: VecDeque<(Instant, Bytes)>,
    /// Nothing arrives before what was written before it.
    last_at: Instant,
    end: Option<End>,
    reader: Option<Waker>,
    rng: SmallRng,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// After what is in the queue.
    Closed,
    /// At once.
    Broken,
    /// Whoever is at the other end is gone, and nobody says so.
    Silent,
}

fn lock(pipe: &Mutex<Pipe>) -> MutexGuard<'_, Pipe> {
    pipe.lock()
}

impl Pipe {
    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    fn finish(&mut self, end: End) {
        if self.end != Some(End::Broken) {
            self.end = Some(end);
        }
        self.wake();
    }

    fn link(&self) -> Link {
        (self.from.0, self.to.0)
    }
}

/// Whether nothing is left of it.
fn less(counts: &mut BTreeMap<Link, u32>, link: Link) -> bool {
    let Some(count) = counts.get_mut(&link) else { return false };
    *count -= 1;
    if *count == 0 {
        counts.remove(&link);
    }
    !counts.contains_key(&link)
}

impl Net {
    pub fn new(seed: u64) -> Self {
        let inner = NetInner {
            seed,
            connections: 0,
            cut: BTreeMap::new(),
            slow: BTreeMap::new(),
            listeners: BTreeMap::new(),
            pipes: Vec::new(),
        };
        Self { inner: Arc::new(Mutex::new(inner)), healed: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, NetInner> {
        self.inner.lock()
    }

    /// Where `node` is, for those who dial.
    pub fn address(node: NodeId) -> String {
        format!("node-{node}:1")
    }

    /// Connections to `node` from now on, as long as this life of it lasts.
    pub fn listen(&self, node: NodeId, life: LifeId) -> mpsc::UnboundedReceiver<Wire> {
        let (out, wires) = mpsc::unbounded_channel();
        self.lock().listeners.insert(node, (life, out));
        wires
    }

    pub fn dialer(&self, node: NodeId, life: LifeId) -> Arc<dyn Dial> {
        Arc::new(Dialer { net: self.clone(), from: (node, life) })
    }

    /// Nothing goes this way until it is mended.
    pub fn cut(&self, link: Link) {
        *self.lock().cut.entry(link).or_default() += 1;
    }

    /// The same, and the connections that go this way break at once.
    pub fn cut_and_break(&self, link: Link) {
        self.cut(link);
        let both = [link, (link.1, link.0)];
        self.each_pipe(|pipe| both.contains(&pipe.link()).then_some(End::Broken));
    }

    pub fn slow(&self, link: Link) {
        *self.lock().slow.entry(link).or_default() += 1;
    }

    /// One fault less makes it slow.
    pub fn hurry(&self, link: Link) {
        less(&mut self.lock().slow, link);
    }

    /// One fault less cuts it. If it was the last, what was written meanwhile is sent again.
    pub fn mend(&self, link: Link) {
        if !less(&mut self.lock().cut, link) {
            return;
        }
        for pipe in self.pipes() {
            let mut pipe = lock(&pipe);
            if pipe.link() == link {
                let again = Instant::now() + Duration::from_millis(pipe.rng.random_range(0..SENT_AGAIN_MS));
                pipe.queue.iter_mut().for_each(|(at, _)| *at = (*at).max(again));
                pipe.last_at = pipe.last_at.max(again);
                pipe.wake();
            }
        }
        self.healed.notify_waiters();
    }

    pub fn mend_all(&self) {
        self.lock().slow.clear();
        let cut: Vec<Link> = self.lock().cut.keys().copied().collect();
        for link in cut {
            self.lock().cut.insert(link, 1);
            self.mend(link);
        }
    }

    /// The node is gone. `silently`: the others are not told, as when a machine loses its power.
    pub fn crash(&self, node: NodeId, silently: bool) {
        self.lock().listeners.remove(&node);
        self.each_pipe(|pipe| match silently {
            _ if pipe.to.0 == node => Some(End::Silent),
            true if pipe.from.0 == node => Some(End::Silent),
            false if pipe.from.0 == node => Some(End::Broken),
            _ => None,
        });
    }

    /// The node is there again, and knows nothing of connections it had before.
    pub fn back(&self, node: NodeId) {
        self.each_pipe(|pipe| (pipe.end == Some(End::Silent) && pipe.from.0 == node).then_some(End::Broken));
    }

    fn each_pipe(&self, end: impl Fn(&Pipe) -> Option<End>) {
        for pipe in self.pipes() {
            let mut pipe = lock(&pipe);
            if let Some(end) = end(&pipe) {
                pipe.finish(end);
            }
        }
    }

    fn pipes(&self) -> Vec<Arc<Mutex<Pipe>>> {
        let mut inner = self.lock();
        inner.pipes.retain(|pipe| pipe.strong_count() > 0);
        inner.pipes.iter().filter_map(Weak::upgrade).collect()
    }

    fn is_cut(&self, link: Link) -> bool {
        self.lock().cut.contains_key(&link)
    }

    fn latency(&self, link: Link, rng: &mut SmallRng) -> Duration {
        let (from_ms, until_ms) = if self.lock().slow.contains_key(&link) { SLOW_MS } else { USUAL_MS };
        Duration::from_millis(rng.random_range(from_ms..until_ms))
    }

    fn connect(&self, from: (NodeId, LifeId), to: NodeId) -> io::Result<Wire> {
        let mut inner = self.lock();
        let Some((life, accept)) = inner.listeners.get(&to).cloned() else {
            return Err(io::ErrorKind::ConnectionRefused.into());
        };
        let to = (to, life);
        inner.connections += 1;
        let seed = inner.seed ^ (inner.connections << 1);
        let mut pipe = |from, to, seed| {
            let (queue, rng) = (VecDeque::new(), SmallRng::seed_from_u64(seed));
            let pipe = Pipe { from, to, queue, last_at: Instant::now(), end: None, reader: None, rng };
            let pipe = Arc::new(Mutex::new(pipe));
            inner.pipes.push(Arc::downgrade(&pipe));
            pipe
        };
        let (there, back) = (pipe(from, to, seed), pipe(to, from, seed + 1));
        drop(inner);
        let ours = Socket { net: self.clone(), read: back.clone(), write: there.clone(), sleep: None };
        let theirs = Socket { net: self.clone(), read: there, write: back, sleep: None };
        accept.send(Wire::new(theirs)).map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        Ok(Wire::new(ours))
    }
}

struct Dialer {
    net: Net,
    from: (NodeId, LifeId),
}

impl Dial for Dialer {
    fn dial(&self, to: NodeId, _: &str) -> BoxFuture<'static, io::Result<Wire>> {
        let (net, from) = (self.net.clone(), self.from);
        async move {
            // Whoever dials over a cut link waits, until it is whole or patience is over.
            loop {
                let healed = net.healed.notified();
                if !net.is_cut((from.0, to)) && !net.is_cut((to, from.0)) {
                    break;
                }
                healed.await;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
            net.connect(from, to)
        }
        .boxed()
    }
}

/// One end of a connection.
struct Socket {
    net: Net,
    read: Arc<Mutex<Pipe>>,
    write: Arc<Mutex<Pipe>>,
    /// Until the next bytes arrive.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let socket = self.get_mut();
        loop {
            let at = {
                let mut pipe = lock(&socket.read);
                pipe.reader = Some(context.waker().clone());
                if pipe.end == Some(End::Broken) {
                    return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                }
                if pipe.end == Some(End::Silent) || socket.net.is_cut(pipe.link()) {
                    return Poll::Pending;
                }
                let closed = pipe.end == Some(End::Closed);
                match pipe.queue.front_mut() {
                    None if closed => return Poll::Ready(Ok(())),
                    None => return Poll::Pending,
                    Some((at, bytes)) if *at <= Instant::now() => {
                        let taken = bytes.len().min(buf.remaining());
                        buf.put_slice(&bytes[..taken]);
                        bytes.advance(taken);
                        if bytes.is_empty() {
                            pipe.queue.pop_front();
                        }
                        return Poll::Ready(Ok(()));
                    }
                    Some((at, _)) => *at,
                }
            };
            let sleep = socket.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
            if sleep.deadline() != at {
                sleep.as_mut().reset(at);
            }
            if sleep.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut pipe = lock(&self.write);
        match pipe.end {
            Some(End::Broken | End::Closed) => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            // Into the void.
            Some(End::Silent) => return Poll::Ready(Ok(bytes.len())),
            None => {}
        }
        let link = pipe.link();
        let latency = self.net.latency(link, &mut pipe.rng);
        let at = pipe.last_at.max(Instant::now() + latency);
        pipe.last_at = at;
        pipe.queue.push_back((at, Bytes::copy_from_slice(bytes)));
        pipe.wake();
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        close(&self.write);
        Poll::Ready(Ok(()))
    }
}

fn close(pipe: &Mutex<Pipe>) {
    let mut pipe = lock(pipe);
    if pipe.end.is_none() {
        pipe.finish(End::Closed);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        close(&self.write);
        // What the other side still writes meets nobody.
        let mut read = lock(&self.read);
        if read.end.is_none() {
            read.end = Some(End::Broken);
        }
    }
}
