//! The form that outside checkers read, to the letter: every kind of event once.

use boomerang_task::Fence;

use super::*;
use crate::check::hand_made::{delivery, one_shot};

fn exported(events: Vec<What>) -> String {
    let events = (1..).zip(events).map(|(at_us, what)| Event { at_us, what }).collect();
    let mut bytes = Vec::new();
    write(&History { began_ms: 77, events }, &mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn text(text: &str) -> String {
    text.to_owned()
}

#[test]
fn operations_are_as_jepsen_writes_them() {
    let plain = Registration { due: Due::In(500), ..one_shot(9, 0) };
    let every = Registration {
        due: Due::At(600),
        every_ms: Some(200),
        missed: Missed::All { max: 3 },
        count: Some(7),
        key: Some(text("k")),
        refusals: u32::MAX,
        ..plain.clone()
    };
    let ask = |process, call, answer| [What::Call(process, call), What::End(process, End::Ok(answer))];
    let task = || text("t");
    let get = || Call::Get { token: 9, task: task() };
    let cancel = || Call::Cancel { token: 9, task: task() };
    let edit = || Call::Edit { token: 9, task: task(), due_ms: 800, version: 2 };
    let mut events = Vec::new();
    events.extend(ask(3, Call::Register(plain), Answer::Registered { task: task(), due_ms: 600, duplicate: false }));
    events.push(What::Call(3, Call::Register(every)));
    // Two at once: each end belongs to the call of its own process.
    events.push(What::Call(4, cancel()));
    events.push(What::End(3, End::Fail(text("a \"quoted\" reason\n"))));
    events.push(What::End(4, End::Unknown(text("no answer"))));
    events.extend(ask(3, cancel(), Answer::Cancelled));
    events.extend(ask(3, cancel(), Answer::CancelledTooLate { occurrence: 1, attempt: 2 }));
    events.extend(ask(3, edit(), Answer::Edited { due_ms: 800 }));
    events.extend(ask(3, edit(), Answer::EditTooLate { occurrence: 1, attempt: 2 }));
    events.extend(ask(3, get(), Answer::Found { due_ms: 600, occurrence: 0, attempt: 1, version: 1 }));
    events.extend(ask(3, get(), Answer::NotFound));
    events.extend(ask(3, Call::List { client: text("c") }, Answer::Listed { tasks: vec![task(), text("u")] }));
    let expected = r#"{:index 0, :time 1000, :type :invoke, :process 3, :f :register, :value {:token 9, :load "one-shot", :client "c", :due-in-ms 500, :missed :once, :attempts 3, :refusals 0}}
{:index 1, :time 2000, :type :ok, :process 3, :f :register, :value {:answer :registered, :task "t", :due-ms 600, :duplicate false}}
{:index 2, :time 3000, :type :invoke, :process 3, :f :register, :value {:token 9, :load "one-shot", :client "c", :due-at-ms 600, :every-ms 200, :count 7, :missed :all, :missed-max 3, :key "k", :attempts 3, :refusals 4294967295}}
{:index 3, :time 4000, :type :invoke, :process 4, :f :cancel, :value {:token 9, :task "t"}}
{:index 4, :time 5000, :type :fail, :process 3, :f :register, :error "a \"quoted\" reason\n"}
{:index 5, :time 6000, :type :info, :process 4, :f :cancel, :error "no answer"}
{:index 6, :time 7000, :type :invoke, :process 3, :f :cancel, :value {:token 9, :task "t"}}
{:index 7, :time 8000, :type :ok, :process 3, :f :cancel, :value {:answer :cancelled}}
{:index 8, :time 9000, :type :invoke, :process 3, :f :cancel, :value {:token 9, :task "t"}}
{:index 9, :time 10000, :type :ok, :process 3, :f :cancel, :value {:answer :cancelled-too-late, :occurrence 1, :attempt 2}}
{:index 10, :time 11000, :type :invoke, :process 3, :f :edit, :value {:token 9, :task "t", :due-ms 800, :version 2}}
{:index 11, :time 12000, :type :ok, :process 3, :f :edit, :value {:answer :edited, :due-ms 800}}
{:index 12, :time 13000, :type :invoke, :process 3, :f :edit, :value {:token 9, :task "t", :due-ms 800, :version 2}}
{:index 13, :time 14000, :type :ok, :process 3, :f :edit, :value {:answer :edit-too-late, :occurrence 1, :attempt 2}}
{:index 14, :time 15000, :type :invoke, :process 3, :f :get, :value {:token 9, :task "t"}}
{:index 15, :time 16000, :type :ok, :process 3, :f :get, :value {:answer :found, :due-ms 600, :occurrence 0, :attempt 1, :version 1}}
{:index 16, :time 17000, :type :invoke, :process 3, :f :get, :value {:token 9, :task "t"}}
{:index 17, :time 18000, :type :ok, :process 3, :f :get, :value {:answer :not-found}}
{:index 18, :time 19000, :type :invoke, :process 3, :f :list, :value {:client "c"}}
{:index 19, :time 20000, :type :ok, :process 3, :f :list, :value {:answer :listed, :tasks ["t" "u"]}}
"#;
    assert_eq!(exported(events), expected);
}

#[test]
fn whatever_else_was_seen_is_info_of_who_saw_it() {
    let fence = Fence { term: u64::MAX, seq: 3 };
    let delivery = |effect| Delivery { task: text("t"), due_ms: 600, fence, effect, ..delivery(9, 0) };
    let note = |stage, detail| What::Fault(FaultNote { fault: text("kill"), stage, detail: text(detail) });
    let left = |token, state| What::Left(Left { token, task: text("t"), state });
    let events = vec![
        What::Delivered(delivery(None)),
        What::Delivered(Delivery { accepted: false, dead_letter: true, datagram: true, ..delivery(Some(true)) }),
        note(Stage::Begin, "node \\ 2\u{1}"),
        note(Stage::End, "node 2"),
        note(Stage::Note, ""),
        What::Healed,
        What::Leads { group: 1, node: 2, term: 3 },
        What::Digest { group: 1, replica: 2, node: 3, index: 4, digest: text("d") },
        left(Some(9), LeftAs::Pending { due_ms: 600, occurrence: 1 }),
        left(None, LeftAs::DeadLetter { occurrence: 1, attempts: 3 }),
    ];
    let expected = r#"{:index 0, :time 1000, :type :info, :process :receiver, :f :deliver, :value {:token 9, :task "t", :occurrence 0, :attempt 1, :version 1, :due-ms 600, :fence-term 18446744073709551615N, :fence-seq 3, :accepted true, :dead-letter false, :datagram false}}
{:index 1, :time 2000, :type :info, :process :receiver, :f :deliver, :value {:token 9, :task "t", :occurrence 0, :attempt 1, :version 1, :due-ms 600, :fence-term 18446744073709551615N, :fence-seq 3, :accepted false, :effect true, :dead-letter true, :datagram true}}
{:index 2, :time 3000, :type :info, :process :nemesis, :f :fault, :value {:fault "kill", :stage :begin, :detail "node \\ 2\u0001"}}
{:index 3, :time 4000, :type :info, :process :nemesis, :f :fault, :value {:fault "kill", :stage :end, :detail "node 2"}}
{:index 4, :time 5000, :type :info, :process :nemesis, :f :fault, :value {:fault "kill", :stage :note, :detail ""}}
{:index 5, :time 6000, :type :info, :process :nemesis, :f :healed, :value {}}
{:index 6, :time 7000, :type :info, :process :observer, :f :leads, :value {:group 1, :node 2, :term 3}}
{:index 7, :time 8000, :type :info, :process :observer, :f :digest, :value {:group 1, :replica 2, :node 3, :index 4, :digest "d"}}
{:index 8, :time 9000, :type :info, :process :observer, :f :left, :value {:token 9, :task "t", :state :pending, :occurrence 1, :due-ms 600}}
{:index 9, :time 10000, :type :info, :process :observer, :f :left, :value {:task "t", :state :dead-letter, :occurrence 1, :attempts 3}}
"#;
    assert_eq!(exported(events), expected);
}
