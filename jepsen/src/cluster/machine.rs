//! One machine that runs a node: its disk, its clock, and the process while there is one.
//!
//! The machine keeps its addresses; the node does not keep its number. A disk that was wiped makes another node of it,
//! since a number that is used twice would let an empty node vote as if it remembered.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use boomerang_task::locks::Mutex;
use boomerang_testkit::{Process, Signal, log_end};

use super::links::Host;

/// What clients and other nodes connect to.
#[derive(Debug, Clone)]
pub struct Addresses {
    pub tcp: String,
    pub http: String,
    pub peer: String,
}

/// How wrong a machine's clock is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Skew {
    /// The wall clock is ahead by this much.
    pub offset_us: i64,
    /// Both of its clocks run faster by this part.
    pub drift_ppm: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It was started, and has not said yet that it is ready.
    Starting,
    Up,
    Paused,
    /// Nobody has started it, or somebody has killed it.
    Down,
    /// It ended by itself.
    Ended,
}

/// A machine as it is at one moment.
#[derive(Debug, Clone)]
pub struct View {
    pub host: Host,
    pub node: u64,
    pub state: State,
    pub addresses: Addresses,
    pub pid: Option<u32>,
}

/// What a server says when it ends by an error that it has met and understood; a panic or a signal says something else.
const FAILED: i32 = 1;
/// A node that met a full disk may notice with a later write.
const LATE: Duration = Duration::from_secs(30);

/// Whether a node may end by a storage error.
#[derive(Debug, Clone, Copy)]
enum Room {
    There,
    /// A fault has filled the disk.
    Gone,
    /// The fault is over, and the same process may go on.
    BackSince(Instant),
}

impl Room {
    fn excuses(self, code: Option<i32>) -> bool {
        let lacked = match self {
            Room::There => false,
            Room::Gone => true,
            Room::BackSince(instant) => instant.elapsed() < LATE,
        };
        lacked && code == Some(FAILED)
    }
}

pub(super) struct Machine {
    pub host: Host,
    pub addresses: Addresses,
    /// Where its data and whatever else fills it is.
    pub disk: PathBuf,
    clock_file: PathBuf,
    pub log: PathBuf,
    occupant: Mutex<Occupant>,
    /// Held by whoever starts or ends the process, until that is done.
    pub busy: tokio::sync::Mutex<()>,
}

struct Occupant {
    node: u64,
    process: Option<Arc<Process>>,
    ready: bool,
    paused: bool,
    /// Its clock was wrong at some time since the process began.
    clock_touched: bool,
    /// That it ended by itself was noticed.
    end_noted: bool,
    room: Room,
    /// Ends by itself that were not told yet, and those that nothing excuses.
    untold: Vec<String>,
    own_ends: Vec<String>,
}

impl Machine {
    pub fn new(host: Host, addresses: Addresses, folder: &Path, disk: PathBuf, log: PathBuf) -> io::Result<Self> {
        let occupant = Occupant {
            node: u64::try_from(host).expect("a small number"),
            process: None,
            ready: false,
            paused: false,
            clock_touched: false,
            end_noted: false,
            room: Room::There,
            untold: Vec::new(),
            own_ends: Vec::new(),
        };
        let clock_file = folder.join("clock");
        let machine = Self {
            host,
            addresses,
            disk,
            clock_file,
            log,
            occupant: Mutex::new(occupant),
            busy: tokio::sync::Mutex::default(),
        };
        machine.set_clock(Skew::default())?;
        Ok(machine)
    }

    fn occupant(&self) -> MutexGuard<'_, Occupant> {
        self.occupant.lock()
    }

    pub fn node(&self) -> u64 {
        self.occupant().node
    }

    /// From now on another node runs here.
    pub fn renumber(&self, node: u64) {
        self.occupant().node = node;
    }

    pub fn data_dir(&self) -> PathBuf {
        self.disk.join(format!("node-{}", self.node()))
    }

    pub fn clock_file(&self) -> &Path {
        &self.clock_file
    }

    /// Written beside it and moved, so that the node never reads half of it.
    pub fn set_clock(&self, skew: Skew) -> io::Result<()> {
        let new = self.clock_file.with_extension("new");
        std::fs::write(&new, Self::skew_text(skew))?;
        std::fs::rename(new, &self.clock_file)?;
        let mut occupant = self.occupant();
        occupant.clock_touched |= skew != Skew::default();
        Ok(())
    }

    /// Whether the process may still think that it is another time than it is.
    pub fn clock_touched(&self) -> bool {
        self.occupant().clock_touched
    }

    pub fn process(&self) -> Option<Arc<Process>> {
        self.occupant().process.clone()
    }

    /// A process that began with the clock as `skewed` says.
    pub fn occupy(&self, process: Process, skewed: bool) -> Arc<Process> {
        let process = Arc::new(process);
        let mut occupant = self.occupant();
        self.notice_end(&mut occupant);
        if matches!(occupant.room, Room::BackSince(_)) {
            occupant.room = Room::There;
        }
        occupant.process = Some(process.clone());
        (occupant.ready, occupant.paused, occupant.clock_touched, occupant.end_noted) = (false, false, skewed, false);
        process
    }

    pub fn vacate(&self) -> Option<Arc<Process>> {
        let mut occupant = self.occupant();
        self.notice_end(&mut occupant);
        occupant.paused = false;
        occupant.process.take()
    }

    /// Unless another process has taken its place.
    pub fn now_ready_if(&self, process: &Arc<Process>) {
        let mut occupant = self.occupant();
        occupant.ready |= occupant.process.as_ref().is_some_and(|now| Arc::ptr_eq(now, process));
    }

    fn skew_text(skew: Skew) -> String {
        format!("{} {}\n", skew.offset_us, skew.drift_ppm)
    }

    /// Whether a process that starts now finds a wrong clock.
    pub fn skewed(&self) -> bool {
        std::fs::read_to_string(&self.clock_file).is_ok_and(|text| text != Self::skew_text(Skew::default()))
    }

    pub fn pause(&self, paused: bool) {
        let mut occupant = self.occupant();
        if let Some(process) = &occupant.process {
            process.signal(if paused { Signal::STOP } else { Signal::CONT });
            occupant.paused = paused;
        }
    }

    pub fn view(&self) -> View {
        let occupant = self.occupant();
        let state = match &occupant.process {
            None => State::Down,
            Some(process) if process.ended().is_some() => State::Ended,
            Some(_) if occupant.paused => State::Paused,
            Some(_) if occupant.ready => State::Up,
            Some(_) => State::Starting,
        };
        let pid = occupant.process.as_ref().filter(|process| process.ended().is_none()).map(|process| process.pid());
        View { host: self.host, node: occupant.node, state, addresses: self.addresses.clone(), pid }
    }

    /// A fault fills the disk, or has made room again.
    pub fn fill(&self, full: bool) {
        let mut occupant = self.occupant();
        occupant.room = match occupant.room {
            _ if full => Room::Gone,
            Room::Gone => Room::BackSince(Instant::now()),
            room => room,
        };
    }

    /// Whoever takes a process away calls this first: what ends after that does not end by itself.
    fn notice_end(&self, occupant: &mut Occupant) {
        let Some(status) = occupant.process.as_ref().and_then(|process| process.ended()) else { return };
        if std::mem::replace(&mut occupant.end_noted, true) {
            return;
        }
        let (node, host, last) = (occupant.node, self.host, log_end(&self.log, 1));
        let excused = occupant.room.excuses(status.code());
        let why = if excused { ", as it may on a full disk" } else { "" };
        let told = format!("node {node} (machine {host}) ended by itself{why}: {status}; its log ends with: {last}");
        occupant.untold.push(told.clone());
        if !excused {
            occupant.own_ends.push(told);
        }
    }

    /// How it ended by itself; each time is told once.
    pub fn ends_to_tell(&self) -> Vec<String> {
        let mut occupant = self.occupant();
        self.notice_end(&mut occupant);
        std::mem::take(&mut occupant.untold)
    }

    /// Every time that it ended by itself so far, and no fault excuses it.
    pub fn own_ends(&self) -> Vec<String> {
        let mut occupant = self.occupant();
        self.notice_end(&mut occupant);
        occupant.own_ends.clone()
    }

    /// Whatever panicked in its nodes so far.
    pub fn panics(&self) -> Vec<String> {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let panics = lines.windows(2).filter(|lines| lines[0].contains("panicked at"));
        let last = lines.last().filter(|line| line.contains("panicked at"));
        let found = panics.map(|lines| lines.join(" ")).chain(last.map(|line| (*line).to_owned()));
        let end = lines.last().copied().unwrap_or_default();
        let (host, node) = (self.host, self.node());
        found.map(|panic| format!("machine {host} (now node {node}): {panic}; its log ends with: {end}")).collect()
    }

    /// Asks the process to stop, and kills it when it takes longer; its exit code.
    pub async fn terminate(&self, within: Duration) -> Option<i32> {
        let process = self.vacate()?;
        process.stop(within).await?.code()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    async fn ended(script: &str, log: &Path) -> Process {
        let process = Process::start("a shell", Command::new("sh").args(["-c", script]), log).unwrap();
        process.wait(Duration::from_secs(10)).await.unwrap();
        process
    }

    #[tokio::test]
    async fn an_end_is_excused_by_a_full_disk_alone_and_only_when_it_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let addresses = Addresses { tcp: String::new(), http: String::new(), peer: String::new() };
        let machine = Machine::new(1, addresses, folder.path(), folder.path().to_owned(), log.clone()).unwrap();
        machine.fill(true);
        machine.occupy(ended("echo no room >&2; exit 1", &log).await, false);
        machine.fill(false);
        assert!(machine.own_ends().is_empty());
        assert!(machine.ends_to_tell()[0].ends_with("no room"));
        assert!(machine.ends_to_tell().is_empty(), "once");
        machine.occupy(ended("exit 1", &log).await, false);
        assert_eq!(machine.own_ends().len(), 1, "there was room when it began");
        machine.fill(true);
        machine.occupy(ended("exit 101", &log).await, false);
        machine.vacate();
        assert_eq!((machine.own_ends().len(), machine.ends_to_tell().len()), (2, 2));
        // What is taken away before it ends has not ended by itself.
        machine.occupy(Process::start("sleep", Command::new("sleep").arg("1000"), &log).unwrap(), false);
        machine.vacate().unwrap().kill().await;
        assert_eq!(machine.own_ends().len(), 2);
    }

    #[test]
    fn panics_are_found_with_what_they_say() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        std::fs::write(&log, "calm\nthread 'a' panicked at b.rs:1:2:\ntoo bad\nover\n").unwrap();
        let addresses = Addresses { tcp: String::new(), http: String::new(), peer: String::new() };
        let machine = Machine::new(1, addresses, folder.path(), folder.path().to_owned(), log).unwrap();
        let [panic] = machine.panics().try_into().unwrap();
        assert!(panic.contains("b.rs:1:2: too bad; its log ends with: over"), "{panic}");
    }
}
