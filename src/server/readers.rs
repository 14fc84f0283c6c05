//! Who reads pages: lists of tasks and of dead letters, as long as they may be.
//!
//! A page costs thousands of reads, as much processor time as some hundred registrations, and nothing is late because of
//! it. So pages are read by a few threads of their own, which give way to all others, one after the other; and a page
//! that would wait long for its turn is refused, with the time after which to ask again.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;

use super::requests::Problem;
use crate::blocking;
use crate::wire::proto::Status;

/// A page that would wait longer is refused.
const WAIT_MAX: Duration = Duration::from_millis(250);
/// So many may always wait, for each thread: a single one that took long says little about the next.
const FEW: usize = 4;
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// The part of the newest page in what pages are taken to cost: one of so many.
const NEWEST: u32 = 8;

/// The threads, and who waits for them; cheap to clone.
#[derive(Clone)]
pub struct Readers {
    threads: Handle,
    line: Arc<Line>,
}

struct Line {
    threads: usize,
    /// Pages that are read, or wait for it.
    under_way: AtomicUsize,
    took: Mutex<Duration>,
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
        Self { threads: handle, line: Arc::new(Line::new(threads)) }
    }

    /// Why no page is read now, if none is.
    pub(super) fn busy(&self) -> Option<Problem> {
        self.line.busy()
    }

    /// Reads a page, unless others wait already for longer than is useful.
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
        let reading = async move {
            let begun = Instant::now();
            let read = page();
            place.0.has_taken(begun.elapsed());
            read
        };
        let stopping = |_| Problem::new(Status::Error, "the node is stopping");
        // Nothing is read for whoever has gone before it was begun.
        AbortOnDropHandle::new(self.threads.spawn(reading)).await.map_err(stopping)?
    }
}

impl Line {
    fn new(threads: usize) -> Self {
        Self { threads, under_way: AtomicUsize::new(0), took: Mutex::default() }
    }

    fn join(line: &Arc<Self>) -> Place {
        line.under_way.fetch_add(1, Ordering::Relaxed);
        Place(line.clone())
    }

    fn has_taken(&self, newest: Duration) {
        let mut took = self.took.lock().expect("no panic under this lock");
        *took = (*took * (NEWEST - 1) + newest) / NEWEST;
    }

    fn busy(&self) -> Option<Problem> {
        let under_way = self.under_way.load(Ordering::Relaxed);
        if under_way < FEW * self.threads {
            return None;
        }
        let rounds = u32::try_from(under_way / self.threads).unwrap_or(u32::MAX);
        let wait = self.took.lock().expect("no panic under this lock").saturating_mul(rounds);
        (wait > WAIT_MAX).then(|| {
            let text = format!("lists wait {} ms for their turn; ask again later", wait.as_millis());
            Problem::overloaded(text, wait.clamp(RETRY_MIN, RETRY_MAX))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_refused_that_would_wait_long() {
        let line = Arc::new(Line::new(2));
        let places: Vec<Place> = (0..20).map(|_| Line::join(&line)).collect();
        assert!(line.busy().is_none(), "nobody knows how long a page takes");
        (0..100).for_each(|_| line.has_taken(Duration::from_millis(30)));
        let busy = line.busy().unwrap();
        assert_eq!(busy.status, Status::Overloaded);
        let wait_ms = busy.detail.unwrap().retry_after_ms;
        assert!((280..=300).contains(&wait_ms), "ten rounds of nearly 30 ms: {wait_ms}");
        (0..100).for_each(|_| line.has_taken(Duration::from_millis(5)));
        assert!(line.busy().is_none(), "50 ms");
        (0..100).for_each(|_| line.has_taken(Duration::from_secs(9)));
        assert_eq!(line.busy().unwrap().detail.unwrap().retry_after_ms, 2_000);
        drop(places);
        let _few: Vec<Place> = (1..FEW * 2).map(|_| Line::join(&line)).collect();
        assert!(line.busy().is_none(), "so few may always wait");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn pages_are_read_elsewhere_and_leave_the_line() {
        let threads = crate::threads::Threads::readers().unwrap();
        let readers = Readers::new(threads.handle().clone(), 2);
        let name = || Ok(std::thread::current().name().unwrap().to_owned());
        assert_eq!(readers.read(name).await.unwrap(), "readers");
        let refusal = readers.read(|| Err::<(), _>(Problem::new(Status::InvalidRequest, "no"))).await.unwrap_err();
        assert_eq!(refusal.status, Status::InvalidRequest);
        assert_eq!(readers.line.under_way.load(Ordering::Relaxed), 0);
    }
}
