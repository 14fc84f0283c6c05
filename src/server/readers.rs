//! Who reads pages: lists of tasks and of dead letters, as long as they may be.
//!
//! A page costs thousands of reads, as much processor time as some hundred registrations, and nothing is late because of
//! it. So pages are read by a few threads of their own, which give way to all others, one after the other. A page that
//! would wait long for its turn is refused, with the time after which to ask again; and so is one that has waited long,
//! because those before it took longer than usual.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::problem::Problem;
use crate::blocking;
use crate::wire::problems::Code;

/// A page that would wait longer is refused.
const WAIT_MAX: Duration = Duration::from_millis(150);
/// A page that has waited longer is refused, and not read any more.
const WAITED_MAX: Duration = Duration::from_millis(300);
/// So many may always wait, for each thread: a single one that took long says little about the next.
const FEW: usize = 4;
/// So many may wait for each thread, however quick pages are.
const MANY: usize = 128;
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// The part of the newest page in what pages are taken to cost: one of so many.
const NEWEST: u64 = 8;

/// The threads, and who waits for them; cheap to clone.
#[derive(Clone)]
pub struct Readers {
    threads: Handle,
    line: Arc<Line>,
    /// A page that has not been begun with after this time is refused.
    waited_max: Duration,
}

struct Line {
    threads: usize,
    /// Pages that are read, or wait for it.
    under_way: AtomicUsize,
    /// About how long a page takes, in microseconds; 0 until one was read.
    took_us: AtomicU64,
}

/// In the line, until it is dropped.
struct Place(Arc<Line>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Readers {
    /// `threads` are those of the runtime behind `handle`, and nobody else has them.
    pub fn new(handle: Handle, threads: usize) -> Self {
        Self { threads: handle, line: Arc::new(Line::new(threads)), waited_max: WAITED_MAX }
    }

    /// Why no page is read now, if none is.
    pub(super) fn busy(&self) -> Option<Problem> {
        self.line.busy()
    }

    /// Reads a page, unless it would wait, or has waited, for longer than is useful.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        page: impl FnOnce() -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        if let Some(busy) = self.busy() {
            return Err(busy);
        }
        let place = Line::join(&self.line);
        if blocking::on_one_thread() {
            return page();
        }
        let (begins, has_begun) = oneshot::channel();
        let reading = async move {
            let begun = Instant::now();
            // Whoever waits may be gone.
            let _ = begins.send(());
            let read = page();
            place.0.has_taken(begun.elapsed());
            read
        };
        // Nothing is read for whoever has gone before it was begun.
        let reading = AbortOnDropHandle::new(self.threads.spawn(reading));
        // Told here and not by a reader: they come to it late, for they give way to all others.
        if timeout(self.waited_max, has_begun).await.is_err() {
            return Err(busy(self.waited_max));
        }
        reading.await.map_err(|error| match error.is_panic() {
            true => Problem::new(Code::Failed, "the node has failed to read this list; its log says why"),
            false => Problem::new(Code::Failed, "the node is stopping"),
        })?
    }
}

impl Line {
    fn new(threads: usize) -> Self {
        Self { threads, under_way: AtomicUsize::new(0), took_us: AtomicU64::new(0) }
    }

    fn join(line: &Arc<Self>) -> Place {
        line.under_way.fetch_add(1, Ordering::Relaxed);
        Place(line.clone())
    }

    fn has_taken(&self, newest: Duration) {
        let newest_us = u64::try_from(newest.as_micros()).unwrap_or(u64::MAX / NEWEST).clamp(1, u64::MAX / NEWEST);
        // Of two that end at once, one may be forgotten.
        let took_us = match self.took_us.load(Ordering::Relaxed) {
            0 => newest_us,
            before_us => (before_us * (NEWEST - 1) + newest_us) / NEWEST,
        };
        self.took_us.store(took_us, Ordering::Relaxed);
    }

    fn busy(&self) -> Option<Problem> {
        let under_way = self.under_way.load(Ordering::Relaxed);
        if under_way < FEW * self.threads {
            return None;
        }
        let rounds = u64::try_from(under_way / self.threads).unwrap_or(u64::MAX);
        let wait = Duration::from_micros(self.took_us.load(Ordering::Relaxed).saturating_mul(rounds));
        (wait > WAIT_MAX || under_way >= MANY * self.threads).then(|| busy(wait))
    }
}

/// Nothing was read, for lists wait so long for their turn.
fn busy(wait: Duration) -> Problem {
    let text = format!("lists wait {} ms for their turn; ask again later", wait.as_millis());
    Problem::overloaded(text, wait.clamp(RETRY_MIN, RETRY_MAX))
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn a_page_is_refused_that_would_wait_long() {
        let line = Arc::new(Line::new(2));
        let places: Vec<Place> = (0..20).map(|_| Line::join(&line)).collect();
        assert!(line.busy().is_none(), "nobody knows how long a page takes");
        line.has_taken(Duration::from_millis(30));
        let busy = line.busy().unwrap();
        assert_eq!(busy.code, Code::Overloaded);
        assert_eq!(busy.detail.unwrap().retry_after_ms, 300, "ten rounds of 30 ms");
        (0..100).for_each(|_| line.has_taken(Duration::from_millis(5)));
        assert!(line.busy().is_none(), "50 ms");
        (0..100).for_each(|_| line.has_taken(Duration::from_secs(9)));
        assert_eq!(line.busy().unwrap().detail.unwrap().retry_after_ms, 2_000);
        drop(places);
        let _few: Vec<Place> = (1..FEW * 2).map(|_| Line::join(&line)).collect();
        assert!(line.busy().is_none(), "so few may always wait");
    }

    #[test]
    fn the_line_is_bounded_however_quick_pages_are() {
        let line = Arc::new(Line::new(2));
        let mut places: Vec<Place> = (1..2 * MANY).map(|_| Line::join(&line)).collect();
        line.has_taken(Duration::ZERO);
        assert!(line.busy().is_none());
        places.push(Line::join(&line));
        assert_eq!(line.busy().unwrap().detail.unwrap().retry_after_ms, 50);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_page_whose_turn_comes_late_is_not_read() {
        let threads = crate::threads::Threads::readers().unwrap();
        let readers = Readers::new(threads.handle().clone(), 2);
        let hasty = Readers { waited_max: Duration::from_millis(1), ..readers.clone() };
        let (on, both) = (Arc::new(Barrier::new(3)), Arc::new(Barrier::new(3)));
        // Both threads have a page, until they are released.
        let busy = [(); 2].map(|()| {
            let (readers, on, both) = (readers.clone(), on.clone(), both.clone());
            tokio::spawn(async move {
                let page = move || {
                    both.wait();
                    on.wait();
                    Ok(())
                };
                readers.read(page).await
            })
        });
        blocking::in_place(|| both.wait());
        let late = hasty.read(|| -> Result<(), Problem> { panic!("it is read") }).await.unwrap_err();
        blocking::in_place(|| on.wait());
        for busy in busy {
            busy.await.unwrap().unwrap();
        }
        assert_eq!(late.code, Code::Overloaded);
        let left = async {
            while readers.line.under_way.load(Ordering::Relaxed) > 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(20), left).await.expect("all three leave the line");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn pages_are_read_elsewhere_and_leave_the_line() {
        let threads = crate::threads::Threads::readers().unwrap();
        let readers = Readers::new(threads.handle().clone(), 2);
        let name = || Ok(std::thread::current().name().unwrap().to_owned());
        assert_eq!(readers.read(name).await.unwrap(), "readers");
        let refusal = readers.read(|| Err::<(), _>(Problem::new(Code::InvalidRequest, "no"))).await.unwrap_err();
        assert_eq!(refusal.code, Code::InvalidRequest);
        let panics = readers.read(|| -> Result<(), Problem> { panic!("on purpose") }).await.unwrap_err();
        assert!(panics.text.contains("failed to read"), "{}", panics.text);
        assert_eq!(readers.line.under_way.load(Ordering::Relaxed), 0);
    }
}
