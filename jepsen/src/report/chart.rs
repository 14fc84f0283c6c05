//! Pictures as SVG, one below the other on one time axis. Colours are variables of the page, so that they follow light and dark.
//!
//! ```text
//!            |  faults      ####    ##
//!            |  leaders  ====--------===
//!   labels   |  curves, with their own axis at the left
//!            '----------------------------- time
//! ```

use std::fmt::Write as _;

use super::page::escaped;
use super::series::{Series, Span};

/// Of the drawing, in its own units; the page scales it.
const WIDTH: f64 = 1_080.0;
const LEFT: f64 = 130.0;
const RIGHT: f64 = 20.0;
const LANE: f64 = 17.0;
const LEADER_LANE: f64 = 11.0;
const PANEL: f64 = 130.0;
/// A title above each picture, with the legend.
const TITLE: f64 = 34.0;
const GAP: f64 = 14.0;
/// Colours there are for nodes; after that they begin again.
pub const NODE_COLOURS: u64 = 10;
/// More lanes of groups than this make no picture.
const GROUPS_MAX: usize = 64;
/// A letter is about so wide.
const LETTER: f64 = 5.6;
/// The lowest decade of the picture of lateness.
const LATE_FROM_US: f64 = 100.0;

pub fn charts(series: &Series) -> String {
    let mut drawing = Drawing { series, body: String::new(), y: 0.0 };
    drawing.faults();
    drawing.leaders();
    drawing.curves(
        "Throughput",
        "per second",
        &[("registered", "c-registered", &series.registered), ("delivered", "c-delivered", &series.delivered)],
    );
    drawing.lateness();
    drawing.outcomes();
    drawing.finish()
}

struct Drawing<'s> {
    series: &'s Series,
    body: String,
    /// How far down it has come.
    y: f64,
}

/// Rounds for the file: a tenth of a unit is less than anybody sees.
fn short(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

/// Text needs so much room.
fn fits(text: &str, width: f64) -> bool {
    text.chars().count() as f64 * LETTER + 6.0 <= width
}

/// A number with one digit that counts, and no less.
fn nice(value: f64) -> f64 {
    let power = 10f64.powf(value.max(1.0).log10().floor());
    let steps = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0];
    steps.into_iter().map(|step| step * power).find(|nice| *nice >= value).unwrap_or(10.0 * power)
}

/// Minutes and seconds, or hours and minutes and seconds.
pub fn clock(at_us: u64) -> String {
    let seconds = at_us / 1_000_000;
    match seconds / 3_600 {
        0 => format!("{}:{:02}", seconds / 60, seconds % 60),
        hours => format!("{hours}:{:02}:{:02}", seconds / 60 % 60, seconds % 60),
    }
}

/// With a unit that makes it short.
pub fn span(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..10_000 => format!("{:.1} ms", us as f64 / 1e3),
        10_000..1_000_000 => format!("{} ms", us / 1_000),
        1_000_000..10_000_000 => format!("{:.1} s", us as f64 / 1e6),
        _ => format!("{} s", us / 1_000_000),
    }
}

impl Drawing<'_> {
    fn put(&mut self, text: std::fmt::Arguments<'_>) {
        self.body.write_fmt(text).expect("a string takes what it is given");
        self.body.push('\n');
    }

    fn x(&self, at_us: u64) -> f64 {
        let part = at_us.min(self.series.end_us) as f64 / self.series.end_us as f64;
        LEFT + part * (WIDTH - LEFT - RIGHT)
    }

    /// The middle of a step.
    fn x_of_step(&self, step: usize) -> f64 {
        self.x(step as u64 * self.series.step_us + self.series.step_us / 2)
    }

    /// The name of a picture, and what its colours mean.
    fn title(&mut self, title: &str, legend: &[(String, String)]) {
        self.y += TITLE;
        let base = short(self.y - 10.0);
        self.put(format_args!(r#"<text class="title" x="{LEFT}" y="{base}">{}</text>"#, escaped(title)));
        let mut x = LEFT + title.chars().count() as f64 * 7.6 + 24.0;
        for (name, class) in legend {
            let (at, top, text) = (short(x), short(self.y - 19.0), short(x + 15.0));
            self.put(format_args!(r#"<rect class="{class}" x="{at}" y="{top}" width="10" height="10" rx="2"/>"#));
            self.put(format_args!(r#"<text class="small" x="{text}" y="{base}">{}</text>"#, escaped(name)));
            x += 15.0 + name.chars().count() as f64 * LETTER + 18.0;
        }
    }

    /// The name of a lane or a tick, at the left.
    fn label(&mut self, y: f64, text: &str) {
        let (x, y) = (short(LEFT - 8.0), short(y));
        self.put(format_args!(r#"<text class="small end" x="{x}" y="{y}">{}</text>"#, escaped(text)));
    }

    fn faults(&mut self) {
        self.title(
            "Faults",
            &[("broken".to_owned(), "c-fault".to_owned()), ("at one instant".to_owned(), "c-note".to_owned())],
        );
        let faults = &self.series.faults;
        if faults.is_empty() {
            self.label(self.y + 12.0, "none");
            self.y += LANE;
        }
        for (kind, spans) in faults {
            let lanes = lanes(spans);
            let depth = lanes.iter().max().map_or(1, |deepest| deepest + 1);
            self.label(self.y + 12.5, kind);
            self.stripe(depth as f64 * LANE);
            for (span, lane) in spans.iter().zip(lanes) {
                self.fault(kind, span, self.y + lane as f64 * LANE);
            }
            self.y += depth as f64 * LANE;
        }
        self.y += GAP;
    }

    fn stripe(&mut self, height: f64) {
        let (top, width, height) = (short(self.y + 1.0), short(WIDTH - LEFT - RIGHT), short(height - 2.0));
        self.put(format_args!(r#"<rect class="stripe" x="{LEFT}" y="{top}" width="{width}" height="{height}"/>"#));
    }

    fn fault(&mut self, kind: &str, span: &Span, top: f64) {
        let (from, to) = (self.x(span.from_us), self.x(span.to_us));
        let when =
            if span.note { clock(span.from_us) } else { format!("{} to {}", clock(span.from_us), clock(span.to_us)) };
        let about = escaped(&format!("{kind}: {} ({when})", span.detail));
        if span.note {
            let (x, top) = (short(from - 1.0), short(top + 3.0));
            let shape = format!(r#"<rect class="c-note" x="{x}" y="{top}" width="2" height="11">"#);
            return self.put(format_args!("{shape}<title>{about}</title></rect>"));
        }
        let width = (to - from).max(2.0);
        let (x, y, wide) = (short(from), short(top + 2.5), short(width));
        let shape = format!(r#"<rect class="c-fault" x="{x}" y="{y}" width="{wide}" height="12" rx="2">"#);
        self.put(format_args!("{shape}<title>{about}</title></rect>"));
        if fits(&span.detail, width) {
            let (x, y) = (short(from + 4.0), short(top + 12.0));
            self.put(format_args!(r#"<text class="in" x="{x}" y="{y}">{}</text>"#, escaped(&span.detail)));
        }
    }

    fn leaders(&mut self) {
        let nodes = self.series.nodes.iter().take(12);
        let legend: Vec<(String, String)> = nodes.map(|node| (format!("node {node}"), node_class(*node))).collect();
        self.title("Leaders by group", &legend);
        if self.series.leaders.is_empty() {
            self.label(self.y + 9.0, "none seen");
            self.y += LEADER_LANE;
        }
        for (group, leaders) in self.series.leaders.iter().take(GROUPS_MAX) {
            self.label(self.y + 9.0, &format!("group {group}"));
            self.stripe(LEADER_LANE);
            for leader in leaders {
                let (from, to) = (self.x(leader.from_us), self.x(leader.to_us));
                let about = format!(
                    "group {group}: node {}, term {}, from {}",
                    leader.node,
                    leader.term,
                    clock(leader.from_us)
                );
                let (x, y, width) = (short(from), short(self.y + 1.0), short((to - from).max(0.5)));
                let (class, height) = (node_class(leader.node), short(LEADER_LANE - 2.0));
                let shape = format!(r#"<rect class="{class}" x="{x}" y="{y}" width="{width}" height="{height}">"#);
                self.put(format_args!("{shape}<title>{about}</title></rect>"));
            }
            self.y += LEADER_LANE;
        }
        let more = self.series.leaders.len().saturating_sub(GROUPS_MAX);
        if more > 0 {
            self.label(self.y + 9.0, &format!("and {more} more"));
            self.y += LEADER_LANE;
        }
        self.y += GAP;
    }

    /// Lines across, from 0 to `top`, each with its number.
    fn grid(&mut self, unit: &str, ticks: &[(f64, String)]) {
        let right = short(WIDTH - RIGHT);
        for (part, label) in ticks {
            let y = self.y + PANEL * (1.0 - part);
            let at = short(y);
            self.put(format_args!(r#"<line class="grid" x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}"/>"#));
            self.label(y + 3.5, label);
        }
        let (x, y) = (short(26.0), short(self.y + PANEL / 2.0));
        self.put(format_args!(
            r#"<text class="small middle" transform="translate({x} {y}) rotate(-90)">{}</text>"#,
            escaped(unit)
        ));
    }

    fn grid_to(&mut self, unit: &str, top: f64) {
        let ticks: Vec<(f64, String)> = [0.0, 0.5, 1.0].into_iter().map(|part| (part, short(part * top))).collect();
        self.grid(unit, &ticks);
    }

    /// One line through all steps.
    fn curves(&mut self, title: &str, unit: &str, curves: &[(&str, &str, &Vec<f64>)]) {
        let legend: Vec<(String, String)> =
            curves.iter().map(|(name, class, _)| ((*name).to_owned(), (*class).to_owned())).collect();
        self.title(title, &legend);
        let most = curves.iter().flat_map(|(.., values)| values.iter()).fold(0.0, |most: f64, value| most.max(*value));
        let top = nice(most);
        self.grid_to(unit, top);
        for (_, class, values) in curves {
            let points: Vec<Option<f64>> = values.iter().map(|value| Some(value / top)).collect();
            self.line(class, &points);
        }
        self.y += PANEL + GAP;
    }

    /// Parts of the height of a picture; where there is nothing the line is broken.
    fn line(&mut self, class: &str, parts: &[Option<f64>]) {
        let mut path = String::new();
        let mut pen_down = false;
        for (step, part) in parts.iter().enumerate() {
            if let Some(part) = part {
                let letter = if pen_down { 'L' } else { 'M' };
                let (x, y) = (short(self.x_of_step(step)), short(self.y + PANEL * (1.0 - part)));
                write!(path, "{letter}{x} {y}").expect("a string takes what it is given");
            }
            // A single point is drawn as one.
            if part.is_some() && !pen_down && parts.get(step + 1).is_none_or(Option::is_none) {
                path.push_str("h0.1");
            }
            pen_down = part.is_some();
        }
        if !path.is_empty() {
            self.put(format_args!(r#"<path class="line {class}" d="{path}"/>"#));
        }
    }

    /// On a scale of decades.
    fn lateness(&mut self) {
        let legend =
            [("worst", "c-max"), ("half within", "c-half")].map(|(name, class)| (name.to_owned(), class.to_owned()));
        self.title("Lateness of what was due at that time", &legend);
        let most = self.series.late_max_us.iter().flatten().max().copied().unwrap_or(0) as f64;
        let decades = ((most / LATE_FROM_US).max(10.0).log10()).ceil();
        let ticks: Vec<(f64, String)> = (0..=decades as u32)
            .map(|decade| {
                let us = LATE_FROM_US as u64 * 10u64.pow(decade);
                (f64::from(decade) / decades, tick(us))
            })
            .collect();
        self.grid("log scale", &ticks);
        let part = |late_us: &Option<u64>| late_us.map(|us| (us as f64 / LATE_FROM_US).max(1.0).log10() / decades);
        let [worst, half] = [&self.series.late_max_us, &self.series.late_half_us]
            .map(|values| values.iter().map(part).collect::<Vec<Option<f64>>>());
        // The broad one below: where little was due, both are the same.
        self.line("c-half", &half);
        self.line("c-max", &worst);
        self.y += PANEL + GAP;
    }

    /// One on top of the other.
    fn outcomes(&mut self) {
        let series = self.series;
        let kinds =
            [("ok", "c-ok", &series.ok), ("unknown", "c-unknown", &series.unknown), ("fail", "c-fail", &series.fail)];
        let legend: Vec<(String, String)> =
            kinds.iter().map(|(name, class, _)| ((*name).to_owned(), (*class).to_owned())).collect();
        self.title("What came of operations", &legend);
        let sums: Vec<f64> =
            (0..series.ok.len()).map(|at| series.ok[at] + series.fail[at] + series.unknown[at]).collect();
        let top = nice(sums.iter().fold(0.0, |most: f64, sum| most.max(*sum)));
        self.grid_to("per second", top);
        let mut below = vec![0.0; sums.len()];
        for (_, class, values) in kinds {
            self.layer(class, &mut below, values, top);
        }
        self.y += PANEL + GAP;
    }

    /// What lies on `below`, which it is added to.
    fn layer(&mut self, class: &str, below: &mut [f64], values: &[f64], top: f64) {
        if values.iter().all(|value| *value == 0.0) {
            return;
        }
        let edge = |drawing: &Self, step: usize, value: f64| {
            let from = drawing.x(step as u64 * drawing.series.step_us);
            let to = drawing.x((step as u64 + 1) * drawing.series.step_us);
            (from, to, drawing.y + PANEL * (1.0 - value / top))
        };
        let mut path = String::new();
        for (step, (below, value)) in below.iter().zip(values).enumerate() {
            let (from, to, y) = edge(self, step, below + value);
            let letter = if step == 0 { 'M' } else { 'L' };
            write!(path, "{letter}{} {}H{}", short(from), short(y), short(to))
                .expect("a string takes what it is given");
        }
        for (step, below) in below.iter().enumerate().rev() {
            let (from, to, y) = edge(self, step, *below);
            write!(path, "L{} {}H{}", short(to), short(y), short(from)).expect("a string takes what it is given");
        }
        self.put(format_args!(r#"<path class="{class}" d="{path}Z"/>"#));
        for (below, value) in below.iter_mut().zip(values) {
            *below += value;
        }
    }

    /// The time axis through all pictures.
    fn ticks(&mut self, top: f64, bottom: f64) {
        let step_us = tick_step(self.series.end_us);
        for at_us in (0..=self.series.end_us).step_by(usize::try_from(step_us).expect("a day fits")) {
            let x = short(self.x(at_us));
            let (high, low, label) = (short(top), short(bottom + 5.0), short(bottom + 18.0));
            self.put(format_args!(r#"<line class="grid" x1="{x}" x2="{x}" y1="{high}" y2="{low}"/>"#));
            self.put(format_args!(r#"<text class="small middle" x="{x}" y="{label}">{}</text>"#, clock(at_us)));
        }
    }

    /// The axis, and where all was healed.
    fn finish(mut self) -> String {
        let (top, bottom) = (TITLE, self.y - GAP);
        // Below everything that is drawn already.
        let pictures = std::mem::take(&mut self.body);
        self.ticks(top, bottom);
        self.body.push_str(&pictures);
        if let Some(healed_us) = self.series.healed_us {
            let x = self.x(healed_us);
            let at = short(x);
            let low = short(bottom);
            self.put(format_args!(
                r#"<line class="healed" x1="{at}" x2="{at}" y1="{}" y2="{low}"/>"#,
                short(top - 6.0)
            ));
            // At the side where there is room.
            let (class, x) = if x > WIDTH / 2.0 { ("end", x - 5.0) } else { ("", x + 5.0) };
            let text = short(x);
            self.put(format_args!(r#"<text class="small healed-text {class}" x="{text}" y="12">healed</text>"#));
        }
        let (middle, low) = (short((LEFT + WIDTH - RIGHT) / 2.0), short(bottom + 36.0));
        let about = format!("time since the run began (min:s); one step is {}", span(self.series.step_us));
        self.put(format_args!(r#"<text class="small middle" x="{middle}" y="{low}">{about}</text>"#));
        let height = short(bottom + 46.0);
        let head = format!(r#"<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="The run over time">"#);
        format!("{head}\n{}</svg>\n", self.body)
    }
}

fn node_class(node: u64) -> String {
    format!("n{}", node % NODE_COLOURS)
}

/// A decade, in its unit.
fn tick(us: u64) -> String {
    match us {
        0..1_000 => format!("{} ms", us as f64 / 1e3),
        1_000..1_000_000 => format!("{} ms", us / 1_000),
        _ => format!("{} s", us / 1_000_000),
    }
}

/// So that there are about ten.
fn tick_step(end_us: u64) -> u64 {
    const SECONDS: [u64; 14] = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 7_200];
    let wanted = end_us / 12;
    SECONDS.into_iter().map(|seconds| seconds * 1_000_000).find(|step| *step >= wanted).unwrap_or(wanted)
}

/// Spans that overlap lie one below the other.
fn lanes(spans: &[Span]) -> Vec<usize> {
    let mut free_from: Vec<u64> = Vec::new();
    spans
        .iter()
        .map(|span| {
            let lane = free_from.iter().position(|free| *free <= span.from_us).unwrap_or(free_from.len());
            if lane == free_from.len() {
                free_from.push(0);
            }
            free_from[lane] = span.to_us.max(span.from_us + 1);
            lane
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_numbers() {
        assert_eq!([0.0, 3.0, 12.0, 50.0, 51.0].map(nice), [1.0, 3.0, 20.0, 50.0, 60.0]);
        assert_eq!([60, 600, 3_600].map(|seconds| tick_step(seconds * 1_000_000) / 1_000_000), [5, 60, 300]);
        assert_eq!([5_000_000, 125_000_000, 3_725_000_000].map(clock), ["0:05", "2:05", "1:02:05"]);
        assert_eq!([100, 1_000, 100_000, 10_000_000].map(tick), ["0.1 ms", "1 ms", "100 ms", "10 s"]);
    }

    #[test]
    fn spans_that_overlap_do_not_hide_each_other() {
        let span = |from_us, to_us| Span { from_us, to_us, note: false, detail: String::new() };
        assert_eq!(lanes(&[span(0, 10), span(5, 20), span(10, 12), span(11, 30)]), [0, 1, 0, 2]);
    }
}
