//! How often somebody may be wrong: a guess costs a node some 20 ms of a core, and tells whoever guesses something.
//!
//! Each address, and each client that is named, has a measure that a try fills, unless it turns out to be right, and that
//! time empties. An address that is full is refused: one of IPv6 with its whole network. A client that is full is refused to those addresses only that have failed before: whoever guesses at
//! its password does not keep it out, unless from its own address.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::time::Duration;

use crate::task::{ClientId, InstantMs};

/// How many failures fit, and how long it takes for one of them to be forgotten.
#[derive(Debug, Clone, Copy)]
struct Measure {
    most: u64,
    each_ms: u64,
}

/// People who type, and programs with an old password that try again after a pause.
const OF_AN_ADDRESS: Measure = Measure { most: 20, each_ms: 1_000 };
const OF_A_CLIENT: Measure = Measure { most: 100, each_ms: 1_000 };
/// Addresses and clients that are remembered. When there are more, those go that have failed least.
const REMEMBERED_MAX: usize = 16 * 1024;

/// Failures of late.
#[derive(Default)]
pub struct Failures {
    addresses: Measured<IpAddr>,
    clients: Measured<ClientId>,
}

impl Failures {
    /// How long to wait before the next try is worth its costs; `None`: not at all.
    pub fn wait(&self, from: IpAddr, client: Option<&ClientId>, now_ms: InstantMs) -> Option<Duration> {
        let address = self.addresses.wait(&from, OF_AN_ADDRESS, now_ms);
        let is_new = self.addresses.level_ms(&from, now_ms) == 0;
        let client = client.filter(|_| !is_new).and_then(|client| self.clients.wait(client, OF_A_CLIENT, now_ms));
        address.max(client)
    }

    /// A try, as if it were wrong: many that come at a time are none that nobody has counted.
    pub fn note(&mut self, from: IpAddr, client: Option<&ClientId>, now_ms: InstantMs) {
        self.addresses.note(&from, OF_AN_ADDRESS, now_ms);
        if let Some(client) = client {
            self.clients.note(client, OF_A_CLIENT, now_ms);
        }
    }

    /// It was right.
    pub fn take_back(&mut self, from: IpAddr, client: Option<&ClientId>) {
        self.addresses.take_back(&from, OF_AN_ADDRESS);
        if let Some(client) = client {
            self.clients.take_back(client, OF_A_CLIENT);
        }
    }
}

/// When each will be empty.
struct Measured<K>(HashMap<K, InstantMs>);

impl<K> Default for Measured<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq + Clone> Measured<K> {
    /// How full it is, as the time it takes to be empty.
    fn level_ms(&self, key: &K, now_ms: InstantMs) -> u64 {
        self.0.get(key).map_or(0, |empty_at| empty_at.saturating_sub(now_ms))
    }

    fn wait(&self, key: &K, measure: Measure, now_ms: InstantMs) -> Option<Duration> {
        let too_much = (self.level_ms(key, now_ms) + measure.each_ms).checked_sub(measure.most * measure.each_ms)?;
        (too_much > 0).then(|| Duration::from_millis(too_much))
    }

    fn note(&mut self, key: &K, measure: Measure, now_ms: InstantMs) {
        if self.0.len() >= REMEMBERED_MAX && !self.0.contains_key(key) {
            self.forget(now_ms);
        }
        let level_ms = self.level_ms(key, now_ms) + measure.each_ms;
        self.0.insert(key.clone(), now_ms + level_ms.min(measure.most * measure.each_ms));
    }

    fn take_back(&mut self, key: &K, measure: Measure) {
        if let Some(empty_at) = self.0.get_mut(key) {
            *empty_at = empty_at.saturating_sub(measure.each_ms);
        }
    }

    /// Half of them: this looks at all.
    fn forget(&mut self, now_ms: InstantMs) {
        let mut levels: Vec<InstantMs> = self.0.values().copied().collect();
        let (_, middle, _) = levels.select_nth_unstable(REMEMBERED_MAX / 2);
        let middle = (*middle).max(now_ms);
        self.0.retain(|_, empty_at| *empty_at > middle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: InstantMs = 1_000_000;

    fn address(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    fn client(name: &str) -> ClientId {
        name.parse().unwrap()
    }

    #[test]
    fn an_address_waits_when_it_has_failed_too_often_and_no_other_does() {
        let mut failures = Failures::default();
        for _ in 0..OF_AN_ADDRESS.most {
            assert_eq!(failures.wait(address(1), None, NOW), None);
            failures.note(address(1), None, NOW);
        }
        assert_eq!(failures.wait(address(1), None, NOW), Some(Duration::from_secs(1)));
        assert_eq!(failures.wait(address(2), None, NOW), None);
        assert_eq!(failures.wait(address(1), None, NOW + 1_000), None, "one is forgotten");
        failures.note(address(1), None, NOW + 1_000);
        assert_eq!(failures.wait(address(1), None, NOW + 1_000), Some(Duration::from_secs(1)));
        // However often it tries in vain, it is not made to wait for longer.
        (0..1_000).for_each(|_| failures.note(address(1), None, NOW + 1_000));
        assert_eq!(failures.wait(address(1), None, NOW + 1_000), Some(Duration::from_secs(1)));
        assert_eq!(failures.wait(address(1), None, NOW + 1_000_000), None);
    }

    #[test]
    fn who_is_right_is_not_counted() {
        let mut failures = Failures::default();
        for _ in 0..1_000 {
            assert_eq!(failures.wait(address(1), Some(&client("orders")), NOW), None);
            failures.note(address(1), Some(&client("orders")), NOW);
            failures.take_back(address(1), Some(&client("orders")));
        }
        assert_eq!(failures.addresses.level_ms(&address(1), NOW), 0);
    }

    #[test]
    fn who_guesses_at_a_client_does_not_keep_it_out() {
        let mut failures = Failures::default();
        let orders = client("orders");
        for guess in 0..OF_A_CLIENT.most {
            let from = address(u8::try_from(guess % 50).unwrap());
            failures.note(from, Some(&orders), NOW);
        }
        assert!(failures.wait(address(1), Some(&orders), NOW).is_some(), "it has failed before");
        assert_eq!(failures.wait(address(1), Some(&client("others")), NOW), None);
        assert_eq!(failures.wait(address(200), Some(&orders), NOW), None, "it has not");
    }

    #[test]
    fn those_who_have_failed_least_are_forgotten_first() {
        let mut failures = Failures::default();
        let often = client("often");
        (0..50).for_each(|_| failures.note(address(1), Some(&often), NOW));
        for n in 0..3 * REMEMBERED_MAX {
            failures.note(address(1), Some(&client(&format!("client-{n}"))), NOW);
        }
        assert!(failures.clients.0.len() <= REMEMBERED_MAX);
        assert_eq!(failures.clients.level_ms(&often, NOW), 50_000);
    }
}
