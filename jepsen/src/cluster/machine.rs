//! One machine that runs a node: its disk, its clock, and the process while there is one.
//!
//! The machine keeps its addresses; the node does not keep its number. A disk that was wiped makes another node of it,
//! since a number that is used twice would let an empty node vote as if it remembered.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::process::Signal;

use super::links::Host;
use super::process::Process;

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

pub(super) struct Machine {
    pub host: Host,
    pub addresses: Addresses,
    /// Where its data and whatever else fills it is.
    pub disk: PathBuf,
    clock_file: PathBuf,
    pub log: PathBuf,
    seat: Mutex<Seat>,
    /// Held by whoever starts or ends the process, until that is done.
    pub busy: tokio::sync::Mutex<()>,
}

struct Seat {
    node: u64,
    process: Option<Arc<Process>>,
    ready: bool,
    paused: bool,
    /// Its clock was wrong at some time since the process began.
    clock_touched: bool,
    /// That it ended by itself was said.
    end_noted: bool,
}

impl Machine {
    pub fn new(host: Host, addresses: Addresses, folder: &Path, disk: PathBuf, log: PathBuf) -> io::Result<Self> {
        let seat = Seat {
            node: u64::try_from(host).expect("a small number"),
            process: None,
            ready: false,
            paused: false,
            clock_touched: false,
            end_noted: false,
        };
        let clock_file = folder.join("clock");
        let machine = Self {
            host,
            addresses,
            disk,
            clock_file,
            log,
            seat: Mutex::new(seat),
            busy: tokio::sync::Mutex::default(),
        };
        machine.set_clock(Skew::default())?;
        Ok(machine)
    }

    fn seat(&self) -> MutexGuard<'_, Seat> {
        self.seat.lock().expect("no panic under this lock")
    }

    pub fn node(&self) -> u64 {
        self.seat().node
    }

    /// From now on another node runs here.
    pub fn renumber(&self, node: u64) {
        self.seat().node = node;
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
        let mut seat = self.seat();
        seat.clock_touched |= skew != Skew::default();
        Ok(())
    }

    /// Whether the process may still think that it is another time than it is.
    pub fn clock_touched(&self) -> bool {
        self.seat().clock_touched
    }

    pub fn process(&self) -> Option<Arc<Process>> {
        self.seat().process.clone()
    }

    /// A process that began with the clock as `skewed` says.
    pub fn occupy(&self, process: Process, skewed: bool) -> Arc<Process> {
        let process = Arc::new(process);
        let mut seat = self.seat();
        seat.process = Some(process.clone());
        (seat.ready, seat.paused, seat.clock_touched, seat.end_noted) = (false, false, skewed, false);
        process
    }

    pub fn vacate(&self) -> Option<Arc<Process>> {
        let mut seat = self.seat();
        seat.paused = false;
        seat.process.take()
    }

    /// Unless another process has taken its place.
    pub fn now_ready_if(&self, process: &Arc<Process>) {
        let mut seat = self.seat();
        seat.ready |= seat.process.as_ref().is_some_and(|now| Arc::ptr_eq(now, process));
    }

    fn skew_text(skew: Skew) -> String {
        format!("{} {}\n", skew.offset_us, skew.drift_ppm)
    }

    /// Whether a process that starts now finds a wrong clock.
    pub fn skewed(&self) -> bool {
        std::fs::read_to_string(&self.clock_file).is_ok_and(|text| text != Self::skew_text(Skew::default()))
    }

    pub fn pause(&self, paused: bool) {
        let mut seat = self.seat();
        if let Some(process) = &seat.process {
            process.signal(if paused { Signal::STOP } else { Signal::CONT });
            seat.paused = paused;
        }
    }

    pub fn view(&self) -> View {
        let seat = self.seat();
        let state = match &seat.process {
            None => State::Down,
            Some(process) if process.ended().is_some() => State::Ended,
            Some(_) if seat.paused => State::Paused,
            Some(_) if seat.ready => State::Up,
            Some(_) => State::Starting,
        };
        let pid = seat.process.as_ref().filter(|process| process.ended().is_none()).map(|process| process.pid());
        View { host: self.host, node: seat.node, state, addresses: self.addresses.clone(), pid }
    }

    /// How it ended by itself; said once.
    pub fn end_to_note(&self) -> Option<String> {
        let mut seat = self.seat();
        let status = seat.process.as_ref()?.ended()?;
        (!std::mem::replace(&mut seat.end_noted, true)).then(|| format!("node {} ended by itself: {status}", seat.node))
    }

    /// Asks the process to stop, and kills it when it takes longer; its exit code.
    pub async fn terminate(&self, within: Duration) -> Option<i32> {
        let process = self.vacate()?;
        process.signal(Signal::TERM);
        match process.wait(within).await {
            Some(status) => status.code(),
            None => {
                process.kill().await;
                None
            }
        }
    }
}
