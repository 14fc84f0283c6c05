//! `boomtool bench`: measures a node from outside, by its public protocol.
//!
//! Load and receiver are one process, so that one clock stamps both ends of everything; the node has a clock of its
//! own, which on the same machine is the same. Every bench prints one [`report::Report`]. Exit code 1: something was
//! not acknowledged, was lost, came early, or came twice without a fault.
//!
//! - `args`: flags and their help; `register`, `fire`, `drain`: one file per bench
//! - `failover`: kills nodes of a cluster of its own; `overload`: offers one more than it carries
//! - `local`: nodes of its own, for any bench that is to have them; `cost`: what they counted, and used of the processors
//! - `load`: registers and cancels with many requests under way
//! - `account`: what was acknowledged against what came
//! - `report`, `progress`: what is printed at the end, and meanwhile

mod account;
pub mod args;
mod cost;
mod drain;
mod failover;
mod fire;
mod load;
mod local;
mod overload;
mod progress;
mod register;
mod report;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::{Context, ToolError, interrupted};
use account::{Arrivals, Judgement, Schedule};
use args::{BenchCommand, LoadArgs};
use boomerang_client::{Client, Options};
use boomerang_receiver::{Received, Receiver, Reply};
use boomerang_task::{Callback, CallbackOptions, InstantMs, Invalid, Protocol, TaskId};
use load::{Cancelling, Payloads, Registering, Shape, now_ms};
use local::Nodes;
use progress::Progress;

/// How often the receiver's list is looked at for whether all have come.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How long after the last delivery one more is waited for, which would be a duplicate.
const LINGER: Duration = Duration::from_millis(300);

pub(super) async fn run(command: BenchCommand, context: &Context) -> Result<(), ToolError> {
    let starts_nodes = command.starts_nodes();
    let running = Box::pin(async {
        match command {
            BenchCommand::Register(args) => register::run(args, &context.global).await,
            BenchCommand::Fire(args) => fire::run(args, &context.global).await,
            BenchCommand::Drain(args) => drain::run(args, &context.global).await,
            BenchCommand::Failover(args) => failover::run(args).await,
            BenchCommand::Overload(args) => overload::run(args, &context.global).await,
        }
    });
    let report = tokio::select! {
        report = running => report?,
        // Its nodes would outlive it.
        () = interrupted(), if starts_nodes => return Err(ToolError::Undone("interrupted".into())),
    };
    report.print(&context.output)?;
    report.verdict()
}

/// Connections to the node, and the receiver of what it fires.
struct Bench {
    clients: Vec<Client>,
    shape: Shape,
    receiver: Receiver,
    arrivals: Arc<Arrivals>,
    progress: Arc<Progress>,
    keep: bool,
}

impl Bench {
    /// `expected`: how many deliveries the receiver's list has room for from the start.
    async fn start(args: &LoadArgs, nodes: &Nodes, protocol: Protocol, expected: u64) -> Result<Self, ToolError> {
        let bench = Self::connect(args, nodes.options(), protocol, expected).await?;
        // What nodes of its own hold goes with them.
        Ok(Self { keep: args.keep || nodes.are_own(), ..bench })
    }

    async fn connect(args: &LoadArgs, options: Options, protocol: Protocol, expected: u64) -> Result<Self, ToolError> {
        let arrivals = Arc::new(Arrivals::with_capacity(expected));
        let take = {
            let arrivals = arrivals.clone();
            move |received: &Received| {
                arrivals.take(received);
                Reply::Accept.into()
            }
        };
        let receiver = Receiver::listen(protocol, &args.listen, None, take)
            .await
            .map_err(|source| ToolError::Listen { address: args.listen.clone(), source })?;
        let address = receiver.local_addr();
        let endpoint = match &args.advertise {
            Some(host) => format!("{host}:{}", address.port()),
            None => address.to_string(),
        };
        let callback = callback(protocol, &endpoint)?;
        let progress = Arc::new(Progress::start(args.quiet, arrivals.clone()));
        let inflight = usize::try_from(args.inflight).expect("bounded by its flag");
        // Refusals are counted here.
        let options = Options { callback: Some(callback), inflight_max: inflight, wait_for_room: false, ..options };
        let mut clients = Vec::new();
        for _ in 0..args.connections {
            clients.push(Client::connect(options.clone()).await?);
        }
        let shape = Shape { inflight, batch: 1, keys: false, payloads: Arc::new(Payloads::new(args.payload)) };
        Ok(Self { clients, shape, receiver, arrivals, progress, keep: args.keep })
    }

    fn with_batches(mut self, batch: u32, keys: bool) -> Self {
        self.shape = Shape { batch: u64::from(batch), keys, ..self.shape };
        self
    }

    async fn register(&self, phase: &'static str, tasks: u64, schedule: Schedule) -> Registering {
        self.progress.phase(phase, tasks);
        load::register(&self.clients, &self.shape, tasks, schedule, &self.progress).await
    }

    /// Waits until all of these have come, at most until `wait` after the last of them is due.
    async fn wait(&self, acknowledged: &[(TaskId, InstantMs)], wait: Duration) -> Judgement {
        self.progress.phase("waiting for deliveries", 0);
        let last_due_ms = acknowledged.iter().map(|(_, due_ms)| *due_ms).max().unwrap_or(0);
        let left = Duration::from_millis(last_due_ms.saturating_sub(now_ms())) + wait;
        let deadline = Instant::now() + left;
        let mut seen = 0;
        while Instant::now() < deadline {
            let arrived = self.arrivals.len();
            // The lists are compared only when that can have a new result, for it takes its time.
            if arrived >= acknowledged.len() && arrived > seen || acknowledged.is_empty() {
                seen = arrived;
                if self.arrivals.judge(acknowledged).lost.is_empty() {
                    tokio::time::sleep(LINGER).await;
                    break;
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.arrivals.judge(acknowledged)
    }

    /// Cancels what is left, unless it is to stay, and hangs up. The receiver is the last to go.
    async fn finish(self, left: Vec<TaskId>) -> Value {
        let cancelling = if self.keep {
            None
        } else {
            self.progress.phase("cancelling what is left", left.len() as u64);
            Some(load::cancel(&self.clients, left, &self.progress).await)
        };
        for client in self.clients {
            client.close().await;
        }
        self.receiver.finish().await;
        match cancelling {
            Some(Cancelling { cancelled, too_late, not_found, failures }) => json!({
                "cancelled": cancelled, "too_late": too_late, "not_found": not_found, "failures": failures
            }),
            None => Value::Null,
        }
    }
}

/// The receiver as the node is to reach it.
fn callback(protocol: Protocol, endpoint: &str) -> Result<Callback, Invalid> {
    match protocol {
        Protocol::Http => Callback::new(protocol, &format!("http://{endpoint}/")),
        // Otherwise sent would be all that is known, and what is lost would never be tried again.
        Protocol::Udp => {
            Callback::new(protocol, endpoint)?.with(CallbackOptions { acknowledge: true, ..CallbackOptions::default() })
        }
        Protocol::Tcp | Protocol::Grpc => Callback::new(protocol, endpoint),
    }
}

/// The configuration of a bench with a load: the load, the nodes it goes to, and what is the bench's own.
fn configuration(load: &LoadArgs, nodes: Map<String, Value>, own: Value) -> Value {
    let mut all = json!({
        "connections": load.connections,
        "inflight": load.inflight,
        "payload_bytes": load.payload,
        "keep": load.keep,
    });
    if let Value::Object(all) = &mut all {
        all.extend(nodes);
    }
    if let (Value::Object(all), Value::Object(own)) = (&mut all, own) {
        all.extend(own);
    }
    all
}

#[cfg(test)]
mod tests {
    use boomerang_task::locks::Mutex;
    use std::collections::BTreeSet;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use serde_json::Value;

    use super::super::tests::boomtool;
    use super::{Protocol, callback};
    use boomerang_client::fake::{self, Fake};
    use boomerang_wire::proto::{self, Status, boomerang_envelope::Payload};

    /// A node that stores nothing and fires nothing; it refuses the registration with this number for good.
    async fn node(refused: u64) -> String {
        node_that_refuses(refused, Status::Error).await
    }

    async fn node_that_refuses(refused: u64, status: Status) -> String {
        let fake = Fake::start().await;
        let address = fake.address();
        let registered = AtomicU64::new(0);
        let answer = move |task: &proto::Task| match registered.fetch_add(1, Ordering::Relaxed) {
            number if number == refused => proto::RegistrationResponse {
                status: status.into(),
                error_message: "not now".into(),
                ..Default::default()
            },
            number => proto::RegistrationResponse {
                task_id: fake::task_id(number).to_string(),
                scheduled_time_ms: task.due_ms + 3_600_000 * u64::from(task.due_ms == 0),
                ..Default::default()
            },
        };
        fake.serve(move |request| match request {
            Payload::RegistrationRequest(task) => Payload::RegistrationResponse(answer(&task)),
            Payload::RegistrationBatch(batch) => {
                let responses = batch.tasks.iter().map(&answer).collect();
                Payload::RegistrationBatchResponse(proto::RegistrationBatchResponse { responses, ..Default::default() })
            }
            Payload::CancellationBatch(batch) => cancelled(&batch),
            _ => fake::refused(Status::InvalidRequest, "not in this test"),
        });
        address
    }

    fn cancelled(batch: &proto::CancellationBatch) -> Payload {
        let responses = vec![proto::CancellationResponse::default(); batch.task_ids.len()];
        Payload::CancellationBatchResponse(proto::CancellationBatchResponse { responses, ..Default::default() })
    }

    /// The fake serves one connection at a time.
    async fn bench(line: &str, address: &str) -> (Value, Result<(), String>) {
        let line = format!("bench {line} --connections 1 --inflight 8 --quiet --json --addr {address}");
        let (printed, result) = boomtool(&line).await;
        (serde_json::from_str(&printed).unwrap(), result.map_err(|error| error.to_string()))
    }

    #[tokio::test]
    async fn register_counts_answers_and_cleans_up() {
        let (report, result) = bench("register --tasks 50", &node(u64::MAX).await).await;
        result.unwrap();
        assert_eq!((report["sent"].as_u64(), report["acknowledged"].as_u64()), (Some(50), Some(50)));
        assert!(report["latency_us"]["p50"].as_u64().unwrap() > 0 && report["per_second"].as_f64().unwrap() > 0.0);
        assert_eq!(report["cleaned_up"]["cancelled"], 50);
        assert_eq!(
            (&report["configuration"]["delay_ms"], &report["configuration"]["payload_bytes"]),
            (&3_600_000.into(), &100.into())
        );

        let overloaded = node_that_refuses(7, Status::Overloaded).await;
        let (report, result) = bench("register --tasks 50", &overloaded).await;
        result.unwrap();
        assert_eq!((report["sent"].as_u64(), report["acknowledged"].as_u64()), (Some(51), Some(50)), "sent again");
        assert_eq!((report["refused"].as_u64(), report["cleaned_up"]["cancelled"].as_u64()), (Some(1), Some(50)));

        let (report, result) = bench("register --tasks 50 --keep", &node(7).await).await;
        assert_eq!(result.unwrap_err(), "1 of 50 were not acknowledged");
        assert_eq!(report["failures"]["ERROR: not now"], 1);
        assert!(report["cleaned_up"].is_null());
    }

    #[tokio::test]
    async fn batches_are_counted_by_their_tasks() {
        let (report, result) = bench("register --tasks 50 --batch 8", &node(7).await).await;
        assert_eq!(result.unwrap_err(), "1 of 50 were not acknowledged");
        assert_eq!((report["sent"].as_u64(), report["acknowledged"].as_u64()), (Some(50), Some(49)));
        assert_eq!(
            (&report["failures"]["ERROR: not now"], &report["cleaned_up"]["cancelled"]),
            (&1.into(), &49.into())
        );
        assert_eq!(report["configuration"]["batch"], 8);
    }

    #[tokio::test]
    async fn each_task_has_a_key_of_its_own_where_that_is_asked_for() {
        for (flag, keys) in [("", 1), ("--keys", 40)] {
            let fake = Fake::start().await;
            let address = fake.address();
            let seen = Arc::new(Mutex::new(BTreeSet::new()));
            let kept = seen.clone();
            fake.serve(move |request| match request {
                Payload::RegistrationRequest(task) => {
                    kept.lock().insert(task.dedup_key);
                    fake::registered(1_896_076_800_000)
                }
                Payload::CancellationBatch(batch) => cancelled(&batch),
                _ => fake::refused(Status::InvalidRequest, "not in this test"),
            });
            let (report, result) = bench(&format!("register --tasks 40 {flag}"), &address).await;
            result.unwrap();
            assert_eq!((seen.lock().len(), report["configuration"]["keys"].as_bool()), (keys, Some(keys > 1)));
            assert_eq!(report["slices"].as_array().unwrap().len(), 10);
        }
    }

    #[tokio::test]
    async fn a_flag_for_nodes_of_its_own_needs_some() {
        for (flag, said) in
            [("--shards 4", "--shards"), ("--boomerang b", "--boomerang"), ("--node-flag x", "--node-flag")]
        {
            let (_, result) = boomtool(&format!("bench register --tasks 1 {flag}")).await;
            let error = result.unwrap_err();
            let text = format!("{said}: is for nodes that the bench starts; say with --nodes how many");
            assert_eq!((error.to_string(), error.exit_code()), (text, 2));
        }
        let (_, result) = boomtool("bench drain --nodes 1 --boomerang /nowhere/boomerang --quiet").await;
        assert!(result.unwrap_err().to_string().starts_with("cannot start /nowhere/boomerang: "));
    }

    #[test]
    fn receivers_are_named_as_the_node_reaches_them() {
        assert_eq!(callback(Protocol::Http, "h:1").unwrap().endpoint.as_str(), "http://h:1/");
        assert!(callback(Protocol::Udp, "h:1").unwrap().options.acknowledge);
        assert_eq!(callback(Protocol::Grpc, "h:1").unwrap().endpoint.as_str(), "h:1");
    }

    #[tokio::test]
    async fn what_does_not_come_is_lost_and_taken_back() {
        for line in [
            "fire --tasks 5 --spread 1ms --lead 0s --wait 0s --pending 20 --protocol udp",
            "drain --tasks 5 --lead 0s --wait 0s",
        ] {
            let (report, result) = bench(line, &node(u64::MAX).await).await;
            assert_eq!(result.unwrap_err(), "5 of 5 acknowledged were lost", "{line}");
            assert_eq!((report["fired"].as_u64(), report["lost"].as_u64()), (Some(0), Some(5)), "{line}");
            let pending = report["configuration"]["pending"].as_u64().unwrap_or(0);
            assert_eq!(report["cleaned_up"]["cancelled"], 5 + pending, "{line}");
        }
    }
}
