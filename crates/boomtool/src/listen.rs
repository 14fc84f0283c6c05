//! `boomtool listen`: a receiver of all protocols that prints what comes, and sums it up.
//!
//! Lines are written by the handler itself, before the delivery is answered: what was acknowledged was also shown, and
//! a reader that is slow slows the sender down.

use std::net::SocketAddr;
use std::sync::{Arc, MutexGuard};
use std::time::UNIX_EPOCH;

use boomerang_task::locks::Mutex;
use serde_json::{Map, Value, json};
use tokio::sync::Notify;

use super::args::listen::{Listen, StatusArg};
use super::output::{Output, note, payload_into, payload_text};
use super::{Context, ToolError, interrupted};
use boomerang_receiver::{Answer, Handler, Novelty, Received, Receiver, Refusal, Reply, Tally, TallySummary};
use boomerang_task::when::format_instant;
use boomerang_wire::proto::Status;

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
    /// Answered with a failure, on purpose.
    failed: u64,
    /// No deliveries, or without the right signature.
    refused: u64,
    error: Option<ToolError>,
}

/// One of many receivers with the same listener.
struct Ear(Arc<Listener>);

impl Handler for Ear {
    fn take(&self, received: &Received) -> Answer {
        self.0.take(received)
    }

    fn refused(&self, from: SocketAddr, why: &str) {
        self.0.state().refused += 1;
        note(&format!("refused a request from {from}: {why}"));
    }
}

pub(super) async fn run(args: Listen, context: &Context) -> Result<(), ToolError> {
    let listening = |receivers: &[Receiver]| {
        for receiver in receivers {
            note(&format!("listening on {}://{}", receiver.protocol(), receiver.local_addr()));
        }
    };
    run_until(args, context.output.clone(), interrupted(), listening).await
}

async fn run_until(
    args: Listen,
    output: Output,
    stop: impl Future<Output = ()>,
    listening: impl FnOnce(&[Receiver]),
) -> Result<(), ToolError> {
    let state = State { output, tally: Tally::new(OCCURRENCES_MAX), failed: 0, refused: 0, error: None };
    let listener = Arc::new(Listener { args, state: Mutex::new(state), done: Notify::new() });
    let mut receivers = Vec::new();
    for (protocol, address) in listener.args.addresses() {
        let secret = listener.args.secret.clone();
        let receiver = Receiver::listen(protocol, address, secret, Ear(listener.clone())).await;
        receivers.push(receiver.map_err(|source| ToolError::Listen { address: address.to_owned(), source })?);
    }
    listening(&receivers);
    tokio::select! {
        () = listener.done.notified() => {}
        () = stop => {}
    }
    for receiver in receivers {
        receiver.finish().await;
    }
    listener.sum_up()
}

impl Listener {
    fn take(&self, received: &Received) -> Answer {
        let mut state = self.state();
        // More than were asked for: they are left to whoever listens next.
        if self.is_complete(&state) || state.error.is_some() {
            return Reply::Silence.into();
        }
        let failing = self.args.failing();
        let reply = match failing > 0.0 && rand::random::<f64>() < failing {
            true => Reply::Refuse(self.refusal()),
            false => Reply::Accept,
        };
        let novelty = state.tally.record(received);
        if !self.args.quiet {
            let width = self.args.width;
            let shown =
                state.output.line(|| line(received, novelty, &reply, width), || object(received, novelty, &reply));
            if let Err(error) = shown {
                state.error = Some(error);
                self.done.notify_one();
                return Reply::Silence.into();
            }
        }
        state.failed += u64::from(reply != Reply::Accept);
        if self.is_complete(&state) {
            self.done.notify_one();
        }
        Answer { reply, delay: self.args.delay }
    }

    /// What a sender is told whose delivery fails.
    fn refusal(&self) -> Refusal {
        let status = self.args.status.iter().find_map(|status| match status {
            StatusArg::Status(status) => Some(*status),
            StatusArg::Code(_) => None,
        });
        let http_status = self.args.status.iter().find_map(|status| match status {
            StatusArg::Code(code) => Some(*code),
            StatusArg::Status(_) => None,
        });
        Refusal {
            status: status.unwrap_or(Status::Error),
            http_status,
            retry_after: self.args.retry_after,
            ..Refusal::new("refused by boomtool listen, as it was told to")
        }
    }

    fn is_complete(&self, state: &State) -> bool {
        self.args.count.is_some_and(|count| state.tally.deliveries() >= count)
    }

    fn sum_up(&self) -> Result<(), ToolError> {
        let mut state = self.state();
        if let Some(error) = state.error.take() {
            return Err(error);
        }
        let summary = state.tally.summary();
        let text = || summary_text(&summary, state.failed, state.refused);
        let object = || {
            let mut object = json!(summary);
            (object["failed"], object["refused"]) = (json!(state.failed), json!(state.refused));
            object
        };
        if self.args.quiet {
            state.output.line(text, object)?;
        } else {
            note(&if state.output.json { object().to_string() } else { text() });
        }
        match self.args.count {
            Some(count) if !self.is_complete(&state) => {
                Err(ToolError::Undone(format!("ended after {} of {count} deliveries", summary.deliveries)))
            }
            _ => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

fn line(received: &Received, novelty: Novelty, reply: &Reply, width: usize) -> String {
    let lateness = received.lateness_us().map_or("no due instant".into(), |us| format!("{} ms", millis_text(us)));
    let mut line = format!(
        "{}  {lateness:>12}  {:<4}  {}  attempt {}  occurrence {}  fence {}.{}  {}",
        format_instant(arrived_us(received) / 1000),
        received.protocol.to_string(),
        received.task_id,
        received.attempt,
        received.occurrence,
        received.fence.term,
        received.fence.seq,
        payload_text(&received.payload, width),
    );
    if !received.name.is_empty() {
        line.push_str(&format!("  name {}", payload_text(received.name.as_bytes(), width)));
    }
    if let Some(letter) = &received.dead_letter {
        line.push_str(&format!("  DEAD LETTER {}", payload_text(letter.error.as_bytes(), width)));
    }
    line.push_str(match novelty {
        Novelty::New => "",
        Novelty::Duplicate => "  DUPLICATE",
        Novelty::Stale => "  STALE",
    });
    line.push_str(if *reply == Reply::Accept { "" } else { "  FAILED" });
    line
}

fn object(received: &Received, novelty: Novelty, reply: &Reply) -> Value {
    let novelty = match novelty {
        Novelty::New => "new",
        Novelty::Duplicate => "duplicate",
        Novelty::Stale => "stale",
    };
    let letter = received.dead_letter.as_ref();
    let mut object = Map::new();
    for (name, value) in [
        ("arrived_us", json!(arrived_us(received))),
        ("lateness_us", json!(received.lateness_us())),
        ("protocol", json!(received.protocol.to_string())),
        ("task_id", json!(received.task_id.to_string())),
        ("client_id", json!(received.client_id)),
        ("name", json!(received.name)),
        ("attempt", json!(received.attempt)),
        ("occurrence", json!(received.occurrence)),
        ("due_ms", json!(received.due_ms)),
        ("fence_term", json!(received.fence.term)),
        ("fence_seq", json!(received.fence.seq)),
        ("novelty", json!(novelty)),
        ("accepted", json!(*reply == Reply::Accept)),
        ("from", json!(received.from.to_string())),
        ("dead_letter_id", json!(letter.map(|letter| &letter.id))),
        ("dead_letter_error", json!(letter.map(|letter| &letter.error))),
    ] {
        object.insert(name.to_owned(), value);
    }
    if let Some(http) = &received.http {
        let headers = http
            .headers
            .iter()
            .map(|(name, value)| (name.to_string(), json!(String::from_utf8_lossy(value.as_bytes()))));
        let headers: Map<String, Value> = headers.collect();
        let version = format!("{:?}", http.version);
        object.insert(
            "http".into(),
            json!({ "target": http.target, "version": version, "signed": http.signed, "headers": headers }),
        );
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

fn summary_text(summary: &TallySummary, failed: u64, refused: u64) -> String {
    let lateness = &summary.lateness_us;
    let [p50, p90, p99, p999, max] = [lateness.p50, lateness.p90, lateness.p99, lateness.p999, lateness.max]
        .map(|us| format!("{}.{:03}", us / 1000, us % 1000));
    format!(
        "fired {}  deliveries {}  duplicates {} ({} stale)  early {}  failed {failed}  refused {refused}  lateness ms: \
         p50 {p50}  p90 {p90}  p99 {p99}  p999 {p999}  max {max}",
        summary.fired, summary.deliveries, summary.duplicates, summary.stale, summary.early,
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use tokio::net::TcpStream;
    use tokio::sync::oneshot;

    use prost::Message as _;

    use super::super::args::{Cli, Command};
    use super::super::tests::Printed;
    use super::*;
    use boomerang_client::fake::{Peer, task_id};
    use boomerang_wire::proto::{CallbackRequest, Status, boomerang_envelope::Payload};

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
        let output = Output::new(printed.clone(), cli.global.json, false);
        let (address, bound) = oneshot::channel();
        let listening = move |receivers: &[Receiver]| address.send(receivers[0].local_addr()).unwrap();
        let stop = async { stop.await.unwrap_or(()) };
        let running = tokio::spawn(run_until(*args, output, stop, listening));
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
        impl std::io::Write for Closed {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let cli = Cli::try_parse_from(["boomtool", "listen", "--tcp", "127.0.0.1:0"]).unwrap();
        let Command::Listen(args) = cli.command else { unreachable!() };
        let (address, bound) = oneshot::channel();
        let listening = move |receivers: &[Receiver]| address.send(receivers[0].local_addr()).unwrap();
        let output = Output::new(Closed, false, false);
        let running = tokio::spawn(run_until(*args, output, std::future::pending(), listening));
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

    #[tokio::test]
    async fn it_hears_all_protocols_at_once() {
        let line =
            "boomtool listen --tcp 127.0.0.1:0 --grpc 127.0.0.1:0 --http 127.0.0.1:0 --udp 127.0.0.1:0 --count 4";
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Listen(args) = cli.command else { unreachable!() };
        let printed = Printed::default();
        let (addresses, bound) = oneshot::channel();
        let listening = move |receivers: &[Receiver]| {
            addresses.send(receivers.iter().map(Receiver::local_addr).collect::<Vec<_>>()).unwrap();
        };
        let output = Output::new(printed.clone(), false, false);
        let running = tokio::spawn(run_until(*args, output, std::future::pending(), listening));
        let [tcp, grpc, http, udp] = bound.await.unwrap().try_into().unwrap();
        let Payload::CallbackRequest(request) = delivery(1) else { unreachable!() };

        let mut sender = Peer::new(TcpStream::connect(tcp).await.unwrap());
        sender.send(1, delivery(1)).await;
        sender.next().await.unwrap();
        let grpc = format!("http://{grpc}");
        let mut sender =
            boomerang_wire::proto::boomerang_callback_client::BoomerangCallbackClient::connect(grpc).await.unwrap();
        sender.on_task_expired(CallbackRequest { fence_seq: 16, ..request.clone() }).await.unwrap();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let sending = reqwest::Client::new().post(format!("http://{http}/x"));
        let sending = sending.header("X-Boomerang-Task-Id", task_id(2).to_string()).header("X-Boomerang-Name", "n");
        assert_eq!(sending.send().await.unwrap().status(), 204);
        let sender = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        sender.send_to(&request.encode_to_vec(), udp).await.unwrap();

        running.await.unwrap().unwrap();
        let text = printed.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        for (line, protocol, end) in [
            (lines[0], "  tcp   ", "\"hello\""),
            (lines[1], "  grpc  ", "  STALE"),
            (lines[2], "  http  ", "  name \"n\""),
            (lines[3], "  udp   ", "  DUPLICATE"),
        ] {
            assert!(line.contains(protocol) && line.ends_with(end), "{line}");
        }
    }

    #[tokio::test]
    async fn what_is_not_signed_is_refused_and_counted() {
        let line = "boomtool listen --http 127.0.0.1:0 --secret s --quiet --json --status 429 --retry-after 3s";
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Listen(args) = cli.command else { unreachable!() };
        let secret = args.secret.clone().unwrap();
        let printed = Printed::default();
        let (address, bound) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let listening = move |receivers: &[Receiver]| address.send(receivers[0].local_addr()).unwrap();
        let output = Output::new(printed.clone(), true, false);
        let running = tokio::spawn(run_until(*args, output, async { stopped.await.unwrap() }, listening));
        let url = format!("http://{}/", bound.await.unwrap());
        let _ = rustls::crypto::ring::default_provider().install_default();
        let post = || reqwest::Client::new().post(&url).header("X-Boomerang-Task-Id", task_id(1).to_string()).body("x");
        assert_eq!(post().send().await.unwrap().status(), 401);
        let now = std::time::SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let signature = boomerang_receiver::signature::sign(&secret, "m", now, b"x");
        let signed = post().header("webhook-id", "m").header("webhook-timestamp", now.to_string());
        let answer = signed.header("webhook-signature", signature).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.headers()["retry-after"].to_str().unwrap()), (429, "3"));
        stop.send(()).unwrap();
        running.await.unwrap().unwrap();
        let summary: Value = serde_json::from_str(&printed.text()).unwrap();
        assert_eq!((&summary["refused"], &summary["failed"], &summary["fired"]), (&json!(1), &json!(1), &json!(1)));
    }

    #[tokio::test]
    async fn a_part_fails_with_the_status_that_was_named() {
        for (flags, failing) in [("", false), ("--status overloaded", true), ("--fail-rate 0 --status 503", false)] {
            let (_stop, stopped) = oneshot::channel();
            let (mut sender, printed, running) = start(&format!("--count 1 --json {flags}"), stopped).await;
            sender.send(1, delivery(1)).await;
            let Some(Payload::CallbackResponse(response)) = sender.next().await.unwrap().payload else { panic!() };
            let expected = if failing { Status::Overloaded } else { Status::Ok };
            assert_eq!(response.status(), expected, "{flags}");
            running.await.unwrap().unwrap();
            let object: Value = serde_json::from_str(&printed.text()).unwrap();
            assert_eq!(object["accepted"], !failing);
        }
    }

    #[test]
    fn milliseconds_have_a_sign_and_three_decimals() {
        assert_eq!(["+0.482", "-0.001", "+12.000"], [482, -1, 12_000].map(millis_text));
    }
}
