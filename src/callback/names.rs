//! From host names to addresses, such that a slow name server hurts only those who need it.
//!
//! The system's look-up holds a thread, from a pool that the whole node shares, and cannot be given up. So there is one
//! look-up per name at a time, few at a time in all, and what one finds is kept for a moment: also for those who come
//! while it is under way, and if whoever began it has stopped waiting.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::task::locks::Mutex;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::sync::Semaphore;

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

/// Cheap to clone.
#[derive(Clone)]
pub struct Names {
    known: Arc<Mutex<HashMap<Box<str>, Known>>>,
    look_ups: Arc<Semaphore>,
}

impl Names {
    pub fn new() -> Self {
        Self { known: Arc::default(), look_ups: Arc::new(Semaphore::new(LOOK_UPS_MAX)) }
    }

    /// The addresses of `host:port`; at least one.
    pub async fn addresses(&self, endpoint: &str) -> Result<Vec<SocketAddr>, Unresolved> {
        if let Ok(address) = endpoint.parse() {
            return Ok(vec![address]);
        }
        let unresolved = || Unresolved { host: endpoint.into(), why: "it is not host:port".into() };
        let (host, port) = endpoint.rsplit_once(':').ok_or_else(unresolved)?;
        let port = port.parse().map_err(|_| unresolved())?;
        let found = self.look_up(host).await?;
        Ok(found.iter().map(|ip| SocketAddr::new(*ip, port)).collect())
    }

    async fn look_up(&self, host: &str) -> Found {
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
        let look_up = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let found = ask_system(&asked);
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

fn ask_system(host: &Arc<str>) -> Found {
    let unresolved = |why: String| Unresolved { host: host.clone(), why: why.into() };
    let found = (&**host, 0).to_socket_addrs().map_err(|error| unresolved(error.to_string()))?;
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in found {
        if !addresses.contains(&address.ip()) {
            addresses.push(address.ip());
        }
    }
    if addresses.is_empty() {
        return Err(unresolved("it has no address".into()));
    }
    Ok(addresses.into())
}

/// For reqwest.
impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        let names = self.clone();
        Box::pin(async move {
            let found = names.look_up(name.as_str()).await?;
            let addresses: Vec<SocketAddr> = found.iter().map(|ip| SocketAddr::new(*ip, 0)).collect();
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_are_kept_for_a_moment_and_addresses_need_no_look_up() {
        let names = Names::new();
        let addresses = names.addresses("[::1]:9").await.unwrap();
        assert_eq!(addresses, ["[::1]:9".parse().unwrap()]);
        assert!(names.known.lock().is_empty());

        let found = names.addresses("localhost:9").await.unwrap();
        assert!(found.iter().all(|address| address.ip().is_loopback() && address.port() == 9), "{found:?}");
        let kept = names.known("localhost").lock().await.clone();
        let (_, at) = kept.unwrap();
        names.forget_old();
        assert_eq!(names.addresses("localhost:10").await.unwrap().len(), found.len());
        assert_eq!(names.known("localhost").lock().await.as_ref().unwrap().1, at, "asked again");

        let error = names.addresses("no-such-host.invalid:9").await.unwrap_err().to_string();
        assert!(error.starts_with("the name 'no-such-host.invalid' cannot be resolved: "), "{error}");
        names.known("no-such-host.invalid").lock().await.as_mut().unwrap().1 -= FAILURE_KEPT_FOR;
        names.forget_old();
        assert_eq!(names.known.lock().len(), 1);
    }

    #[tokio::test]
    async fn whoever_gives_up_leaves_the_answer_to_the_next() {
        let names = Names::new();
        let held = names.look_ups.clone().acquire_many_owned(LOOK_UPS_MAX as u32).await.unwrap();
        let mut first = Box::pin(names.addresses("localhost:9"));
        assert!(futures::poll!(&mut first).is_pending());
        let mut second = Box::pin(names.addresses("localhost:9"));
        assert!(futures::poll!(&mut second).is_pending());
        drop((first, held));
        assert!(second.await.is_ok());
    }
}
