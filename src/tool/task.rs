//! `boomtool task`: register, get, list, cancel.

use std::path::Path;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::args::{Global, List, Register, TaskCommand, millis};
use super::output::{Output, note, payload_into, payload_text, table};
use super::{ToolError, connect, read_input};
use crate::client::{Cancelled, Due, Options, Registration, TaskFilter, TaskView};
use crate::task::{Recurrence, TaskId};
use crate::when::{format_duration, format_instant};

/// What `list` asks for at a time: a page with its payloads has to fit into one frame.
const PAGE_TASKS: u64 = 100;

/// How much of a payload a table shows.
const PAYLOAD_WIDTH: usize = 40;

pub(super) async fn run(command: TaskCommand, global: Global, output: Output) -> Result<(), ToolError> {
    match command {
        TaskCommand::Register(register) => self::register(*register, global, output).await,
        TaskCommand::Get { task_id } => get(task_id, global, output).await,
        TaskCommand::List(list) => self::list(list, global, output).await,
        TaskCommand::Cancel { task_ids } => cancel(task_ids, global, output).await,
    }
}

async fn register(args: Register, global: Global, mut output: Output) -> Result<(), ToolError> {
    // Whatever can be wrong on this side comes before the connection.
    let options = Options {
        callback: args.policy.callback.clone(),
        retry: args.policy.retry()?,
        dead_letter: args.policy.dead_letter.clone(),
        ..global.options()
    };
    let payload = match (&args.payload, &args.file) {
        (_, Some(path)) => read_input(path)?,
        (Some(text), None) if text == "-" => read_input(Path::new("-"))?,
        (text, None) => text.clone().unwrap_or_default().into_bytes(),
    };
    let due = match (args.at, args.delay.or(args.every)) {
        (Some(at_ms), _) => Due::At(at_ms),
        (None, delay) => Due::In(delay.map_or(0, millis)),
    };
    let registration = Registration {
        payload: Bytes::from(payload),
        due,
        recurrence: args.every.map(|every| Recurrence::every(millis(every))),
        ..Default::default()
    };
    let client = connect(options).await?;
    let registered = client.register(registration).await?;
    client.close().await;
    let due = format_instant(registered.due_ms);
    output.line(
        || format!("{}  due {due}  {} ms", registered.task_id, registered.due_ms),
        || json!({ "task_id": registered.task_id.to_string(), "due_ms": registered.due_ms, "due": due }),
    )
}

async fn get(task_id: TaskId, global: Global, mut output: Output) -> Result<(), ToolError> {
    let client = connect(global.options()).await?;
    let task = client.get(task_id).await?;
    client.close().await;
    match task {
        Some(task) => output.line(|| description(&task), || object(&task)),
        None => Err(ToolError::Undone(format!(
            "there is no task {task_id}: it never was, is done, was cancelled, or belongs to another client"
        ))),
    }
}

async fn list(args: List, global: Global, mut output: Output) -> Result<(), ToolError> {
    let client = connect(global.options()).await?;
    let mut left = if args.all { u64::MAX } else { args.limit };
    let mut filter = TaskFilter {
        client_id: args.client_id,
        due_after_ms: args.after,
        due_before_ms: args.before,
        recurring: (args.recurring || args.once).then_some(args.recurring),
        ..Default::default()
    };
    let mut head = true;
    loop {
        filter.limit = u32::try_from(left.min(PAGE_TASKS)).expect("a page is small");
        let mut page = client.list(filter.clone()).await?;
        // A node may have another idea of a page than we asked for.
        let cut = page.tasks.len() as u64 > left;
        page.tasks.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        left -= page.tasks.len() as u64;
        print_page(&page.tasks, head, &mut output)?;
        head = false;
        let more = match page.next_token {
            Some(token) if left > 0 && !cut => {
                if token == filter.token {
                    return Err(ToolError::Undone(format!("the node repeats its page token '{token}'")));
                }
                filter.token = token;
                continue;
            }
            token => cut || token.is_some(),
        };
        if more {
            note(&format!("there are more than {}: --limit N shows more, --all shows all", args.limit));
        }
        client.close().await;
        return Ok(());
    }
}

/// Each page is a table of its own, since the next ones are not known yet; only the first has a head.
fn print_page(tasks: &[TaskView], head: bool, output: &mut Output) -> Result<(), ToolError> {
    if output.json {
        return tasks.iter().try_for_each(|task| output.line(String::new, || object(task)));
    }
    let titles = ["TASK", "CLIENT", "DUE", "EVERY", "ATTEMPT", "CALLBACK", "PAYLOAD"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    rows.extend(tasks.iter().map(|task| {
        vec![
            task.task_id.to_string(),
            task.client_id.clone(),
            format_instant(task.due_ms),
            task.recurrence.map_or("once".into(), |r| format_duration(r.interval_ms)),
            task.attempt.to_string(),
            callback_text(task),
            payload_text(&task.payload, PAYLOAD_WIDTH),
        ]
    }));
    let lines = table(&rows);
    let lines = lines.into_iter().skip(usize::from(!head || tasks.is_empty()));
    lines.into_iter().try_for_each(|line| output.line(|| line, || Value::Null))
}

async fn cancel(task_ids: Vec<TaskId>, global: Global, mut output: Output) -> Result<(), ToolError> {
    let client = connect(global.options()).await?;
    let mut undone = 0;
    for task_id in &task_ids {
        let cancelled = client.cancel(*task_id).await?;
        undone += usize::from(cancelled != Cancelled::Cancelled);
        let id = task_id.to_string();
        match cancelled {
            Cancelled::Cancelled => {
                output.line(|| format!("{id}  cancelled"), || json!({ "task_id": id, "result": "cancelled" }))
            }
            Cancelled::TooLate { occurrence, attempt } => output.line(
                || format!("{id}  too late: attempt {attempt} of occurrence {occurrence} may be out"),
                || json!({ "task_id": id, "result": "too_late", "occurrence": occurrence, "attempt": attempt }),
            ),
            Cancelled::NotFound => {
                output.line(|| format!("{id}  not found"), || json!({ "task_id": id, "result": "not_found" }))
            }
        }?;
    }
    client.close().await;
    match undone {
        0 => Ok(()),
        _ => Err(ToolError::Undone(format!("{undone} of {} tasks were not cancelled", task_ids.len()))),
    }
}

fn callback_text(task: &TaskView) -> String {
    match &task.callback {
        // Endpoints of HTTP are URLs already.
        Some(callback) if callback.endpoint.as_str().contains("://") => callback.endpoint.to_string(),
        Some(callback) => format!("{}://{}", callback.protocol, callback.endpoint),
        None => "-".to_owned(),
    }
}

fn description(task: &TaskView) -> String {
    let every = task.recurrence.map_or("once".into(), |r| format!("every {}", format_duration(r.interval_ms)));
    let rows: Vec<Vec<String>> = [
        ("task", task.task_id.to_string()),
        ("client", task.client_id.clone()),
        ("due", format!("{}  {} ms", format_instant(task.due_ms), task.due_ms)),
        ("first due", format!("{}  {} ms", format_instant(task.first_due_ms), task.first_due_ms)),
        ("repeats", every),
        ("occurrence", task.occurrence.to_string()),
        ("attempt", task.attempt.to_string()),
        ("callback", callback_text(task)),
        ("payload", payload_text(&task.payload, usize::MAX)),
    ]
    .map(|(name, value)| vec![name.to_owned(), value])
    .to_vec();
    table(&rows).join("\n")
}

fn object(task: &TaskView) -> Value {
    let mut object = Map::new();
    for (name, value) in [
        ("task_id", json!(task.task_id.to_string())),
        ("client_id", json!(task.client_id)),
        ("due_ms", json!(task.due_ms)),
        ("due", json!(format_instant(task.due_ms))),
        ("first_due_ms", json!(task.first_due_ms)),
        ("repeat_interval_ms", json!(task.recurrence.map(|r| r.interval_ms))),
        ("occurrence", json!(task.occurrence)),
        ("attempt", json!(task.attempt)),
        ("callback", json!(task.callback.as_ref().map(|_| callback_text(task)))),
    ] {
        object.insert(name.to_owned(), value);
    }
    payload_into(&mut object, &task.payload);
    Value::Object(object)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::super::tests::boomtool;
    use crate::client::fake::{self, Fake};
    use crate::wire::proto::{self, Status, boomerang_envelope::Payload};

    /// A node that stores nothing: it notes requests, and answers like one that works.
    async fn node() -> (String, Arc<Mutex<Vec<Payload>>>) {
        let fake = Fake::start().await;
        let address = fake.address();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        fake.serve(move |request| {
            seen.lock().unwrap().push(request.clone());
            match request {
                Payload::RegistrationRequest(_) => fake::registered(1_896_076_800_000),
                Payload::GetTaskRequest(_) => Payload::GetTaskResponse(proto::GetTaskResponse {
                    task: Some(fake::details(1, b"hello")),
                    ..Default::default()
                }),
                Payload::ListTasksRequest(request) => {
                    // Five tasks in all.
                    let from: u64 = request.next_token.parse().unwrap_or(0);
                    let until = (from + u64::from(request.limit).min(2)).min(5);
                    Payload::ListTasksResponse(proto::ListTasksResponse {
                        tasks: (from..until).map(|n| fake::details(n, &[0xff])).collect(),
                        next_token: if until < 5 { until.to_string() } else { String::new() },
                        ..Default::default()
                    })
                }
                Payload::CancellationRequest(request) => {
                    let late = request.task_id.ends_with('2');
                    let status = if late { Status::TooLate } else { Status::Ok };
                    Payload::CancellationResponse(proto::CancellationResponse {
                        status: status.into(),
                        detail: Some(proto::Detail { occurrence: 3, attempt: 1, ..Default::default() }),
                        ..Default::default()
                    })
                }
                _ => fake::refused(Status::InvalidRequest, "not in this test"),
            }
        });
        (address, requests)
    }

    #[tokio::test]
    async fn register_prints_id_and_due() {
        let (address, requests) = node().await;
        let (printed, result) = boomtool(&format!("task register hello --every 1m --addr {address}")).await;
        result.unwrap();
        let id = fake::task_id(1_896_076_800_000);
        assert_eq!(printed, format!("{id}  due 2030-01-31T08:00:00.000Z  1896076800000 ms\n"));
        let requests = requests.lock().unwrap();
        let Payload::RegistrationRequest(task) = &requests[0] else { panic!("{requests:?}") };
        assert_eq!((task.payload.as_ref(), task.delay_ms, task.repeat_interval_ms), (&b"hello"[..], 60_000, 60_000));
    }

    #[tokio::test]
    async fn register_in_json() {
        let (address, _) = node().await;
        let (printed, result) = boomtool(&format!("task register x --in 1s --json --addr {address}")).await;
        result.unwrap();
        let object: serde_json::Value = serde_json::from_str(&printed).unwrap();
        assert_eq!(object["due_ms"], 1_896_076_800_000u64);
        assert_eq!(object["task_id"], fake::task_id(1_896_076_800_000).to_string());
    }

    #[tokio::test]
    async fn wrong_retries_are_found_before_connecting() {
        let (_, result) = boomtool("task register x --in 1s --attempts 0 --addr 127.0.0.1:1").await;
        assert_eq!(result.unwrap_err().exit_code(), 2);
    }

    #[tokio::test]
    async fn get_shows_everything() {
        let (address, _) = node().await;
        let id = fake::task_id(1);
        let (printed, result) = boomtool(&format!("task get {id} --addr {address}")).await;
        result.unwrap();
        for part in [&id.to_string(), "orders", "tcp://h:1", "\"hello\"", "once"] {
            assert!(printed.contains(part), "{part}: {printed}");
        }
        let (printed, _) = boomtool(&format!("task get {id} --json --addr {address}")).await;
        let object: serde_json::Value = serde_json::from_str(&printed).unwrap();
        assert_eq!((object["payload"].as_str(), object["callback"].as_str()), (Some("hello"), Some("tcp://h:1")));
    }

    #[tokio::test]
    async fn list_follows_pages_up_to_its_limit() {
        let (address, requests) = node().await;
        let (printed, result) = boomtool(&format!("task list --all --addr {address}")).await;
        result.unwrap();
        assert_eq!(printed.lines().count(), 1 + 5, "{printed}");
        assert!(printed.starts_with("TASK "), "{printed}");
        let (printed, result) = boomtool(&format!("task list --limit 3 --json --once --addr {address}")).await;
        result.unwrap();
        assert_eq!(printed.lines().count(), 3);
        assert!(printed.lines().all(|line| line.contains(r#""payload_hex":"ff""#)), "{printed}");
        let requests = requests.lock().unwrap();
        let Payload::ListTasksRequest(last) = requests.last().unwrap() else { panic!("{requests:?}") };
        assert_eq!((last.limit, last.is_recurring, last.next_token.as_str()), (1, Some(false), "2"));
    }

    #[tokio::test]
    async fn cancel_says_what_became_of_each() {
        let (address, _) = node().await;
        let (good, late) = (fake::task_id(1), fake::task_id(2));
        let (printed, result) = boomtool(&format!("task cancel {good} {late} --addr {address}")).await;
        assert_eq!(printed, format!("{good}  cancelled\n{late}  too late: attempt 1 of occurrence 3 may be out\n"));
        let error = result.unwrap_err();
        assert_eq!((error.to_string().as_str(), error.exit_code()), ("1 of 2 tasks were not cancelled", 1));
        let (_, result) = boomtool(&format!("task cancel {good} --addr {address}")).await;
        result.unwrap();
    }
}
