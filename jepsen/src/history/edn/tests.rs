//! What is written is read back the same, whatever it is; and what is not, is refused.

use boomerang_testkit::seed;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;

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
            let fault = ["kill", "partition", "clock"][rng.random_range(0..3)];
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
            load: ["one-shot", "races", "dedup"][rng.random_range(0..3)],
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

/// The form outside checkers read, to the letter.
#[test]
fn lines_are_as_jepsen_writes_them() {
    let at = |at_us, what| Event { at_us, what };
    let call = Call::Cancel { token: 9, task: "t".to_owned() };
    let kill = FaultNote { fault: "kill", stage: Stage::Begin, detail: "node \"2\"".to_owned() };
    let events = vec![
        at(1, What::Call(3, call.clone())),
        at(2, What::End(3, End::Ok(Answer::Cancelled))),
        at(3, What::Call(4, call)),
        at(4, What::End(4, End::Unknown("no answer".to_owned()))),
        at(5, What::Fault(kill)),
        at(6, What::Leads { group: 1, node: 2, term: u64::MAX }),
    ];
    let settings = BTreeMap::from([("nodes".to_owned(), "5".to_owned())]);
    let text = written(&History { began_ms: 77, events }, &Meta { seed: Some(7), settings });
    let expected = r#"{:began-ms 77, :seed 7, :settings {"nodes" "5"}}
{:index 0, :time 1000, :type :invoke, :process 3, :f :cancel, :value {:token 9, :task "t"}}
{:index 1, :time 2000, :type :ok, :process 3, :f :cancel, :value {:answer :cancelled}}
{:index 2, :time 3000, :type :invoke, :process 4, :f :cancel, :value {:token 9, :task "t"}}
{:index 3, :time 4000, :type :info, :process 4, :f :cancel, :error "no answer"}
{:index 4, :time 5000, :type :info, :process :nemesis, :f :fault, :value {:fault "kill", :stage :begin, :detail "node \"2\""}}
{:index 5, :time 6000, :type :info, :process :observer, :f :leads, :value {:group 1, :node 2, :term 18446744073709551615N}}
"#;
    assert_eq!(text, expected);
}

#[test]
fn damage_is_refused_with_its_line() {
    let good = written(&any_history(1, 3), &Meta::default());
    let lines: Vec<&str> = good.lines().collect();
    let refused = |text: &str| read(text.as_bytes()).unwrap_err().to_string();
    assert!(refused("").contains("there is nothing in it"));
    assert!(refused(&[lines[0], lines[2]].join("\n")).contains("line 2 of the history: event 0 belongs here, not 1"));
    assert!(refused(&[lines[0], &lines[1][..20]].join("\n")).contains("line 2"));
    assert!(refused(lines[1]).contains(":began-ms is missing"));
    assert!(refused("{:began-ms 1, :settings {}} {}").contains("something follows"));
    assert!(refused(&"[".repeat(1_000)).contains("too many brackets"));
    assert!(refused("{:began-ms 99999999999999999999, :settings {}}").contains("too large"));
    assert!(refused("{:began-ms").contains("line 1 of the history: it ends too soon"));
    assert!(refused("{:began-ms nil}").contains("'nil' at column 12"));
    assert!(refused("{:began-ms #inst}").contains("'#' at column 12"));
}

/// Any character may be wrong: the answer is an error or a history, and never a panic.
#[test]
fn any_damage_is_survived() {
    let seed = seed::one();
    let mut rng = seed.rng();
    let good = written(&any_history(*seed, 12), &Meta::default());
    let mut refused = 0;
    for _ in 0..3_000 {
        let mut characters: Vec<char> = good.chars().collect();
        let at = rng.random_range(0..characters.len());
        match rng.random_range(0..3) {
            0 => drop(characters.remove(at)),
            1 => characters.truncate(at),
            _ => characters[at] = [' ', '"', '}', ':', '9', '\\', 'u'][rng.random_range(0..7)],
        }
        let damaged: String = characters.into_iter().collect();
        refused += usize::from(read(damaged.as_bytes()).is_err());
    }
    assert!(refused > 1_000, "only {refused} of 3000 were noticed");
}
