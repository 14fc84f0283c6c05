//! Replicas of a group that have applied the same entry have the same state.
//!
//! A replica that was away when it was asked has no digest. So every group that is known must have been compared at
//! least once, by two replicas at the same entry.

use std::collections::{BTreeMap, BTreeSet};

use super::{Findings, Limits, Verdict};
use crate::history::{History, What};

/// What a replica said: which one, its digest, the event.
type Reported<'h> = (u64, &'h str, u64);

pub(super) fn check(history: &History, _: &Limits) -> Verdict {
    let mut findings = Findings::new("digests", "Replicas of a group are equal at the same entry");
    let mut said: BTreeMap<(u16, u64), Vec<Reported<'_>>> = BTreeMap::new();
    let mut groups: BTreeMap<u16, u64> = BTreeMap::new();
    let mut digests = 0;
    for (index, event) in (0..).zip(&history.events) {
        match &event.what {
            What::Digest { group, replica, index: entry, digest, .. } => {
                digests += 1;
                groups.entry(*group).or_insert(index);
                said.entry((*group, *entry)).or_default().push((*replica, digest, index));
            }
            What::Leads { group, .. } => _ = groups.entry(*group).or_insert(index),
            _ => {}
        }
    }
    let mut compared: BTreeSet<u16> = BTreeSet::new();
    let mut comparisons = 0;
    for ((group, entry), replicas) in &said {
        let (first, digest, event) = replicas[0];
        if replicas.iter().any(|(replica, ..)| *replica != first) {
            comparisons += 1;
            compared.insert(*group);
        }
        if let Some((other, differs, at)) = replicas.iter().find(|(_, other, _)| *other != digest) {
            let what =
                format!("group {group}, entry {entry}: replica {first} is {digest}, replica {other} is {differs}");
            findings.add([event, *at], what);
        }
    }
    // A run that never asks says so with a count of nothing.
    for (group, event) in groups.iter().filter(|(group, _)| digests > 0 && !compared.contains(group)) {
        findings.add([*event], format!("group {group}: no two of its replicas were ever compared"));
    }
    findings.verdict(vec![
        ("digests", digests),
        ("groups", groups.len() as u64),
        ("groups_compared", compared.len() as u64),
        ("comparisons", comparisons),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::hand_made::HandMade;

    fn says(group: u16, replica: u64, index: u64, digest: &str) -> What {
        What::Digest { group, replica, node: replica, index, digest: digest.to_owned() }
    }

    fn leads(group: u16) -> What {
        What::Leads { group, node: 1, term: 1 }
    }

    fn equal() -> HandMade {
        HandMade::new().event(0, leads(1)).event(1, says(1, 1, 7, "aa")).event(1, says(1, 2, 7, "aa"))
    }

    #[test]
    fn equal_replicas_are_equal() {
        let verdict = equal().event(2, says(1, 3, 7, "aa")).event(3, says(1, 3, 8, "bb")).passes(check);
        assert!(verdict.counts.contains(&("groups_compared", 1)), "{:?}", verdict.counts);
    }

    #[test]
    fn a_difference_is_found() {
        equal().event(2, says(1, 3, 7, "ab")).fails(check, "replica 1 is aa, replica 3 is ab");
    }

    #[test]
    fn a_replica_that_differs_from_itself_is_found() {
        equal().event(2, says(1, 2, 7, "ab")).fails(check, "replica 2 is ab");
    }

    #[test]
    fn other_entries_are_not_compared() {
        equal().event(2, says(1, 3, 8, "ab")).passes(check);
    }

    #[test]
    fn a_group_that_was_not_compared_is_found() {
        equal().event(2, leads(2)).fails(check, "group 2: no two");
        equal().event(2, says(2, 1, 5, "aa")).event(3, says(2, 2, 6, "aa")).fails(check, "group 2: no two");
    }

    #[test]
    fn a_run_that_never_asks_counts_nothing() {
        let verdict = HandMade::new().event(0, leads(1)).passes(check);
        assert!(verdict.counts.contains(&("digests", 0)));
    }
}
