//! From host names to addresses, such that a slow name server hurts only those who need it.
//!
//! The system's look-up holds a thread, from a pool that the whole node shares, and cannot be given up. So there is one
//! look-up per name at a time, few at a time in all, and what one finds is kept for a moment: also for those who come
//! while it is under way, and if whoever began it has stopped waiting.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use crate::task::locks::Mutex;

/// Threads that may be waiting for name servers.
const LOOK_UPS_MAX: usize = 32;
/// How long an address is used without asking again, and how long nobody asks again for a name that has none.
const KEPT_FOR: Duration = Duration::from_secs(5);
const FAILURE_KEPT_FOR: Duration = Duration::from_secs(1);

/// Why a name has no address.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the name '{host}' cannot be resolved: {why}")]
pub struct Unresolved {
    host: Arc<str>,
    why: Arc<str>,
}

type Found = Result<Arc<[IpAddr]>, Unresolved>;
/// What was found for a name, and when; locked while it is looked up.
type Known = Arc<tokio::sync::Mutex<Option<(Found, Instant)>>>;

/// How a look-up is done: in a thread that may wait.
type Ask = dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync;

/// Cheap to clone.
#[derive(Clone)]
pub struct Names {
    ask: Arc<Ask>,
    known: Arc<Mutex<HashMap<Box<str>, Known>>>,
    look_ups: Arc<Semaphore>,
}

impl Names {
    /// By whom the system asks.
    pub fn new() -> Self {
        Self::asking(ask_system)
    }

    pub fn asking(ask: impl Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static) -> Self {
        Self { ask: Arc::new(ask), known: Arc::default(), look_ups: Arc::new(Semaphore::new(LOOK_UPS_MAX)) }
    }

    /// The same, with look-ups of its own: those of one wait for none of the other.
    pub fn apart(&self) -> Self {
        Self { ask: self.ask.clone(), known: Arc::default(), look_ups: Arc::new(Semaphore::new(LOOK_UPS_MAX)) }
    }

    /// The addresses of a host; at least one.
    pub async fn look_up(&self, host: &str) -> Found {
        let known = self.known(host);
        let mut known = known.lock_owned().await;
        if let Some((found, at)) = &*known
            && at.elapsed() < kept_for(found)
        {
            return found.clone();
        }
        let permit = self.look_ups.clone().acquire_owned().await.expect("the semaphore is never closed");
        let host: Arc<str> = host.into();
        let asked = host.clone();
        let ask = self.ask.clone();
        let look_up = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let found = found(&asked, ask(&asked));
            *known = Some((found.clone(), Instant::now()));
            found
        });
        look_up.await.unwrap_or_else(|_| Err(Unresolved { host, why: "this node is stopping".into() }))
    }

    fn known(&self, host: &str) -> Known {
        let mut known = self.known.lock();
        if let Some(known) = known.get(host) {
            return known.clone();
        }
        known.entry(host.into()).or_default().clone()
    }

    #[cfg(test)]
    pub fn forget(&self, host: &str) {
        self.known.lock().remove(host);
    }

    /// Forgets what is too old to be used.
    pub fn forget_old(&self) {
        let mut known = self.known.lock();
        known.retain(|_, known| match known.try_lock() {
            Ok(known) => known.as_ref().is_some_and(|(found, at)| at.elapsed() < kept_for(found)),
            // It is being looked up.
            Err(_) => true,
        });
    }
}

fn kept_for(found: &Found) -> Duration {
    if found.is_ok() { KEPT_FOR } else { FAILURE_KEPT_FOR }
}

fn found(host: &Arc<str>, answer: io::Result<Vec<IpAddr>>) -> Found {
    let unresolved = |why: String| Unresolved { host: host.clone(), why: why.into() };
    let mut addresses: Vec<IpAddr> = Vec::new();
    for ip in answer.map_err(|error| unresolved(error.to_string()))? {
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    if addresses.is_empty() {
        return Err(unresolved("it has no address".into()));
    }
    Ok(addresses.into())
}

fn ask_system(host: &str) -> io::Result<Vec<IpAddr>> {
    Ok((host, 0).to_socket_addrs()?.map(|address| address.ip()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_are_kept_for_a_moment() {
        let names = Names::new();
        let found = names.look_up("localhost").await.unwrap();
        assert!(found.iter().all(IpAddr::is_loopback), "{found:?}");
        let kept = names.known("localhost").lock().await.clone();
        let (_, at) = kept.unwrap();
        names.forget_old();
        assert_eq!(names.look_up("localhost").await.unwrap(), found);
        assert_eq!(names.known("localhost").lock().await.as_ref().unwrap().1, at, "asked again");

        let error = names.look_up("no-such-host.invalid").await.unwrap_err().to_string();
        assert!(error.starts_with("the name 'no-such-host.invalid' cannot be resolved: "), "{error}");
        names.known("no-such-host.invalid").lock().await.as_mut().unwrap().1 -= FAILURE_KEPT_FOR;
        names.forget_old();
        assert_eq!(names.known.lock().len(), 1);
    }

    #[tokio::test]
    async fn whoever_gives_up_leaves_the_answer_to_the_next() {
        let names = Names::new();
        let held = names.look_ups.clone().acquire_many_owned(LOOK_UPS_MAX as u32).await.unwrap();
        let mut first = Box::pin(names.look_up("localhost"));
        assert!(futures::poll!(&mut first).is_pending());
        let mut second = Box::pin(names.look_up("localhost"));
        assert!(futures::poll!(&mut second).is_pending());
        drop((first, held));
        assert!(second.await.is_ok());
    }
}
