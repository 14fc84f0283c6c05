//! The page: text, tables and the pictures of [`super::chart`], in one file without scripts.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use boomerang_task::when::format_instant;

use super::COMMAND;
use super::chart::{charts, clock, span};
use super::figures::{Figures, figures};
use super::series::series;
use crate::check::{Verdict, Violation};
use crate::history::{Event, History, Meta};

/// Violations of one checker that are shown; the file of verdicts has more.
const SHOWN_MAX: usize = 20;
/// Events before and after each that a violation names.
const AROUND: u64 = 3;
/// More events than this are no longer read.
const EVENTS_MAX: usize = 2_000;

const STYLE: &str = include_str!("page.css");

pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // Not allowed in any document.
            control if control.is_control() && control != '\n' && control != '\t' => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

pub fn page(history: &History, verdicts: &[Verdict], meta: &Meta) -> String {
    let shown = shown_events(history, verdicts);
    let series = series(history);
    let mut page = String::new();
    page.push_str("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n");
    page.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n");
    let seed = meta.seed.map_or(String::new(), |seed| format!(", seed {seed}"));
    add(&mut page, format_args!("<title>Boomerang under faults{seed}</title>\n"));
    add(&mut page, format_args!("<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"));
    head(&mut page, history, verdicts, meta);
    table(&mut page, verdicts);
    add(&mut page, format_args!("<h2>Over time</h2>\n<div class=\"wide\">\n{}</div>\n", charts(&series)));
    numbers(&mut page, &figures(history));
    violations(&mut page, verdicts, &shown);
    events(&mut page, history, verdicts, &shown);
    page.push_str(
        "<footer><a href=\"history.jsonl\">history.jsonl</a> · <a href=\"verdicts.json\">verdicts.json</a></footer>\n",
    );
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn add(page: &mut String, text: std::fmt::Arguments<'_>) {
    page.write_fmt(text).expect("a string takes what it is given");
}

fn head(page: &mut String, history: &History, verdicts: &[Verdict], meta: &Meta) {
    let broken = verdicts.iter().filter(|verdict| !verdict.holds()).count();
    let (class, say) = match broken {
        0 => ("good", format!("All {} promises were kept", verdicts.len())),
        1 => ("bad", format!("1 of {} promises was broken", verdicts.len())),
        _ => ("bad", format!("{broken} of {} promises were broken", verdicts.len())),
    };
    add(page, format_args!("<h1>Boomerang under faults</h1>\n<p class=\"banner {class}\">{say}</p>\n"));
    let lasted = history.events.last().map_or(0, |event| event.at_us);
    // How it was asked for: the command says all of it.
    if let Some(command) = meta.settings.get(COMMAND) {
        add(page, format_args!("<p class=\"command\"><code>{}</code></p>\n", escaped(command)));
    } else {
        let seed = meta.seed.map(|seed| format!("seed {seed}"));
        let settings = seed.into_iter().chain(meta.settings.iter().map(|(name, value)| format!("{name} {value}")));
        let settings: Vec<String> = settings.map(|setting| escaped(&setting)).collect();
        add(page, format_args!("<p class=\"muted\">{}</p>\n", settings.join(" · ")));
    }
    let (lasted, many, began) = (clock(lasted), history.events.len(), format_instant(history.began_ms));
    add(page, format_args!("<p class=\"muted\">began at {began} · {lasted} · {many} events</p>\n"));
}

fn table(page: &mut String, verdicts: &[Verdict]) {
    page.push_str("<h2>Promises</h2>\n<div class=\"wide\">\n<table>\n");
    page.push_str("<thead><tr><th>checker</th><th></th><th>promise</th><th>looked at</th></tr></thead>\n<tbody>\n");
    for verdict in verdicts {
        let (class, says) = if verdict.holds() { ("good", "holds") } else { ("bad", "broken") };
        let name = escaped(verdict.checker);
        let name = if verdict.holds() { name } else { format!("<a href=\"#{name}\">{name}</a>") };
        let counts: Vec<String> = verdict
            .counts
            .iter()
            .map(|(what, count)| {
                format!("<span class=\"count\">{} <b>{count}</b></span>", escaped(&what.replace('_', " ")))
            })
            .collect();
        let promise = escaped(verdict.promise);
        add(
            page,
            format_args!(
                "<tr><td>{name}</td><td><span class=\"mark {class}\">{says}</span></td><td>{promise}</td><td>{}</td></tr>\n",
                counts.join(" ")
            ),
        );
    }
    page.push_str("</tbody>\n</table>\n</div>\n");
}

fn numbers(page: &mut String, figures: &Figures) {
    page.push_str("<h2>Figures</h2>\n<div class=\"columns\">\n<table>\n");
    page.push_str("<thead><tr><th>operation</th><th>ok</th><th>fail</th><th>unknown</th></tr></thead>\n<tbody>\n");
    for (kind, outcomes) in &figures.operations {
        let (ok, fail, unknown) = (outcomes.ok, outcomes.fail, outcomes.unknown);
        add(page, format_args!("<tr><td>{kind}</td><td>{ok}</td><td>{fail}</td><td>{unknown}</td></tr>\n"));
    }
    page.push_str("</tbody>\n</table>\n<table>\n<thead><tr><th>deliveries</th><th></th></tr></thead>\n<tbody>\n");
    for (name, count) in [
        ("all", figures.deliveries),
        ("accepted", figures.accepted),
        ("attempts after the first", figures.retries),
        ("the same attempt again", figures.repeated),
        ("copies of dead letters", figures.copies),
    ] {
        add(page, format_args!("<tr><td>{name}</td><td>{count}</td></tr>\n"));
    }
    page.push_str(
        "</tbody>\n</table>\n<table>\n<thead><tr><th>lateness of first attempts</th><th></th></tr></thead>\n<tbody>\n",
    );
    add(page, format_args!("<tr><td>first attempts</td><td>{}</td></tr>\n", figures.late_us.len()));
    for (name, percent) in [("half within", 50), ("90 of 100 within", 90), ("99 of 100 within", 99), ("worst", 100)] {
        add(page, format_args!("<tr><td>{name}</td><td>{}</td></tr>\n", span(figures.late(percent))));
    }
    page.push_str("</tbody>\n</table>\n</div>\n");
}

/// Those that violations name, with their neighbours, as far as there is room.
fn shown_events(history: &History, verdicts: &[Verdict]) -> BTreeSet<u64> {
    let mut shown = BTreeSet::new();
    let last = history.events.len() as u64;
    let shown_violations = verdicts.iter().flat_map(|verdict| verdict.violations.iter().take(SHOWN_MAX));
    for event in shown_violations.flat_map(|violation| &violation.events) {
        if shown.len() >= EVENTS_MAX {
            break;
        }
        shown.extend((event.saturating_sub(AROUND)..=event + AROUND).filter(|index| *index < last));
    }
    shown
}

fn violations(page: &mut String, verdicts: &[Verdict], shown: &BTreeSet<u64>) {
    let broken: Vec<&Verdict> = verdicts.iter().filter(|verdict| !verdict.holds()).collect();
    if broken.is_empty() {
        return;
    }
    page.push_str("<h2>Violations</h2>\n");
    for verdict in broken {
        let name = escaped(verdict.checker);
        add(page, format_args!("<h3 id=\"{name}\">{name}</h3>\n<ul>\n"));
        for violation in verdict.violations.iter().take(SHOWN_MAX) {
            add(page, format_args!("<li>{}<br/><span class=\"muted\">events", escaped(&violation.what)));
            links(page, violation, shown);
            page.push_str("</span></li>\n");
        }
        let more = verdict.violations.len().saturating_sub(SHOWN_MAX);
        if more > 0 {
            add(page, format_args!("<li class=\"muted\">and {more} more in verdicts.json</li>\n"));
        }
        page.push_str("</ul>\n");
    }
}

fn links(page: &mut String, violation: &Violation, shown: &BTreeSet<u64>) {
    for event in &violation.events {
        match shown.contains(event) {
            true => add(page, format_args!(" <a href=\"#e{event}\">{event}</a>")),
            false => add(page, format_args!(" {event}")),
        }
    }
}

fn events(page: &mut String, history: &History, verdicts: &[Verdict], shown: &BTreeSet<u64>) {
    if shown.is_empty() {
        return;
    }
    let named: BTreeSet<u64> = verdicts
        .iter()
        .flat_map(|verdict| &verdict.violations)
        .flat_map(|violation| violation.events.clone())
        .collect();
    page.push_str("<h2>Events around them</h2>\n<div class=\"wide\">\n<table class=\"events\">\n");
    page.push_str("<thead><tr><th>event</th><th>second</th><th>what</th></tr></thead>\n<tbody>\n");
    let mut before = None;
    for index in shown {
        let Some(event) = usize::try_from(*index).ok().and_then(|at| history.events.get(at)) else { continue };
        if before.is_some_and(|before| before + 1 != *index) {
            page.push_str("<tr><td colspan=\"3\" class=\"muted\">…</td></tr>\n");
        }
        before = Some(*index);
        let class = if named.contains(index) { " class=\"named\"" } else { "" };
        let at = event.at_us as f64 / 1e6;
        let what = escaped(&said(event));
        add(
            page,
            format_args!(
                "<tr id=\"e{index}\"{class}><td>{index}</td><td>{at:.6}</td><td><code>{what}</code></td></tr>\n"
            ),
        );
    }
    page.push_str("</tbody>\n</table>\n</div>\n");
}

/// As in the file of the history, without what the table says already. Long lists are cut.
fn said(event: &Event) -> String {
    const CHARACTERS_MAX: usize = 400;
    let line = serde_json::to_string(&event.what).expect("an event can be written");
    match line.char_indices().nth(CHARACTERS_MAX) {
        Some((cut, _)) => format!("{} …", &line[..cut]),
        None => line,
    }
}
