//! The network between the machines: a switch in user space.
//!
//! ```text
//!   node's namespace          this process            node's namespace
//!   tcp -- TUN device ---->  read, look at the  ----> TUN device -- tcp
//!                            link, write or hold
//! ```
//!
//! Every machine has one TUN device; what its kernel sends comes to this thread, and goes on to the device that has the
//! destination's address, as the [`Link`](super::links::Link) between both says. This takes the place of `tc netem` and packet filters: it
//! needs no module of the kernel but TUN, it cuts one direction and not the other, it draws from a seed, and its devices
//! vanish with the process that holds them, however it ends. Packets are large ([`MTU`]), so that one thread is enough: what is
//! neither cut nor late costs one read and one write.
//!
//! It looks at nothing of a packet but the two addresses.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{self, PipeReader, PipeWriter};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use boomerang_task::locks::Mutex;
use rand::{SeedableRng, rngs::StdRng};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tappers::Tun;

use super::links::{Fate, Host, Layer, LayerId, Links};

/// Bytes of a packet at most. Larger than on any wire, since each packet costs the harness the same.
pub const MTU: usize = 16_000;
/// Packets that are held back take no more memory than this; the rest is lost, as in any switch.
const HELD_BYTES_MAX: usize = 64 * 1024 * 1024;
/// So many packets of one machine before the others have their turn.
const TURN: usize = 64;
/// The switch goes before the nodes, which would otherwise starve it on a machine with few processors.
const PRIORITY: i32 = -15;

/// A switch; ends with this value.
pub struct Wire {
    links: Arc<Mutex<Links>>,
    /// Closed, it ends the thread.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

/// One machine's end of the network.
pub struct Plug {
    pub host: Host,
    pub address: Ipv4Addr,
    pub tun: Tun,
}

impl Wire {
    /// Connects these machines. All addresses differ in their last byte.
    pub fn connect(mut plugs: Vec<Plug>, links: Links, seed: u64) -> io::Result<Self> {
        let links = Arc::new(Mutex::new(links));
        for plug in &mut plugs {
            plug.tun.set_nonblocking(true)?;
        }
        let (stopped, stop) = io::pipe()?;
        let mut switch = Switch::new(plugs, links.clone(), seed);
        let thread = std::thread::Builder::new().name("wire".into()).spawn(move || {
            // On Linux this is the thread's own; without the right to it we are slower, and that is all.
            let _ = rustix::process::nice(PRIORITY);
            if let Err(error) = switch.run(&stopped) {
                tracing::error!(%error, "the network between the machines cannot be read any more");
            }
        })?;
        Ok(Self { links, stop: Some(stop), thread: Some(thread) })
    }

    pub fn lay(&self, layer: Layer) -> LayerId {
        self.links.lock().lay(layer)
    }

    pub fn lift(&self, id: LayerId) {
        self.links.lock().lift(id);
    }

    pub fn lift_all(&self) {
        self.links.lock().lift_all();
    }

    pub fn etcd(&self) -> Host {
        self.links.lock().etcd()
    }

    /// This process.
    pub fn clients(&self) -> Host {
        self.links.lock().clients()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Switch {
    ports: Vec<Plug>,
    /// By the last byte of an address.
    by_address: [Option<usize>; 256],
    links: Arc<Mutex<Links>>,
    began: Instant,
    rng: StdRng,
    /// When the last packet of a pair arrives, by [`Links::place`].
    last_us: Vec<u64>,
    held: Held,
    /// Ports whose device is gone, with its namespace; they are always ready, for nothing.
    gone: Vec<bool>,
}

#[derive(Default)]
struct Held {
    packets: BinaryHeap<Reverse<Late>>,
    bytes: usize,
    count: u64,
}

/// A packet that is held back: in order of the instant, and then of coming.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Late {
    at_us: u64,
    count: u64,
    to: usize,
    packet: Box<[u8]>,
}

impl Switch {
    fn new(ports: Vec<Plug>, links: Arc<Mutex<Links>>, seed: u64) -> Self {
        let mut by_address = [None; 256];
        for (place, port) in ports.iter().enumerate() {
            by_address[usize::from(port.address.octets()[3])] = Some(place);
        }
        let last_us = vec![0; links.lock().pairs()];
        let (began, rng) = (Instant::now(), StdRng::seed_from_u64(seed));
        let gone = vec![false; ports.len()];
        Self { ports, by_address, links, began, rng, last_us, held: Held::default(), gone }
    }

    /// Until the other end of `stopped` is closed.
    fn run(&mut self, stopped: &PipeReader) -> io::Result<()> {
        let mut packet = vec![0; MTU + 1];
        loop {
            let next_us = self.release();
            let ready = self.wait(stopped, next_us)?;
            let Some(ready) = ready else { return Ok(()) };
            for port in ready {
                self.read(port, &mut packet);
            }
        }
    }

    /// The ports that have something to read; none when the time has come to release something; `None` when it is over.
    fn wait(&self, stopped: &PipeReader, next_us: Option<u64>) -> io::Result<Option<Vec<usize>>> {
        let there: Vec<usize> = (0..self.ports.len()).filter(|port| !self.gone[*port]).collect();
        let source = |port: &usize| PollFd::new(&self.ports[*port].tun, PollFlags::IN);
        let mut sources: Vec<PollFd<'_>> = there.iter().map(source).collect();
        sources.push(PollFd::new(stopped, PollFlags::IN));
        let timeout = next_us.map(|next_us| {
            let left_us = i64::try_from(next_us.saturating_sub(self.now_us())).unwrap_or(i64::MAX);
            Timespec { tv_sec: left_us / 1_000_000, tv_nsec: left_us % 1_000_000 * 1_000 }
        });
        match poll(&mut sources, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |source: &PollFd<'_>| !source.revents().is_empty();
        if sources.last().is_some_and(ready) {
            return Ok(None);
        }
        Ok(Some(there.into_iter().zip(&sources).filter(|(_, source)| ready(source)).map(|(port, _)| port).collect()))
    }

    /// What one machine sends.
    fn read(&mut self, port: usize, packet: &mut [u8]) {
        for _ in 0..TURN {
            match self.ports[port].tun.recv(packet) {
                Ok(length) => self.forward(port, &packet[..length]),
                Err(error) => {
                    // Otherwise there is nothing more for now.
                    self.gone[port] = error.kind() != io::ErrorKind::WouldBlock;
                    return;
                }
            }
        }
    }

    fn forward(&mut self, from: usize, packet: &[u8]) {
        let Plug { host, address, .. } = self.ports[from];
        let to = destination(packet, address).and_then(|address| self.by_address[usize::from(address.octets()[3])]);
        let Some(to) = to.filter(|to| *to != from) else { return };
        let now_us = self.now_us();
        let fate = self.fate(host, self.ports[to].host, now_us);
        for at_us in [fate.first, fate.second].into_iter().flatten() {
            if at_us <= now_us { self.write(to, packet) } else { self.hold(at_us, to, packet) }
        }
    }

    fn fate(&mut self, from: Host, to: Host, now_us: u64) -> Fate {
        let links = self.links.lock();
        let (link, place) = (links.between(from, to), links.place(from, to));
        drop(links);
        link.fate(now_us, &mut self.last_us[place], &mut self.rng)
    }

    fn write(&self, to: usize, packet: &[u8]) {
        // A machine that takes no packet has lost it, like anywhere.
        let _ = self.ports[to].tun.send(packet);
    }

    fn hold(&mut self, at_us: u64, to: usize, packet: &[u8]) {
        if self.held.bytes + packet.len() > HELD_BYTES_MAX {
            return;
        }
        self.held.count += 1;
        self.held.bytes += packet.len();
        let late = Late { at_us, count: self.held.count, to, packet: packet.into() };
        self.held.packets.push(Reverse(late));
    }

    /// Whatever was held back and whose instant has come. Returns when the next one's comes.
    fn release(&mut self) -> Option<u64> {
        loop {
            let at_us = self.held.packets.peek()?.0.at_us;
            if at_us > self.now_us() {
                return Some(at_us);
            }
            let Reverse(Late { to, packet, .. }) = self.held.packets.pop()?;
            self.held.bytes -= packet.len();
            self.write(to, &packet);
        }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// Where an IPv4 packet goes, if it stays in the network of its sender.
fn destination(packet: &[u8], sender: Ipv4Addr) -> Option<Ipv4Addr> {
    let [first, ..] = packet else { return None };
    if first >> 4 != 4 {
        return None;
    }
    let address: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    (address[..3] == sender.octets()[..3]).then(|| Ipv4Addr::from(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packets_to_the_same_network_are_forwarded() {
        let sender = Ipv4Addr::new(10, 77, 3, 1);
        let mut packet = [0; 20];
        packet[0] = 0x45;
        packet[16..20].copy_from_slice(&[10, 77, 3, 9]);
        assert_eq!(destination(&packet, sender), Some(Ipv4Addr::new(10, 77, 3, 9)));
        packet[18] = 4;
        assert_eq!(destination(&packet, sender), None);
        packet[0] = 0x60;
        assert_eq!(destination(&packet, sender), None);
        assert_eq!(destination(&[], sender), None);
        assert_eq!(destination(&[0x45, 0, 0], sender), None);
    }
}
