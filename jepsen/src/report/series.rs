//! A history over time: what happened within each step. A step is a second, or as many as make the run fit into a picture.

use std::collections::BTreeMap;

use super::figures::Come;
use crate::check::percentile;
use crate::history::{Answer, End, History, Stage, What};

/// More steps than this cannot be told apart in a picture.
const STEPS_MAX: u64 = 600;
const SECOND_US: u64 = 1_000_000;

#[derive(Debug, PartialEq)]
pub struct Series {
    pub step_us: u64,
    pub end_us: u64,
    pub healed_us: Option<u64>,
    /// Per second, one for each step.
    pub registered: Vec<f64>,
    pub delivered: Vec<f64>,
    pub ok: Vec<f64>,
    pub fail: Vec<f64>,
    pub unknown: Vec<f64>,
    /// Of what was due within the step; `None` if nothing was.
    pub late_half_us: Vec<Option<u64>>,
    pub late_max_us: Vec<Option<u64>>,
    /// By kind, in the order in which they began.
    pub faults: BTreeMap<String, Vec<Span>>,
    /// By group, one after the other.
    pub leaders: BTreeMap<u16, Vec<Leader>>,
    /// Everybody who ever led.
    pub nodes: Vec<u64>,
}

/// Something that was broken for a while; if both ends are the same, at one instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub from_us: u64,
    pub to_us: u64,
    pub note: bool,
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader {
    pub from_us: u64,
    pub to_us: u64,
    pub node: u64,
    pub term: u64,
}

pub fn series(history: &History) -> Series {
    let end_us = history.events.last().map_or(0, |event| event.at_us).max(SECOND_US);
    let step_us = end_us.div_ceil(SECOND_US).div_ceil(STEPS_MAX).max(1) * SECOND_US;
    let steps = usize::try_from(end_us / step_us + 1).expect("there are few steps");
    let per_second = SECOND_US as f64 / step_us as f64;
    let mut series = Series {
        step_us,
        end_us,
        healed_us: history.healed_us(),
        registered: vec![0.0; steps],
        delivered: vec![0.0; steps],
        ok: vec![0.0; steps],
        fail: vec![0.0; steps],
        unknown: vec![0.0; steps],
        late_half_us: vec![None; steps],
        late_max_us: vec![None; steps],
        faults: faults(history, end_us),
        leaders: leaders(history, end_us),
        nodes: Vec::new(),
    };
    let step = |at_us: u64| usize::try_from(at_us.min(end_us) / step_us).expect("there are few steps");
    let mut late: Vec<Vec<u64>> = vec![Vec::new(); steps];
    let mut seen = Come::new();
    for event in &history.events {
        let at = step(event.at_us);
        match &event.what {
            What::End(_, end) => {
                let of_outcome = match end {
                    End::Ok(_) => &mut series.ok,
                    End::Fail(_) => &mut series.fail,
                    End::Unknown(_) => &mut series.unknown,
                };
                of_outcome[at] += per_second;
                if matches!(end, End::Ok(Answer::Registered { .. })) {
                    series.registered[at] += per_second;
                }
            }
            What::Delivered(delivery) if !delivery.dead_letter => {
                series.delivered[at] += per_second;
                if delivery.attempt == 1 && seen.is_new(delivery) {
                    let due_us = history.since_began_us(delivery.due_ms);
                    late[step(due_us)].push(event.at_us.saturating_sub(due_us));
                }
            }
            _ => {}
        }
    }
    for (at, late) in late.iter_mut().enumerate() {
        late.sort_unstable();
        series.late_max_us[at] = late.last().copied();
        series.late_half_us[at] = (!late.is_empty()).then(|| percentile(late, 50));
    }
    let mut nodes: Vec<u64> = series.leaders.values().flatten().map(|leader| leader.node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    series.nodes = nodes;
    series
}

/// An end belongs to what began last with the same words, or else to what of its kind has gone on longest. What never ended
/// ended with the healing, or with the run.
fn faults(history: &History, end_us: u64) -> BTreeMap<String, Vec<Span>> {
    let mut all: BTreeMap<String, Vec<Span>> = BTreeMap::new();
    let mut open: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let close_all = |all: &mut BTreeMap<_, Vec<Span>>, open: &mut BTreeMap<String, Vec<usize>>, at_us| {
        for (kind, open) in std::mem::take(open) {
            let spans = all.entry(kind).or_default();
            for at in open {
                spans[at].to_us = at_us;
            }
        }
    };
    for event in &history.events {
        let note = match &event.what {
            What::Fault(note) => note,
            What::Healed => {
                close_all(&mut all, &mut open, event.at_us);
                continue;
            }
            _ => continue,
        };
        let spans = all.entry(note.fault.clone()).or_default();
        let open = open.entry(note.fault.clone()).or_default();
        if note.stage == Stage::End && !open.is_empty() {
            let same = open.iter().rposition(|at| spans[*at].detail == note.detail).unwrap_or(0);
            spans[open.remove(same)].to_us = event.at_us;
            continue;
        }
        if note.stage == Stage::Begin {
            open.push(spans.len());
        }
        let at_us = event.at_us;
        spans.push(Span {
            from_us: at_us,
            to_us: at_us,
            note: note.stage != Stage::Begin,
            detail: note.detail.clone(),
        });
    }
    close_all(&mut all, &mut open, end_us);
    all
}

fn leaders(history: &History, end_us: u64) -> BTreeMap<u16, Vec<Leader>> {
    let mut all: BTreeMap<u16, Vec<Leader>> = BTreeMap::new();
    for event in &history.events {
        let What::Leads { group, node, term } = event.what else { continue };
        let leaders = all.entry(group).or_default();
        if let Some(before) = leaders.last_mut() {
            before.to_us = event.at_us;
        }
        leaders.push(Leader { from_us: event.at_us, to_us: end_us, node, term });
    }
    all
}
