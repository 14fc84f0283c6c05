//! What is written is read back the same, whatever it is; and what is not, is refused.

use boomerang_task::{Fence, Missed};
use boomerang_testkit::seed;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::history::{Answer, Call, Delivery, Due, End, FaultNote, Left, LeftAs, Registration, Stage};

/// A history of events that need not make sense together: everything of every kind, with odd texts and large numbers.
pub(crate) fn any_history(seed: u64, events: usize) -> History {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut at_us = 0;
    let began_ms = 1_700_000_000_000 + rng.random_range(0..1_000_000);
    let events = (0..events)
        .map(|_| {
            at_us += rng.random_range(0..100_000);
            Event { at_us, what: any_what(&mut rng) }
        })
        .collect();
    History { began_ms, events }
}

fn any_what(rng: &mut StdRng) -> What {
    let process = rng.random_range(0..5);
    match rng.random_range(0..10) {
        0..3 => What::Call(process, any_call(rng)),
        3..6 => What::End(process, any_end(rng)),
        6 => What::Delivered(any_delivery(rng)),
        7 => {
            let stage = [Stage::Begin, Stage::End, Stage::Note][rng.random_range(0..3)];
            let fault = ["kill", "partition", "clock"][rng.random_range(0..3)].to_owned();
            What::Fault(FaultNote { fault, stage, detail: any_text(rng) })
        }
        8 => match rng.random_range(0..3) {
            0 => What::Healed,
            1 => What::Leads { group: rng.random(), node: rng.random(), term: any_number(rng) },
            _ => What::Digest {
                group: rng.random(),
                replica: any_number(rng),
                node: any_number(rng),
                index: any_number(rng),
                digest: any_text(rng),
            },
        },
        _ => {
            let state = if rng.random_bool(0.5) {
                LeftAs::Pending { due_ms: any_number(rng), occurrence: any_number(rng) }
            } else {
                LeftAs::DeadLetter { occurrence: any_number(rng), attempts: rng.random() }
            };
            What::Left(Left { token: rng.random_bool(0.5).then(|| any_number(rng)), task: any_text(rng), state })
        }
    }
}

fn any_number(rng: &mut StdRng) -> u64 {
    match rng.random_range(0..4) {
        0 => rng.random(),
        1 => u64::MAX,
        _ => rng.random_range(0..1_000),
    }
}

fn any_text(rng: &mut StdRng) -> String {
    const ODD: [char; 14] = ['a', 'Z', '0', ' ', ',', ';', '"', '\\', '\n', '\r', '\t', '\u{1}', 'ä', '🪃'];
    (0..rng.random_range(0..12)).map(|_| ODD[rng.random_range(0..ODD.len())]).collect()
}

fn any_call(rng: &mut StdRng) -> Call {
    let (token, task) = (any_number(rng), any_text(rng));
    match rng.random_range(0..5) {
        0 => Call::Register(Registration {
            token,
            load: ["one-shot", "races", "dedup"][rng.random_range(0..3)].to_owned(),
            client: any_text(rng),
            due: if rng.random_bool(0.5) { Due::In(any_number(rng)) } else { Due::At(any_number(rng)) },
            every_ms: rng.random_bool(0.5).then(|| any_number(rng)),
            missed: [Missed::Skip, Missed::Once, Missed::All { max: rng.random() }][rng.random_range(0..3)],
            count: rng.random_bool(0.5).then(|| any_number(rng)),
            key: rng.random_bool(0.5).then(|| any_text(rng)),
            attempts: rng.random(),
            refusals: if rng.random_bool(0.5) { u32::MAX } else { 0 },
        }),
        1 => Call::Cancel { token, task },
        2 => Call::Edit { token, task, due_ms: any_number(rng), version: rng.random() },
        3 => Call::Get { token, task },
        _ => Call::List { client: task },
    }
}

fn any_end(rng: &mut StdRng) -> End {
    let (occurrence, attempt, due_ms) = (any_number(rng), rng.random(), any_number(rng));
    End::Ok(match rng.random_range(0..10) {
        0 => return End::Fail(any_text(rng)),
        1 => return End::Unknown(any_text(rng)),
        2 => Answer::Registered { task: any_text(rng), due_ms, duplicate: rng.random() },
        3 => Answer::Cancelled,
        4 => Answer::CancelledTooLate { occurrence, attempt },
        5 => Answer::Edited { due_ms },
        6 => Answer::EditTooLate { occurrence, attempt },
        7 => Answer::NotFound,
        8 => Answer::Found { due_ms, occurrence, attempt, version: rng.random() },
        _ => Answer::Listed { tasks: (0..rng.random_range(0..4)).map(|_| any_text(rng)).collect() },
    })
}

fn any_delivery(rng: &mut StdRng) -> Delivery {
    Delivery {
        token: any_number(rng),
        task: any_text(rng),
        occurrence: any_number(rng),
        attempt: rng.random(),
        version: rng.random(),
        due_ms: any_number(rng),
        fence: Fence { term: any_number(rng), seq: any_number(rng) },
        accepted: rng.random(),
        effect: rng.random_bool(0.5).then(|| rng.random()),
        dead_letter: rng.random(),
        datagram: rng.random(),
    }
}

fn written(history: &History, meta: &Meta) -> String {
    let mut bytes = Vec::new();
    write(history, meta, &mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn what_is_written_is_read_back() {
    for seed in seed::rounds(300) {
        let history = any_history(*seed, 60);
        let mut rng = seed.rng();
        let settings = (0..*seed % 4).map(|_| (any_text(&mut rng), any_text(&mut rng))).collect();
        let meta = Meta { seed: (*seed % 2 == 0).then_some(*seed), settings };
        let text = written(&history, &meta);
        let (again, meta_again) = read(text.as_bytes()).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(again.began_ms, history.began_ms);
        for (index, (one, two)) in history.events.iter().zip(&again.events).enumerate() {
            assert_eq!(one, two, "event {index}");
        }
        assert_eq!(again.events.len(), history.events.len());
        assert_eq!(meta_again, meta);
    }
}

/// What a program that reads it relies on, to the letter: a difference wants another [`VERSION`].
#[test]
fn the_stored_form_is_this_one() {
    let task = || "t".to_owned();
    let at = |at_us, what| Event { at_us, what };
    let registration = Registration {
        token: 9,
        load: "recurring".to_owned(),
        client: "c".to_owned(),
        due: Due::In(500),
        every_ms: Some(200),
        missed: Missed::All { max: 3 },
        count: None,
        key: Some("k".to_owned()),
        attempts: 3,
        refusals: 0,
    };
    let fence = Fence { term: 2, seq: u64::MAX };
    let delivery = Delivery {
        token: 9,
        task: task(),
        occurrence: 1,
        attempt: 2,
        version: 1,
        due_ms: 600,
        fence,
        accepted: true,
        effect: None,
        dead_letter: false,
        datagram: false,
    };
    let kill = FaultNote { fault: "kill".to_owned(), stage: Stage::Begin, detail: "node \"2\"".to_owned() };
    let left = Left { token: None, task: task(), state: LeftAs::DeadLetter { occurrence: 4, attempts: 3 } };
    let events = vec![
        at(1, What::Call(3, Call::Register(registration))),
        at(2, What::End(3, End::Ok(Answer::Registered { task: task(), due_ms: 600, duplicate: false }))),
        at(3, What::Call(3, Call::Cancel { token: 9, task: task() })),
        at(4, What::End(3, End::Ok(Answer::Cancelled))),
        at(5, What::Call(3, Call::List { client: "c".to_owned() })),
        at(6, What::End(3, End::Unknown("no answer".to_owned()))),
        at(7, What::Delivered(delivery)),
        at(8, What::Fault(kill)),
        at(9, What::Healed),
        at(10, What::Leads { group: 1, node: 2, term: 3 }),
        at(11, What::Left(left)),
    ];
    let settings = BTreeMap::from([("nodes".to_owned(), "5".to_owned())]);
    let text = written(&History { began_ms: 77, events }, &Meta { seed: Some(7), settings });
    let expected = r#"{"version":1,"began_ms":77,"seed":7,"settings":{"nodes":"5"},"events":11}
{"index":0,"at_us":1,"what":{"call":[3,{"register":{"token":9,"load":"recurring","client":"c","due":{"in":500},"every_ms":200,"missed":{"all":{"max":3}},"count":null,"key":"k","attempts":3,"refusals":0}}]}}
{"index":1,"at_us":2,"what":{"end":[3,{"ok":{"registered":{"task":"t","due_ms":600,"duplicate":false}}}]}}
{"index":2,"at_us":3,"what":{"call":[3,{"cancel":{"token":9,"task":"t"}}]}}
{"index":3,"at_us":4,"what":{"end":[3,{"ok":"cancelled"}]}}
{"index":4,"at_us":5,"what":{"call":[3,{"list":{"client":"c"}}]}}
{"index":5,"at_us":6,"what":{"end":[3,{"unknown":"no answer"}]}}
{"index":6,"at_us":7,"what":{"delivered":{"token":9,"task":"t","occurrence":1,"attempt":2,"version":1,"due_ms":600,"fence":{"term":2,"seq":18446744073709551615},"accepted":true,"effect":null,"dead_letter":false,"datagram":false}}}
{"index":7,"at_us":8,"what":{"fault":{"fault":"kill","stage":"begin","detail":"node \"2\""}}}
{"index":8,"at_us":9,"what":"healed"}
{"index":9,"at_us":10,"what":{"leads":{"group":1,"node":2,"term":3}}}
{"index":10,"at_us":11,"what":{"left":{"token":null,"task":"t","state":{"dead_letter":{"occurrence":4,"attempts":3}}}}}
"#;
    assert_eq!(text, expected);
}

#[test]
fn damage_is_refused_with_its_line() {
    let good = written(&any_history(1, 3), &Meta::default());
    let lines: Vec<&str> = good.lines().collect();
    let refused = |text: &[u8]| read(text).unwrap_err().to_string();
    let refused_lines = |lines: &[&str]| refused(lines.join("\n").as_bytes());
    for (error, expected) in [
        (refused(b""), "line 1 of the history: there is nothing in it"),
        (refused_lines(&[lines[0], lines[2]]), "line 2 of the history: event 0 belongs here, not 1"),
        (refused_lines(&[lines[0], lines[1], &lines[2][..20]]), "line 3 of the history: it is cut off after column 20"),
        (refused_lines(&lines[..3]), "the history ends after line 3, with 2 of 3 events"),
        (
            refused_lines(&[&lines[..], &lines[3..]].concat()),
            "line 5 of the history: the first line promises only 3 events",
        ),
        (refused_lines(&lines[1..]), "line 1 of the history: missing field `version`, at column"),
        (
            refused(br#"{"version":2,"new":true}"#),
            "line 1 of the history: it has version 2 of the form, and this program reads version 1",
        ),
        (refused(br#"{"version":1,"#), "line 1 of the history: it is cut off after column 13"),
        (
            refused(br#"{"version":1,"began_ms":-1}"#),
            "line 1 of the history: invalid value: integer `-1`, expected u64, at column 26",
        ),
        (refused(b"{:began-ms 1}"), "line 1 of the history: key must be a string, at column 2"),
        (refused(b"{\"version\":1,\"\xff\":1}"), "line 1 of the history: invalid unicode code point, at column"),
        (
            refused(br#"{"version":1,"began_ms":1,"seed":null,"settings":{},"events":0,"more":1}"#),
            "unknown field `more`",
        ),
    ] {
        assert!(error.contains(expected), "'{error}' does not say '{expected}'");
    }
}

/// Whoever wrote it was killed: it is refused wherever it ends, with the line in which it does.
#[test]
fn a_history_that_is_cut_short_is_refused() {
    let good = written(&any_history(2, 12), &Meta::default());
    for length in 0..good.len() - 1 {
        let cut = &good.as_bytes()[..length];
        let lines = cut.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count().max(1);
        let error = read(cut).expect_err("it is not whole").to_string();
        let named = [format!("line {lines} of"), format!("line {lines}, with")];
        assert!(named.iter().any(|named| error.contains(named)), "{length} bytes: {error}");
    }
    // Only the end of the last line is missing.
    assert!(read(good.trim_end().as_bytes()).is_ok());
}

/// Any byte may be wrong: the answer is an error or a history, and never a panic.
#[test]
fn any_damage_is_survived() {
    let seed = seed::one();
    let mut rng = seed.rng();
    let good = written(&any_history(*seed, 12), &Meta::default());
    let mut refused = 0;
    for _ in 0..3_000 {
        let mut damaged = good.clone().into_bytes();
        let at = rng.random_range(0..damaged.len());
        match rng.random_range(0..3) {
            0 => drop(damaged.remove(at)),
            1 => damaged.truncate(at),
            _ => damaged[at] = b" \"}:9\\u\xff"[rng.random_range(0..8)],
        }
        refused += usize::from(read(&damaged[..]).is_err());
    }
    assert!(refused > 1_000, "only {refused} of 3000 were noticed");
}
