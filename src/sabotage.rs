//! Broken on purpose, so that those who look for faults can be seen to find them.
//!
//! `jepsen/` proves nothing unless it fails when something is wrong. Each [`Fault`] takes away one thing that a promise
//! rests on, at the very place in the code that keeps it; `jepsen/tests` runs each and expects the checker that is
//! named here to object.
//!
//! Only builds with assertions can be broken: in a release build [`Fault::is_on`] is `false` at compile time. In a process
//! faults are named by `BOOMERANG_SABOTAGE`, separated by commas, and said in the log; a simulation gives them to its own
//! thread.

use std::cell::Cell;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// The variable that names what is broken in this process.
pub const VARIABLE: &str = "BOOMERANG_SABOTAGE";

/// One thing that is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The log is said to be on disk when it is not: acknowledged tasks are lost with the power (`lost`).
    SkipFsync,
    /// A cancel never takes an earlier leader's dispatches into account (`answers`).
    IgnoreWatermark,
    /// A leader believes in itself without hearing from the others (`fences`, `reads`).
    SkipLease,
    /// `last applied` is stored apart from the rows it speaks of: entries are applied twice (`digests`).
    AppliedApart,
    /// Timers are due before their time (`early`).
    FireEarly,
    /// Deduplication keys are not looked up (`unique`).
    ForgetDedup,
    /// A new leader begins with what is due from now on (`occurrences`, `lost`).
    ForgetOverdue,
    /// Replicas apply the same entries differently (`digests`).
    ApplyDiffers,
    /// A new leader takes its time before it fires (`lateness`).
    BeginLate,
    /// Reads ask nobody else whether this node still leads, and need not be what was acknowledged (`reads`).
    StaleReads,
    /// A replica that the placement does not name goes without asking whether its group still counts on it (`lost`).
    LetGoUnasked,
    /// What a replica has stored stays where it was released (`places`).
    LeaveBehind,
    /// What leading hangs on runs among the work, proves nothing by itself, and no work is refused because of it
    /// (`boomtool bench overload`).
    BeatsBehindWork,
    /// A lease that is lost and won back within a term forgets what is out (`duplicates`).
    ForgetOut,
    /// Whoever reaches the port for nodes is taken for one (`tests/strangers.rs`).
    TrustStrangers,
    /// Callbacks go wherever a client says (`tests/forbidden.rs`).
    CallAnybody,
}

impl Fault {
    pub const ALL: [Fault; 16] = [
        Fault::SkipFsync,
        Fault::IgnoreWatermark,
        Fault::SkipLease,
        Fault::AppliedApart,
        Fault::FireEarly,
        Fault::ForgetDedup,
        Fault::ForgetOverdue,
        Fault::ApplyDiffers,
        Fault::BeginLate,
        Fault::StaleReads,
        Fault::LetGoUnasked,
        Fault::LeaveBehind,
        Fault::BeatsBehindWork,
        Fault::ForgetOut,
        Fault::TrustStrangers,
        Fault::CallAnybody,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Fault::SkipFsync => "skip-fsync",
            Fault::IgnoreWatermark => "ignore-watermark",
            Fault::SkipLease => "skip-lease",
            Fault::AppliedApart => "applied-apart",
            Fault::FireEarly => "fire-early",
            Fault::ForgetDedup => "forget-dedup",
            Fault::ForgetOverdue => "forget-overdue",
            Fault::ApplyDiffers => "apply-differs",
            Fault::BeginLate => "begin-late",
            Fault::StaleReads => "stale-reads",
            Fault::LetGoUnasked => "let-go-unasked",
            Fault::LeaveBehind => "leave-behind",
            Fault::BeatsBehindWork => "beats-behind-work",
            Fault::ForgetOut => "forget-out",
            Fault::TrustStrangers => "trust-strangers",
            Fault::CallAnybody => "call-anybody",
        }
    }

    /// Whether it is broken here and now.
    #[inline]
    pub fn is_on(self) -> bool {
        cfg!(debug_assertions) && (HERE.get() | process()) & self.bit() != 0
    }

    fn bit(self) -> u32 {
        1 << self as u32
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Fault::ALL.map(Fault::name).join(", ");
        Fault::ALL
            .into_iter()
            .find(|fault| fault.name() == text)
            .ok_or_else(|| format!("nothing is called '{text}'; there are {}", names()))
    }
}

thread_local! {
    static HERE: Cell<u32> = const { Cell::new(0) };
}

/// Breaks `faults`, and nothing else, for everything that runs on this thread.
pub fn on_this_thread(faults: &[Fault]) {
    HERE.set(bits(faults));
}

fn bits(faults: &[Fault]) -> u32 {
    faults.iter().fold(0, |bits, fault| bits | fault.bit())
}

/// What the environment asks for. Read once.
fn process() -> u32 {
    static FAULTS: OnceLock<u32> = OnceLock::new();
    *FAULTS.get_or_init(|| {
        let Ok(text) = std::env::var(VARIABLE) else { return 0 };
        let faults: Vec<Fault> = text
            .split(',')
            .filter(|name| !name.is_empty())
            .map(|name| name.parse().unwrap_or_else(|why| panic!("{VARIABLE}: {why}")))
            .collect();
        for fault in &faults {
            tracing::error!(%fault, "broken on purpose: this node is for tests only");
        }
        bits(&faults)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_broken_by_itself_and_mended_again() {
        on_this_thread(&[Fault::SkipLease, Fault::StaleReads]);
        let broken: Vec<Fault> = Fault::ALL.into_iter().filter(|fault| fault.is_on()).collect();
        assert_eq!(broken, [Fault::SkipLease, Fault::StaleReads]);
        std::thread::spawn(|| assert!(!Fault::SkipLease.is_on())).join().unwrap();
        on_this_thread(&[]);
        assert!(!Fault::SkipLease.is_on());
    }

    #[test]
    fn names_are_read_back() {
        for fault in Fault::ALL {
            assert_eq!(fault.name().parse(), Ok(fault));
        }
        assert!("skip-everything".parse::<Fault>().unwrap_err().contains("skip-fsync"));
    }
}
