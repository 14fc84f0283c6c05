//! Who is connected to a listener: how many at a time, in all and from one address.
//!
//! A connection is a stranger until it has shown who it is. When there is no room for another one, the stranger that has
//! been there longest makes room: first of those from the same address, if that address has too many. So whoever only
//! holds connections open keeps nobody out, and those who are known stay.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::task::ClientId;
use crate::task::locks::Mutex;

/// How many there may be.
#[derive(Debug, Clone, Copy)]
pub struct GuestLimits {
    pub all: usize,
    pub of_an_address: usize,
}

/// Of one listener. Cheap to clone.
#[derive(Clone)]
pub struct Guests {
    limits: GuestLimits,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    next: u64,
    all: usize,
    by_address: HashMap<IpAddr, Address>,
    /// Those that are known.
    by_client: HashMap<ClientId, usize>,
    /// In the order in which they came.
    strangers: BTreeMap<u64, Stranger>,
}

#[derive(Default)]
struct Address {
    all: usize,
    strangers: BTreeSet<u64>,
}

struct Stranger {
    address: IpAddr,
    out: CancellationToken,
}

/// A connection, as long as it is open.
pub struct Guest {
    guests: Guests,
    number: u64,
    address: IpAddr,
    out: CancellationToken,
    /// Once it is known.
    client: Option<ClientId>,
}

impl Guests {
    pub fn new(limits: GuestLimits) -> Self {
        Self { limits, inner: Arc::default() }
    }

    /// A stranger. `None`: there is no room, and no stranger who could make it.
    pub fn admit(&self, ip: IpAddr) -> Option<Guest> {
        let address = whose(ip);
        let mut inner = self.inner.lock();
        let of_address = inner.by_address.get(&address);
        if of_address.is_some_and(|of_address| of_address.all >= self.limits.of_an_address) {
            let oldest = of_address.and_then(|of_address| of_address.strangers.first().copied())?;
            inner.show_out(oldest);
        }
        if inner.all >= self.limits.all {
            let oldest = *inner.strangers.first_key_value()?.0;
            inner.show_out(oldest);
        }
        let (number, out) = (inner.next, CancellationToken::new());
        inner.next += 1;
        inner.all += 1;
        inner.strangers.insert(number, Stranger { address, out: out.clone() });
        let of_address = inner.by_address.entry(address).or_default();
        of_address.all += 1;
        of_address.strangers.insert(number);
        Some(Guest { guests: self.clone(), number, address, out, client: None })
    }
}

impl Inner {
    /// A stranger who is to go; its place is free from now on.
    fn show_out(&mut self, number: u64) {
        if let Some(stranger) = self.strangers.remove(&number) {
            stranger.out.cancel();
            self.leave(number, stranger.address);
        }
    }

    fn leave_client(&mut self, client: &ClientId) {
        if let Some(count) = self.by_client.get_mut(client) {
            *count -= 1;
            if *count == 0 {
                self.by_client.remove(client);
            }
        }
    }

    fn leave(&mut self, number: u64, address: IpAddr) {
        self.all -= 1;
        if let Some(of_address) = self.by_address.get_mut(&address) {
            of_address.all -= 1;
            of_address.strangers.remove(&number);
            if of_address.all == 0 {
                self.by_address.remove(&address);
            }
        }
    }
}

impl Guest {
    /// It has shown who it is, and stays: unless half of all connections are of this client already.
    pub fn is_known(&mut self, client: &ClientId) {
        let mut inner = self.guests.inner.lock();
        let of_client = inner.by_client.get(client).copied().unwrap_or(0);
        if of_client >= self.guests.limits.all.div_ceil(2) || inner.strangers.remove(&self.number).is_none() {
            return;
        }
        if let Some(of_address) = inner.by_address.get_mut(&self.address) {
            of_address.strangers.remove(&self.number);
        }
        *inner.by_client.entry(client.clone()).or_default() += 1;
        self.client = Some(client.clone());
    }

    /// Nobody knows any more who it is.
    pub fn is_stranger(&mut self) {
        let mut inner = self.guests.inner.lock();
        let Some(client) = self.client.take() else { return };
        inner.leave_client(&client);
        let stranger = Stranger { address: self.address, out: self.out.clone() };
        inner.strangers.insert(self.number, stranger);
        inner.by_address.entry(self.address).or_default().strangers.insert(self.number);
    }

    /// Until it has to make room for another one.
    pub fn shown_out(&self) -> impl Future<Output = ()> + Send + 'static {
        self.out.clone().cancelled_owned()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut inner = self.guests.inner.lock();
        // Whoever was shown out has left already.
        if !self.out.is_cancelled() {
            inner.strangers.remove(&self.number);
            inner.leave(self.number, self.address);
            if let Some(client) = &self.client {
                inner.leave_client(client);
            }
        }
    }
}

/// Of IPv6, whoever has one address has as many as there are in the same network.
pub(super) fn whose(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn guests(all: usize, of_an_address: usize) -> Guests {
        Guests::new(GuestLimits { all, of_an_address })
    }

    fn admit(guests: &Guests, address: &str) -> Option<Guest> {
        guests.admit(address.parse().unwrap())
    }

    fn know(guest: &mut Guest, client: &str) {
        guest.is_known(&client.parse().unwrap());
    }

    fn is_out(guest: &Guest) -> bool {
        guest.shown_out().now_or_never().is_some()
    }

    #[test]
    fn the_oldest_stranger_makes_room_and_the_known_stay() {
        let guests = guests(3, 3);
        let mut known = admit(&guests, "10.0.0.1").unwrap();
        know(&mut known, "a");
        let (first, mut second) = (admit(&guests, "10.0.0.2").unwrap(), admit(&guests, "10.0.0.3").unwrap());
        let mut third = admit(&guests, "10.0.0.4").unwrap();
        assert!(is_out(&first) && !is_out(&second) && !is_out(&known));
        // Whoever was shown out does not leave a second time.
        drop(first);
        know(&mut second, "b");
        know(&mut third, "b");
        assert!(admit(&guests, "10.0.0.5").is_none(), "all are known");
        // Its session has ended.
        known.is_stranger();
        assert!(admit(&guests, "10.0.0.5").is_some());
        assert!(is_out(&known));
        drop(second);
        assert!(admit(&guests, "10.0.0.5").is_some());
    }

    #[test]
    fn an_address_makes_room_for_itself() {
        let guests = guests(10, 2);
        let other = admit(&guests, "10.0.0.9").unwrap();
        let (first, mut second) = (admit(&guests, "::ffff:10.0.0.1").unwrap(), admit(&guests, "10.0.0.1").unwrap());
        let mut third = admit(&guests, "10.0.0.1").unwrap();
        assert!(is_out(&first) && !is_out(&second) && !is_out(&other));
        know(&mut second, "a");
        know(&mut third, "a");
        assert!(admit(&guests, "10.0.0.1").is_none(), "both are known");
        assert!(admit(&guests, "10.0.0.2").is_some());
        let (a, b) = (admit(&guests, "2001:db8::1").unwrap(), admit(&guests, "2001:db8::2").unwrap());
        let c = admit(&guests, "2001:db8::3").unwrap();
        assert!(is_out(&a) && !is_out(&b) && !is_out(&c), "a network is one address");
    }

    #[test]
    fn one_client_does_not_take_all() {
        let guests = guests(4, 4);
        let mut of_a: Vec<Guest> = (0..4).map(|_| admit(&guests, "10.0.0.1").unwrap()).collect();
        of_a.iter_mut().for_each(|guest| know(guest, "a"));
        let (mut b, mut c) = (admit(&guests, "10.0.0.2").unwrap(), admit(&guests, "10.0.0.2").unwrap());
        know(&mut b, "b");
        know(&mut c, "c");
        let out: Vec<bool> = of_a.iter().map(is_out).collect();
        assert_eq!(out, [false, false, true, true], "what is more than half has made room");
    }

    #[test]
    fn nothing_stays_of_those_who_have_left() {
        let guests = guests(100, 100);
        for round in 0..1_000_u32 {
            let mut one = admit(&guests, "10.0.0.1").unwrap();
            let two = admit(&guests, "10.0.0.2").unwrap();
            if round % 3 == 0 {
                know(&mut one, "a");
            }
            if round % 6 == 0 {
                one.is_stranger();
            }
            drop((one, two));
        }
        let inner = guests.inner.lock();
        assert!(inner.all == 0 && inner.by_address.is_empty() && inner.by_client.is_empty());
        assert!(inner.strangers.is_empty());
    }
}
