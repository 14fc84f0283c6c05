//! `boomtool listen`: a receiver that prints what comes, and sums it up.
//!
//! Lines are written by the handler itself, before the delivery is answered: what was acknowledged was also shown, and a
//! reader that is slow slows the sender down.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::UNIX_EPOCH;

use serde_json::{Map, Value, json};
use tokio::sync::Notify;

use super::ToolError;
use super::args::{Listen, StatusArg};
use super::output::{Output, note, payload_into, payload_text};
use crate::client::{Answer, Received, Receiver, Reply, Tally, TallySummary};
use crate::when::format_instant;

/// For telling duplicates; about 100 MB when it is full.
const OCCURRENCES_MAX: usize = 1_000_000;

struct Listener {
    args: Listen,
    state: Mutex<State>,
    /// The count is reached, or nobody reads the output.
    done: Notify,
}

struct State {
    output: Output,
    tally: Tally,
    failed: Option<ToolError>,
}

pub(super) async fn run(args: Listen, output: Output) -> Result<(), ToolError> {
    let stop = async {
        match interrupted().await {
            Ok(()) => {}
            // Without a handler Ctrl-C ends the process by itself, only without a summary.
            Err(_) => std::future::pending().await,
        }
    };
    run_until(args, output, stop, |address| note(&format!("listening on {address}"))).await
}

/// Ctrl-C, or a polite request to end.
async fn interrupted() -> io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result,
        _ = terminate.recv() => Ok(()),
    }
}

async fn run_until(
    args: Listen,
    output: Output,
    stop: impl Future<Output = ()>,
    listening: impl FnOnce(std::net::SocketAddr),
) -> Result<(), ToolError> {
    let state = State { output, tally: Tally::new(OCCURRENCES_MAX), failed: None };
    let listener = Arc::new(Listener { args, state: Mutex::new(state), done: Notify::new() });
    let handler = {
        let listener = listener.clone();
        move |received: &Received| listener.take(received)
    };
    let receiver = Receiver::bind(&listener.args.tcp, handler)
        .await
        .map_err(|source| ToolError::Listen { address: listener.args.tcp.clone(), source })?;
    listening(receiver.local_addr());
    tokio::select! {
        () = listener.done.notified() => {}
        () = stop => {}
    }
    receiver.finish().await;
    listener.sum_up()
}

impl Listener {
    fn take(&self, received: &Received) -> Answer {
        let mut state = self.state();
        // More than were asked for: they are left to whoever listens next.
        if self.is_complete(&state) || state.failed.is_some() {
            return Reply::Silence.into();
        }
        if !self.args.quiet {
            let width = self.args.width;
            if let Err(error) = state.output.line(|| line(received, width), || object(received)) {
                state.failed = Some(error);
                self.done.notify_one();
                return Reply::Silence.into();
            }
        }
        state.tally.record(received);
        if self.is_complete(&state) {
            self.done.notify_one();
        }
        let reply = match self.args.status {
            StatusArg::Ok => Reply::Accept,
            StatusArg::Error => Reply::refuse("refused by boomtool listen --status error"),
        };
        Answer { reply, delay: self.args.delay }
    }

    fn is_complete(&self, state: &State) -> bool {
        self.args.count.is_some_and(|count| state.tally.deliveries() >= count)
    }

    fn sum_up(&self) -> Result<(), ToolError> {
        let mut state = self.state();
        if let Some(error) = state.failed.take() {
            return Err(error);
        }
        let summary = state.tally.summary();
        if self.args.quiet {
            state.output.line(|| summary_text(&summary), || json!(summary))?;
        } else {
            note(&if state.output.json { json!(summary).to_string() } else { summary_text(&summary) });
        }
        match self.args.count {
            Some(count) if !self.is_complete(&state) => {
                Err(ToolError::Undone(format!("ended after {} of {count} deliveries", summary.deliveries)))
            }
            _ => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under this lock")
    }
}

fn line(received: &Received, width: usize) -> String {
    let lateness = received.lateness_us().map_or("no due instant".into(), |us| format!("{} ms", millis_text(us)));
    format!(
        "{}  {lateness:>12}  {}  attempt {}  occurrence {}  fence {}.{}  {}",
        format_instant(arrived_us(received) / 1000),
        received.task_id,
        received.attempt,
        received.occurrence,
        received.fence.term,
        received.fence.seq,
        payload_text(&received.payload, width),
    )
}

fn object(received: &Received) -> Value {
    let mut object = Map::new();
    for (name, value) in [
        ("arrived_us", json!(arrived_us(received))),
        ("lateness_us", json!(received.lateness_us())),
        ("task_id", json!(received.task_id.to_string())),
        ("client_id", json!(received.client_id)),
        ("attempt", json!(received.attempt)),
        ("occurrence", json!(received.occurrence)),
        ("due_ms", json!(received.due_ms)),
        ("fence_term", json!(received.fence.term)),
        ("fence_seq", json!(received.fence.seq)),
    ] {
        object.insert(name.to_owned(), value);
    }
    payload_into(&mut object, &received.payload);
    Value::Object(object)
}

fn arrived_us(received: &Received) -> u64 {
    let since = received.arrived_at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Microseconds as milliseconds with 3 decimals, always with a sign.
fn millis_text(us: i64) -> String {
    let sign = if us < 0 { '-' } else { '+' };
    format!("{sign}{}.{:03}", us.unsigned_abs() / 1000, us.unsigned_abs() % 1000)
}

fn summary_text(summary: &TallySummary) -> String {
    let lateness = &summary.lateness_us;
    let [p50, p90, p99, p999, max] = [lateness.p50, lateness.p90, lateness.p99, lateness.p999, lateness.max]
        .map(|us| format!("{}.{:03}", us / 1000, us % 1000));
    format!(
        "fired {}  deliveries {}  duplicates {}  early {}  lateness ms: p50 {p50}  p90 {p90}  p99 {p99}  p999 {p999}  \
         max {max}",
        summary.fired, summary.deliveries, summary.duplicates, summary.early,
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use tokio::net::TcpStream;
    use tokio::sync::oneshot;

    use super::super::args::{Cli, Command};
    use super::super::tests::Printed;
    use super::*;
    use crate::client::fake::{Peer, task_id};
    use crate::wire::proto::{CallbackRequest, Status, boomerang_envelope::Payload};

    fn delivery(random: u64) -> Payload {
        Payload::CallbackRequest(CallbackRequest {
            task_id: task_id(random).to_string(),
            payload: "hello".into(),
            attempt: 1,
            due_ms: 1_700_000_000_000,
            fence_term: 2,
            fence_seq: 17,
            ..Default::default()
        })
    }

    /// Starts `listen` with these flags; gives a sender, and what becomes of it when `stop` fires.
    async fn start(
        flags: &str,
        stop: oneshot::Receiver<()>,
    ) -> (Peer, Printed, tokio::task::JoinHandle<Result<(), ToolError>>) {
        let line = format!("boomtool listen --tcp 127.0.0.1:0 {flags}");
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Listen(args) = cli.command else { unreachable!() };
        let printed = Printed::default();
        let output = Output::new(printed.clone(), cli.global.json);
        let (address, bound) = oneshot::channel();
        let listening = move |bound| address.send(bound).unwrap();
        let stop = async { stop.await.unwrap_or(()) };
        let running = tokio::spawn(run_until(args, output, stop, listening));
        let sender = Peer::new(TcpStream::connect(bound.await.unwrap()).await.unwrap());
        (sender, printed, running)
    }

    #[tokio::test]
    async fn it_prints_answers_and_ends_after_its_count() {
        let (_stop, stopped) = oneshot::channel();
        let (mut sender, printed, running) = start("--count 2", stopped).await;
        for request_id in [1, 2] {
            sender.send(request_id, delivery(request_id)).await;
            let answer = sender.next().await.unwrap();
            let Some(Payload::CallbackResponse(response)) = answer.payload else { panic!("no answer") };
            assert_eq!((answer.request_id, response.status()), (request_id, Status::Ok));
        }
        running.await.unwrap().unwrap();
        let text = printed.text();
        assert_eq!(text.lines().count(), 2);
        for part in [&task_id(1).to_string(), "attempt 1", "occurrence 0", "fence 2.17", "\"hello\"", " ms  "] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[tokio::test]
    async fn quiet_prints_the_summary_only() {
        let (_stop, stopped) = oneshot::channel();
        let (mut sender, printed, running) = start("--count 2 --quiet --json --status error", stopped).await;
        for request_id in [1, 2] {
            sender.send(request_id, delivery(7)).await;
            let answer = sender.next().await.unwrap();
            let Some(Payload::CallbackResponse(response)) = answer.payload else { panic!("no answer") };
            assert_eq!(response.status(), Status::Error);
        }
        running.await.unwrap().unwrap();
        let summary: Value = serde_json::from_str(&printed.text()).unwrap();
        assert_eq!((&summary["fired"], &summary["duplicates"], &summary["early"]), (&json!(1), &json!(1), &json!(0)));
        assert!(summary["lateness_us"]["p999"].as_u64().unwrap() > 0, "{summary}");
    }

    #[tokio::test]
    async fn an_interruption_sums_up_and_a_missed_count_fails() {
        for (flags, good) in [("--json", true), ("--json --count 5", false)] {
            let (stop, stopped) = oneshot::channel();
            let (mut sender, printed, running) = start(flags, stopped).await;
            sender.send(1, delivery(1)).await;
            sender.next().await.unwrap();
            stop.send(()).unwrap();
            let result = running.await.unwrap();
            assert_eq!(result.is_ok(), good, "{flags}: {result:?}");
            let object: Value = serde_json::from_str(&printed.text()).unwrap();
            assert_eq!((&object["payload"], &object["fence_seq"]), (&json!("hello"), &json!(17)));
        }
    }

    #[tokio::test]
    async fn a_closed_pipe_ends_it_without_an_answer() {
        struct Closed;
        impl io::Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let cli = Cli::try_parse_from(["boomtool", "listen", "--tcp", "127.0.0.1:0"]).unwrap();
        let Command::Listen(args) = cli.command else { unreachable!() };
        let (address, bound) = oneshot::channel();
        let listening = move |bound| address.send(bound).unwrap();
        let running = tokio::spawn(run_until(args, Output::new(Closed, false), std::future::pending(), listening));
        let mut sender = Peer::new(TcpStream::connect(bound.await.unwrap()).await.unwrap());
        sender.send(1, delivery(1)).await;
        assert!(sender.next().await.is_none(), "what was not shown is not acknowledged");
        assert_eq!(running.await.unwrap().unwrap_err().exit_code(), 0);
    }

    #[tokio::test]
    async fn a_taken_address_is_explained() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let line = format!("listen --tcp {}", taken.local_addr().unwrap());
        let error = super::super::tests::boomtool(&line).await.1.unwrap_err();
        assert!(error.to_string().starts_with("cannot listen on 127.0.0.1:"), "{error}");
        assert!(error.hint().unwrap().contains("port 0"));
    }

    #[test]
    fn milliseconds_have_a_sign_and_three_decimals() {
        assert_eq!(["+0.482", "-0.001", "+12.000"], [482, -1, 12_000].map(millis_text));
    }
}
