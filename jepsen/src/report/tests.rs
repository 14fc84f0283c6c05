//! A page of a made-up run: it is well-formed, says what the checkers said, and its pictures have numbers that can be drawn.

use boomerang_task::Fence;
use boomerang_testkit::seed;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::check::hand_made::{delivery, one_shot};
use crate::check::{self, Limits, Violation};
use crate::history::stored::tests::any_history;
use crate::history::{Answer, Call, Delivery, Due, End, Event, FaultNote, Registration, Stage, What};

const BEGAN: u64 = 1_700_000_000_000;

/// A run that looks like one: tasks that come a little late, and later while nodes are killed, each for ten seconds.
fn example(seconds: u64, seed: u64) -> History {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut events = vec![];
    let healed = seconds * 3 / 4;
    for group in 1..=4 {
        events.push((0, What::Leads { group, node: u64::from(group) % 3 + 1, term: 1 }));
    }
    for second in (10..healed.saturating_sub(10)).step_by(15) {
        let detail = format!("node {}", second % 3 + 1);
        let note = |stage| {
            let fault = ["kill", "partition"][second as usize % 2].to_owned();
            What::Fault(FaultNote { fault, stage, detail: detail.clone() })
        };
        events.push((second * 1_000_000, note(Stage::Begin)));
        events.push((second * 1_000_000 + 10_000_000, note(Stage::End)));
        let (group, node) = (second as u16 % 4 + 1, second / 3 % 3 + 1);
        events.push((second * 1_000_000 + 700_000, What::Leads { group, node, term: second }));
    }
    events.push((healed * 1_000_000, What::Healed));
    for token in 0..seconds * 20 {
        let at_us = rng.random_range(0..(seconds - 3) * 1_000_000);
        let broken = (10_000_000..healed * 1_000_000).contains(&at_us) && at_us % 15_000_000 < 3_000_000;
        task(&mut events, &mut rng, token, at_us, broken);
    }
    events.sort_by_key(|(at_us, _)| *at_us);
    History { began_ms: BEGAN, events: events.into_iter().map(|(at_us, what)| Event { at_us, what }).collect() }
}

fn task(events: &mut Vec<(u64, What)>, rng: &mut StdRng, token: u64, at_us: u64, broken: bool) {
    let process = u32::try_from(token).unwrap();
    let due_ms = BEGAN + at_us / 1000 + 2_000;
    let registration = Registration { due: Due::At(due_ms), ..one_shot(token, 0) };
    events.push((at_us, What::Call(process, Call::Register(registration))));
    let task = format!("task-{token}");
    let end = match rng.random_range(0..10) {
        0 if broken => return events.push((at_us + 900_000, What::End(process, End::Fail("no leader".to_owned())))),
        1 if broken => End::Unknown("no answer".to_owned()),
        _ => End::Ok(Answer::Registered { task: task.clone(), due_ms, duplicate: false }),
    };
    events.push((at_us + 2_000, What::End(process, end)));
    let late_us = if broken { rng.random_range(1_000..2_500_000) } else { rng.random_range(150..3_000) };
    let fence = Fence { term: 1, seq: token };
    let delivery = Delivery { task, due_ms, fence, ..delivery(token, 0) };
    events.push(((due_ms - BEGAN) * 1000 + late_us, What::Delivered(delivery)));
}

fn meta() -> Meta {
    let settings = [("command", "jepsen run --seed 7 --faults 'a<b' & more"), ("nodes", "5")];
    Meta { seed: Some(7), settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into() }
}

fn written(history: &History, verdicts: &[Verdict]) -> (String, History, serde_json::Value) {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join("not/there/yet");
    write(&inner, history, verdicts, &meta()).unwrap();
    let page = fs::read_to_string(inner.join("index.html")).unwrap();
    let (again, _) = stored::read_file(&inner.join("history.jsonl")).unwrap();
    let json = serde_json::from_str(&fs::read_to_string(inner.join("verdicts.json")).unwrap()).unwrap();
    (page, again, json)
}

/// Every element is closed by its own end, and every attribute is quoted. Gives all attributes: element, name, value.
fn well_formed(page: &str) -> Vec<(String, String, String)> {
    let (mut open, mut attributes) = (Vec::new(), Vec::new());
    let mut rest = page.strip_prefix("<!DOCTYPE html>").expect("it says what it is");
    while let Some(start) = rest.find('<') {
        let style = open.last().is_some_and(|element| element == "style");
        assert!(style || !rest[..start].contains('>'), "a stray '>' in '{}'", &rest[..start]);
        let end = start + rest[start..].find('>').expect("an element ends");
        let element = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = element.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name));
            continue;
        }
        let (element, closed) = element.strip_suffix('/').map_or((element, false), |inner| (inner, true));
        let (name, mut words) = element.split_once(' ').unwrap_or((element, ""));
        while !words.trim().is_empty() {
            let (word, value) = words.split_once("=\"").expect("an attribute is quoted");
            let (value, others) = value.split_once('"').expect("a quote ends");
            attributes.push((name.to_owned(), word.trim().to_owned(), value.to_owned()));
            words = others;
        }
        if !closed {
            open.push(name.to_owned());
        }
    }
    assert!(open.is_empty(), "still open: {open:?}");
    attributes
}

/// All numbers of an attribute of a drawing.
fn numbers(value: &str) -> Vec<f64> {
    let parts = value.split(|letter: char| !(letter.is_ascii_digit() || letter == '.' || letter == '-'));
    parts.filter(|part| !part.is_empty()).map(|part| part.parse().unwrap_or(f64::NAN)).collect()
}

fn can_be_drawn(attributes: &[(String, String, String)]) {
    let view = attributes.iter().find(|(_, name, _)| name == "viewBox").expect("there is a picture");
    let [_, _, width, height] = numbers(&view.2)[..] else { panic!("{}", view.2) };
    let mut drawn = 0;
    for (element, name, value) in attributes {
        if matches!(name.as_str(), "x" | "y" | "x1" | "x2" | "y1" | "y2" | "width" | "height" | "d") && element != "svg"
        {
            for number in numbers(value) {
                assert!((0.0..=width.max(height)).contains(&number), "{element} {name} {value}");
                drawn += 1;
            }
        }
        assert!(!["NaN", "inf"].iter().any(|odd| value.contains(odd)), "{element} {name} {value}");
    }
    assert!(drawn > 100, "only {drawn} numbers are drawn");
}

fn links_lead_somewhere(attributes: &[(String, String, String)]) -> usize {
    let ids: Vec<&str> = attributes.iter().filter(|(_, name, _)| name == "id").map(|(.., id)| id.as_str()).collect();
    let links = attributes.iter().filter_map(|(_, name, to)| if name == "href" { to.strip_prefix('#') } else { None });
    links.inspect(|to| assert!(ids.contains(to), "nothing is called {to}")).count()
}

#[test]
fn a_page_says_what_the_checkers_said() {
    let history = example(120, 1);
    let mut verdicts = check::all(&history, &Limits::default());
    assert!(verdicts.iter().all(Verdict::holds), "{verdicts:#?}");
    let (page, again, _) = written(&history, &verdicts);
    assert_eq!(again, history);
    assert!(page.contains("All 11 promises were kept"));
    assert_eq!(page.matches(">holds<").count(), 11);
    can_be_drawn(&well_formed(&page));

    let what = "fence 1 < 2 & \"more\"".to_owned();
    verdicts[4].violations = vec![Violation { what, events: vec![0, 50, history.events.len() as u64 - 1] }];
    let (page, _, json) = written(&history, &verdicts);
    let attributes = well_formed(&page);
    can_be_drawn(&attributes);
    assert_eq!(links_lead_somewhere(&attributes), 4);
    assert!(page.contains("1 of 11 promises was broken"));
    assert!(page.contains("fence 1 &lt; 2 &amp; &quot;more&quot;"));
    for verdict in &verdicts {
        assert!(page.contains(verdict.checker) && page.contains(verdict.promise), "{}", verdict.checker);
    }
    assert_eq!(json["holds"], false);
    assert_eq!((&json["seed"], &json["settings"]["nodes"]), (&7.into(), &"5".into()));
    assert!(page.contains("--faults 'a&lt;b' &amp; more") && page.contains("began at 2023-11-14T22:13:20.000Z"));
    assert_eq!(json["verdicts"][4]["violations"][0]["events"][1], 50);
}

#[test]
fn pictures_show_what_happened() {
    let history = example(120, 2);
    let verdicts = check::all(&history, &Limits::default());
    let (page, ..) = written(&history, &verdicts);
    for text in ["Faults", "Leaders by group", "Throughput", "Lateness", "What came of operations", ">healed<"] {
        assert!(page.contains(text), "{text}");
    }
    for class in ["c-fault", "n1", "c-registered", "c-delivered", "c-max", "c-half", "c-ok", "c-unknown", "c-fail"] {
        assert!(page.contains(&format!("class=\"{class}\"")) || page.contains(&format!("line {class}\"")), "{class}");
    }
    let series = super::series::series(&history);
    let registered: f64 = series.registered.iter().sum();
    let answered = history.events.iter().filter(|event| matches!(event.what, What::End(_, End::Ok(_)))).count();
    assert_eq!(registered.round() as usize, answered);
    assert_eq!(series.faults.values().flatten().filter(|span| span.to_us - span.from_us == 10_000_000).count(), 5);
    assert_eq!(series.leaders[&1][0].node, 2);
    assert!(series.late_max_us.iter().flatten().max() > Some(&1_000_000));
}

#[test]
fn an_hour_is_no_larger_than_a_picture() {
    let history = example(3_600, 3);
    let series = super::series::series(&history);
    assert_eq!((series.step_us, series.ok.len()), (6_000_000, 600));
    let began = std::time::Instant::now();
    let verdicts = check::all(&history, &Limits::default());
    assert!(verdicts.iter().all(Verdict::holds), "{verdicts:#?}");
    let (page, ..) = written(&history, &verdicts);
    can_be_drawn(&well_formed(&page));
    assert!(page.len() < 300_000, "{} bytes", page.len());
    assert!(began.elapsed().as_secs() < 30, "{:?}", began.elapsed());
}

#[test]
fn whatever_a_history_is_the_page_is_whole() {
    let verdict = |events| Verdict {
        checker: "lost",
        promise: "a promise",
        counts: vec![("odd", 1)],
        violations: vec![Violation { what: "<odd>\u{1}".to_owned(), events }],
    };
    for seed in seed::rounds(20) {
        let history = any_history(*seed, 40);
        let (page, again, _) = written(&history, &[verdict(vec![0, 39, 1_000])]);
        let attributes = well_formed(&page);
        can_be_drawn(&attributes);
        links_lead_somewhere(&attributes);
        assert_eq!(again, history);
    }
    let (page, ..) = written(&History::default(), &[verdict(vec![])]);
    can_be_drawn(&well_formed(&page));
}

#[test]
fn what_never_ended_ended_with_the_healing() {
    let fault = |at_us, stage, detail: &str| Event {
        at_us,
        what: What::Fault(FaultNote { fault: "kill".to_owned(), stage, detail: detail.to_owned() }),
    };
    let events = vec![
        fault(1, Stage::Begin, "node 1"),
        fault(2, Stage::Begin, "node 2"),
        fault(3, Stage::Note, "not possible"),
        fault(4, Stage::End, "node 2"),
        Event { at_us: 9, what: What::Healed },
        fault(10, Stage::Begin, "node 3"),
        fault(12, Stage::End, "it is back"),
    ];
    let spans = &super::series::series(&History { began_ms: BEGAN, events }).faults["kill"];
    let found: Vec<(u64, u64, bool)> = spans.iter().map(|span| (span.from_us, span.to_us, span.note)).collect();
    assert_eq!(found, [(1, 9, false), (2, 4, false), (3, 3, true), (10, 12, false)]);
}
