//! What the tests with real processes share: a node, an etcd, a client that sends raw frames, a client and a receiver
//! of the original protocol, tables of messages and their answers, and a look at the HTTP listener.
//!
//! Every test starts its own node on free ports and in a folder of its own, so all of them run beside each other.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod cases;
pub mod cluster;
pub mod etcd;
pub mod legacy;
pub mod node;
pub mod raw;
pub mod receiver;
pub mod trio;

use std::fmt::Display;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Longer than anything takes that works, even on a machine with other work.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How late a callback may be on such a machine. Too early is a matter of nothing.
pub const LATENESS_MAX_MS: u64 = 2_000;

const POLL_EVERY: Duration = Duration::from_millis(10);

/// For what tells nobody when it happens: looks again and again until there is something, or it takes too long.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    eventually_within(PATIENCE, what, || look().ok_or("nothing"))
}

/// The same with a patience of its own, and with what was found instead.
pub fn eventually_within<T, W: Display>(within: Duration, what: &str, mut look: impl FnMut() -> Result<T, W>) -> T {
    let deadline = Instant::now() + within;
    loop {
        match look() {
            Ok(found) => return found,
            Err(instead) => assert!(Instant::now() < deadline, "not within {within:?}: {what}; at last: {instead}"),
        }
        std::thread::sleep(POLL_EVERY);
    }
}

/// For what is judged by how long it takes, where others may be at work: what is slow by itself is so each time, and what
/// was disturbed is not. `look` asserts what holds at any time; its error is what took too long.
pub fn one_of_three(mut look: impl FnMut() -> Result<(), String>) {
    let mut slow = Vec::new();
    while slow.len() < 3 {
        let Err(why) = look() else { return };
        eprintln!("slow: {why}");
        slow.push(why);
    }
    panic!("slow each time: {slow:?}");
}

/// The same as [`eventually`], for what is asked with `await`.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(POLL_EVERY).await;
    }
}

pub fn now_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// The status and the body of a page.
pub fn http_get(addr: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status line");
    (status, body.to_owned())
}
