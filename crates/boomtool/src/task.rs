//! `boomtool task`: register, get, list, update, pause, resume, cancel.

use std::collections::BTreeSet;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use super::args::millis;
use super::args::task::{Get, List, Register, TaskCommand, TaskIds, Update};
use super::output::{note, table};
use super::show::{
    TASK_TITLES, due_text, failure_text, history_table, outcome_name, past_object, state_text, task_object, task_row,
    task_text,
};
use super::watch::{Board, Row, again, look_again};
use super::{Context, ToolError, batch, interrupted};
use boomerang_client::{
    Cancelled, Client, Due, PastOccurrence, Registered, TaskFilter, TaskHistory, TaskUpdate, TaskView, Updated,
};
use boomerang_task::when::format_instant;
use boomerang_task::{Invalid, TaskId};

/// What `list` asks for at a time: a page with its payloads has to fit into one frame.
const PAGE_TASKS: u64 = 100;

pub(super) async fn run(command: TaskCommand, context: &Context) -> Result<(), ToolError> {
    match command {
        TaskCommand::Register(args) => match &args.batch {
            Some(path) => batch::run(path, &args.spec, context).await,
            None => register(*args, context).await,
        },
        TaskCommand::Get(args) => get(args, context, interrupted()).await,
        TaskCommand::List(args) => list(args, context, interrupted()).await,
        TaskCommand::Update(args) => update(*args, context).await,
        TaskCommand::Pause(args) => set_paused(args, true, context).await,
        TaskCommand::Resume(args) => set_paused(args, false, context).await,
        TaskCommand::Cancel(args) => cancel(args, context).await,
    }
}

/// A payload from an argument or a file, if any of them was given.
fn payload(text: Option<&str>, file: Option<&Path>, context: &Context) -> Result<Option<Bytes>, ToolError> {
    let bytes = match (text, file) {
        (_, Some(path)) => context.read_input(path)?,
        (Some("-"), None) => context.read_input(Path::new("-"))?,
        (Some(text), None) => text.as_bytes().to_vec(),
        (None, None) => return Ok(None),
    };
    Ok(Some(bytes.into()))
}

async fn register(args: Register, context: &Context) -> Result<(), ToolError> {
    // Whatever can be wrong on this side comes before the connection.
    args.spec.registration(Bytes::new())?;
    let payload = payload(args.payload.as_deref(), args.file.as_deref(), context)?.unwrap_or_default();
    let registration = args.spec.registration(payload)?;
    let client = context.connect().await?;
    let registered = client.register(registration).await?;
    context.hang_up(client).await;
    context.output.line(|| registered_text(&registered), || registered_object(&registered))
}

pub(super) fn registered_text(registered: &Registered) -> String {
    let Registered { task_id, due_ms, duplicate } = registered;
    let known = if *duplicate { "  known by its key" } else { "" };
    format!("{task_id}  due {}  {due_ms} ms{known}", format_instant(*due_ms))
}

pub(super) fn registered_object(registered: &Registered) -> Value {
    let Registered { task_id, due_ms, duplicate } = registered;
    let due = format_instant(*due_ms);
    json!({ "task_id": task_id.to_string(), "due_ms": due_ms, "due": due, "duplicate": duplicate })
}

/// Not there now, and nothing is known of it.
fn missing(task_id: TaskId) -> ToolError {
    ToolError::Undone(format!("there is no task {task_id}: it never was, ended long ago, or belongs to another client"))
}

async fn get(args: Get, context: &Context, stop: impl Future<Output = ()>) -> Result<(), ToolError> {
    let client = context.connect().await?;
    if let Some(every) = args.watch {
        watch_one(&client, args.task_id, every, context, stop).await?;
    } else {
        let found = client.get_with_history(args.task_id).await?;
        let found = found.filter(|found| found.task.is_some() || !found.past.is_empty());
        let found = found.ok_or_else(|| missing(args.task_id))?;
        context
            .output
            .line(|| found_text(args.task_id, &found), || found_object(args.task_id, &found, args.history))?;
    }
    context.hang_up(client).await;
    Ok(())
}

fn found_text(task_id: TaskId, found: &TaskHistory) -> String {
    let mut text = match &found.task {
        Some(task) => task_text(task),
        None => ended_text(task_id, &found.past),
    };
    if !found.past.is_empty() {
        text.push_str("\n\n");
        text.push_str(&history_table(&found.past).join("\n"));
    }
    text
}

fn found_object(task_id: TaskId, found: &TaskHistory, history: bool) -> Value {
    let mut object = match &found.task {
        Some(task) => task_object(task),
        None => [("task_id".to_owned(), json!(task_id.to_string()))].into_iter().collect(),
    };
    object.insert("ended".into(), json!(found.task.is_none()));
    // Of a task that has ended, there is nothing else to say.
    if history || found.task.is_none() {
        object.insert("history".into(), found.past.iter().map(past_object).collect());
    }
    Value::Object(object)
}

/// How a task ended, as far as is known: its latest occurrence says so.
fn ended_text(task_id: TaskId, past: &[PastOccurrence]) -> String {
    match past.first() {
        Some(last) => {
            let failure =
                last.failure.as_ref().map(|failure| format!(" ({})", failure_text(failure))).unwrap_or_default();
            let (outcome, at) = (outcome_name(last.outcome), format_instant(last.ended_ms));
            format!("{task_id}  ended: {outcome}{failure} at {at}")
        }
        None => format!("{task_id}  ended"),
    }
}

/// Shows a task until it is gone, and then how it ended.
async fn watch_one(
    client: &Client,
    task_id: TaskId,
    every: Duration,
    context: &Context,
    stop: impl Future<Output = ()>,
) -> Result<(), ToolError> {
    let mut stop = pin!(stop);
    let mut board =
        Board::new(&context.output, &["TASK", "STATE", "VERSION", "DUE", "OCCURRENCE", "ATTEMPT"], "task_id");
    let mut seen = false;
    loop {
        match client.get_with_history(task_id).await {
            Ok(Some(TaskHistory { task: Some(task), past })) => {
                seen = true;
                let history = if past.is_empty() { Vec::new() } else { history_table(&past) };
                let (about, below) = if board.is_drawn() { (task_text(&task), history) } else { Default::default() };
                board.show(&about, vec![one_row(&task)], &below)?;
            }
            Ok(found) => {
                let past = found.map(|found| found.past).unwrap_or_default();
                if past.is_empty() && !seen {
                    return Err(missing(task_id));
                }
                let ended = TaskHistory { task: None, past };
                let text = || ended_text(task_id, &ended.past);
                return context.output.line(text, || found_object(task_id, &ended, true));
            }
            Err(error) if look_again(&error) => {}
            Err(error) => return Err(error.into()),
        }
        if !again(every, stop.as_mut()).await {
            return Ok(());
        }
    }
}

fn one_row(task: &TaskView) -> Row {
    let mut cells = vec![
        task.task_id.to_string(),
        state_text(task.state).to_owned(),
        task.version.to_string(),
        due_text(task.due_ms),
        task.occurrence.to_string(),
        task.attempt.to_string(),
    ];
    if let Some(last) = cells.last_mut()
        && let Some(failure) = &task.last_failure
    {
        last.push_str(&format!("  after {}", failure_text(failure)));
    }
    Row { key: task.task_id.to_string(), cells, object: Value::Object(task_object(task)) }
}

async fn list(args: List, context: &Context, stop: impl Future<Output = ()>) -> Result<(), ToolError> {
    let client = context.connect().await?;
    match args.watch {
        Some(every) => watch_many(&client, &args, every, context, stop).await?,
        None => {
            let mut head = true;
            let more = each_page(&client, &args, |page| {
                let first = head;
                // A page may be empty and yet not be the last one.
                head &= page.is_empty();
                print_page(&page, first, context)
            })
            .await?;
            if more {
                note(&format!("there are more than {}: --limit N shows more, --all shows all", args.limit));
            }
        }
    }
    context.hang_up(client).await;
    Ok(())
}

/// Calls `take` with each page until the limit; true when there is more beyond it.
async fn each_page(
    client: &Client,
    args: &List,
    mut take: impl FnMut(Vec<TaskView>) -> Result<(), ToolError>,
) -> Result<bool, ToolError> {
    let mut left = if args.all { u64::MAX } else { args.limit };
    let mut filter = TaskFilter {
        client_id: args.client_id.clone(),
        due_after_ms: args.after,
        due_before_ms: args.before,
        recurring: (args.recurring || args.once).then_some(args.recurring),
        state: args.state.map(Into::into),
        name_prefix: args.name_prefix.clone(),
        label_prefix: args.label.as_ref().map(|(key, value)| format!("{key}={value}")).unwrap_or_default(),
        ..Default::default()
    };
    loop {
        filter.limit = u32::try_from(left.min(PAGE_TASKS)).expect("a page is small");
        let mut page = client.list(filter.clone()).await?;
        // A node may have another idea of a page than we asked for.
        let cut = page.tasks.len() as u64 > left;
        page.tasks.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        left -= page.tasks.len() as u64;
        take(page.tasks)?;
        match page.next_token {
            Some(token) if left > 0 && !cut => {
                if token == filter.token {
                    return Err(ToolError::Undone(format!("the node repeats its page token '{token}'")));
                }
                filter.token = token;
            }
            token => return Ok(cut || token.is_some()),
        }
    }
}

/// Each page is a table of its own, since the next ones are not known yet; only the first has a head.
fn print_page(tasks: &[TaskView], head: bool, context: &Context) -> Result<(), ToolError> {
    let output = &context.output;
    if output.json {
        return tasks.iter().try_for_each(|task| output.line(String::new, || Value::Object(task_object(task))));
    }
    let mut rows = vec![TASK_TITLES.map(str::to_owned).to_vec()];
    rows.extend(tasks.iter().map(task_row));
    let lines = table(&rows);
    let mut lines = lines.into_iter().skip(usize::from(!head || tasks.is_empty()));
    lines.try_for_each(|line| output.line(|| line, || Value::Null))
}

async fn watch_many(
    client: &Client,
    args: &List,
    every: Duration,
    context: &Context,
    stop: impl Future<Output = ()>,
) -> Result<(), ToolError> {
    let mut stop = pin!(stop);
    let mut board = Board::new(&context.output, &TASK_TITLES, "task_id");
    loop {
        let mut tasks = Vec::new();
        let listed = each_page(client, args, |page| {
            tasks.extend(page);
            Ok(())
        });
        match listed.await {
            Ok(more) => {
                // One that moved from a page to the next was listed twice.
                let mut ids = BTreeSet::new();
                tasks.retain(|task| ids.insert(task.task_id));
                let about = format!("{} tasks{}, Ctrl-C ends", ids.len(), if more { " and more" } else { "" });
                let rows = tasks.iter().map(|task| Row {
                    key: task.task_id.to_string(),
                    cells: task_row(task),
                    object: Value::Object(task_object(task)),
                });
                board.show(&about, rows.collect(), &[])?;
            }
            Err(ToolError::Client(error)) if look_again(&error) => {}
            Err(error) => return Err(error),
        }
        if !again(every, stop.as_mut()).await {
            return Ok(());
        }
    }
}

async fn update(args: Update, context: &Context) -> Result<(), ToolError> {
    let due = args.at.map(Due::At).or(args.delay.map(|delay| Due::In(millis(delay))));
    let update = TaskUpdate {
        expected_version: args.if_version,
        due,
        payload: payload(args.payload.as_deref(), args.file.as_deref(), context)?,
        settings: args.policy.settings()?,
    };
    if due.is_none() && update.payload.is_none() && update.settings == Default::default() {
        return Err(
            Invalid::new("nothing is to be changed: name --in, --at, --payload, --file or a delivery flag").into()
        );
    }
    let client = context.connect().await?;
    let updated = client.update(args.task_id, update).await?;
    context.hang_up(client).await;
    let id = args.task_id.to_string();
    let output = &context.output;
    let why = match updated {
        Updated::Updated { version, due_ms } => {
            let due = due_text(due_ms);
            return output.line(
                || format!("{id}  updated to version {version}  due {due}  {due_ms} ms"),
                || json!({ "task_id": id, "result": "updated", "version": version, "due_ms": due_ms, "due": due }),
            );
        }
        Updated::TooLate { occurrence, attempt } => {
            output.line(
                || format!("{id}  too late: attempt {attempt} of occurrence {occurrence} may be out"),
                || json!({ "task_id": id, "result": "too_late", "occurrence": occurrence, "attempt": attempt }),
            )?;
            "an attempt may be out"
        }
        Updated::Conflict { version } => {
            output.line(
                || format!("{id}  conflict: it has version {version} now"),
                || json!({ "task_id": id, "result": "conflict", "version": version }),
            )?;
            "somebody else has changed it"
        }
        Updated::NotFound => {
            output.line(|| format!("{id}  not found"), || json!({ "task_id": id, "result": "not_found" }))?;
            "there is no such task"
        }
    };
    Err(ToolError::Undone(format!("the task was not updated: {why}")))
}

async fn set_paused(args: TaskIds, paused: bool, context: &Context) -> Result<(), ToolError> {
    let output = &context.output;
    let client = context.connect().await?;
    let mut missing = 0;
    for task_id in &args.task_ids {
        let id = task_id.to_string();
        let done = if paused {
            client.pause(*task_id).await?.map(|paused| match paused.maybe_out {
                None => (format!("{id}  paused"), json!({ "task_id": id, "result": "paused" })),
                Some((occurrence, attempt)) => (
                    format!("{id}  paused; attempt {attempt} of occurrence {occurrence} may be out"),
                    json!({ "task_id": id, "result": "paused", "occurrence": occurrence, "attempt": attempt }),
                ),
            })
        } else {
            client.resume(*task_id).await?.map(|resumed| {
                let (due, due_ms) = (due_text(resumed.due_ms), resumed.due_ms);
                if due_ms == 0 {
                    return (
                        format!("{id}  resumed, and has ended: its last due instant passed while it was paused"),
                        json!({ "task_id": id, "result": "ended" }),
                    );
                }
                (
                    format!("{id}  resumed  due {due}  {due_ms} ms"),
                    json!({ "task_id": id, "result": "resumed", "due_ms": due_ms, "due": due }),
                )
            })
        };
        missing += usize::from(done.is_none());
        let (text, object) =
            done.unwrap_or_else(|| (format!("{id}  not found"), json!({ "task_id": id, "result": "not_found" })));
        output.line(|| text, || object)?;
    }
    context.hang_up(client).await;
    match missing {
        0 => Ok(()),
        _ => Err(ToolError::Undone(format!("{missing} of {} tasks were not found", args.task_ids.len()))),
    }
}

async fn cancel(TaskIds { task_ids }: TaskIds, context: &Context) -> Result<(), ToolError> {
    let output = &context.output;
    let client = context.connect().await?;
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
    context.hang_up(client).await;
    match undone {
        0 => Ok(()),
        _ => Err(ToolError::Undone(format!("{undone} of {} tasks were not cancelled", task_ids.len()))),
    }
}

#[cfg(test)]
mod tests {
    use boomerang_task::locks::Mutex;
    use std::sync::Arc;

    use super::super::args::Command;
    use super::super::tests::{boomtool, prepare};
    use super::*;
    use boomerang_client::fake::{self, Fake};
    use boomerang_wire::proto::{self, Status, boomerang_envelope::Payload};

    /// A node that stores nothing: it notes requests, and answers like one that works.
    async fn node() -> (String, Arc<Mutex<Vec<Payload>>>) {
        let fake = Fake::start().await;
        let address = fake.address();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        fake.serve(move |request| {
            seen.lock().push(request.clone());
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
                Payload::UpdateTaskRequest(request) => {
                    let status = match request.expected_version {
                        0 => Status::Ok,
                        1 => Status::Conflict,
                        2 => Status::TooLate,
                        _ => Status::NotFound,
                    };
                    Payload::UpdateTaskResponse(proto::UpdateTaskResponse {
                        status: status.into(),
                        version: 9,
                        scheduled_time_ms: 1_896_076_800_000,
                        detail: Some(proto::Detail { occurrence: 3, attempt: 1, version: 8, ..Default::default() }),
                        ..Default::default()
                    })
                }
                Payload::PauseTaskRequest(request) if request.task_id.ends_with('2') => {
                    Payload::PauseTaskResponse(proto::PauseTaskResponse {
                        status: Status::NotFound.into(),
                        ..Default::default()
                    })
                }
                Payload::PauseTaskRequest(_) => Payload::PauseTaskResponse(proto::PauseTaskResponse {
                    scheduled_time_ms: 1_896_076_800_000,
                    detail: Some(proto::Detail { occurrence: 3, attempt: 1, ..Default::default() }),
                    ..Default::default()
                }),
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
        let requests = requests.lock();
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
        let requests = requests.lock();
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

    #[tokio::test]
    async fn what_a_task_is_given_travels_with_it() {
        let (address, requests) = node().await;
        let line = "task register x --every 1m --missed all:5 --dedup-key k --dedup-ttl 1h --name n --label a=b \
                    --callback udp://h:1 --ack --callback-timeout 2s --attempts 3 --jitter 10 --dead-letters ops";
        boomtool(&format!("{line} --addr {address}")).await.1.unwrap();
        let requests = requests.lock();
        let Payload::RegistrationRequest(task) = &requests[0] else { panic!("{requests:?}") };
        let callback = task.callback.as_ref().unwrap();
        assert_eq!((callback.endpoint.as_str(), callback.acknowledge, callback.timeout_ms), ("h:1", true, 2_000));
        let retry = task.retry.as_ref().unwrap();
        assert_eq!((retry.max_attempts, retry.jitter_percent), (3, 10));
        assert_eq!((task.dedup_key.as_str(), task.dedup_ttl_ms, task.name.as_str()), ("k", 3_600_000, "n"));
        assert_eq!((task.labels["a"].as_str(), task.dlq.as_ref().unwrap().destination.as_str()), ("b", "ops"));
        assert_eq!(task.recurrence.as_ref().unwrap().missed_max, 5);
    }

    #[tokio::test]
    async fn update_says_what_became_of_it() {
        let (address, requests) = node().await;
        let id = fake::task_id(1);
        for (flags, line, code) in [
            ("--in 5s", "updated to version 9  due 2030-01-31T08:00:00.000Z  1896076800000 ms", 0),
            ("--payload y --if-version 1", "conflict: it has version 8 now", 1),
            ("--at 1896076800000 --if-version 2", "too late: attempt 1 of occurrence 3 may be out", 1),
            ("--dead-letters ops --if-version 3", "not found", 1),
        ] {
            let (printed, result) = boomtool(&format!("task update {id} {flags} --addr {address}")).await;
            assert_eq!(printed, format!("{id}  {line}\n"));
            assert_eq!(result.map_or_else(|error| error.exit_code(), |()| 0), code, "{flags}");
        }
        let Payload::UpdateTaskRequest(request) = requests.lock().remove(1) else { panic!() };
        assert_eq!((request.payload.as_deref(), request.delay_ms, request.due_ms), (Some(&b"y"[..]), None, None));
        let error = boomtool(&format!("task update {id} --addr 127.0.0.1:1")).await.1.unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
    }

    #[tokio::test]
    async fn pause_and_resume_say_what_became_of_each() {
        let (address, _) = node().await;
        let (good, gone) = (fake::task_id(1), fake::task_id(2));
        let (printed, result) = boomtool(&format!("task pause {good} {gone} --addr {address}")).await;
        let expected = format!("{good}  paused; attempt 1 of occurrence 3 may be out\n{gone}  not found\n");
        assert_eq!((printed, result.unwrap_err().exit_code()), (expected, 1));
        let (printed, result) = boomtool(&format!("task resume {good} --json --addr {address}")).await;
        result.unwrap();
        let object: Value = serde_json::from_str(&printed).unwrap();
        assert_eq!((&object["result"], &object["due_ms"]), (&json!("resumed"), &json!(1_896_076_800_000u64)));
    }

    /// A node that knows one task, for so many looks; then only how it ended.
    async fn ending_node(looks: usize) -> String {
        let fake = Fake::start().await;
        let address = fake.address();
        let left = Mutex::new(looks);
        fake.serve(move |_| {
            let mut left = left.lock();
            let now = *left;
            *left = left.saturating_sub(1);
            let past = proto::Occurrence {
                outcome: proto::occurrence::Outcome::Dead.into(),
                due_ms: 1_896_076_800_000,
                ended_ms: 1_896_076_801_000,
                dispatched_ms: 1_896_076_800_004,
                attempts: 2,
                failure: Some(proto::Failure { class: 1, text: "nobody listens".into(), at_ms: 5 }),
                ..Default::default()
            };
            let task = proto::TaskDetails { attempt: if now > 2 { 1 } else { 2 }, ..fake::details(1, b"x") };
            Payload::GetTaskResponse(proto::GetTaskResponse {
                task: (now > 0).then_some(task),
                history: if now > 0 { Vec::new() } else { vec![past] },
                ..Default::default()
            })
        });
        address
    }

    #[tokio::test]
    async fn a_task_is_watched_to_its_end() {
        let id = fake::task_id(1);
        let address = ending_node(5).await;
        let (printed, result) = boomtool(&format!("task get {id} --watch 1ms --addr {address}")).await;
        result.unwrap();
        let lines: Vec<&str> = printed.lines().collect();
        assert_eq!(lines.len(), 3, "attempt 1, attempt 2, and the end: {printed}");
        assert!(lines[1].ends_with("  0  2"), "{printed}");
        assert_eq!(lines[2], format!("{id}  ended: dead (refused: nobody listens) at 2030-01-31T08:00:01.000Z"));
    }

    #[tokio::test]
    async fn what_has_ended_is_shown_by_its_history() {
        let (id, address) = (fake::task_id(1), ending_node(0).await);
        let (printed, result) = boomtool(&format!("task get {id} --addr {address}")).await;
        result.unwrap();
        assert!(printed.starts_with(&format!("{id}  ended: dead")), "{printed}");
        assert!(printed.contains("\nOCCURRENCE  OUTCOME") && printed.contains("  4ms  "), "{printed}");
        let (printed, _) = boomtool(&format!("task get {id} --json --addr {address}")).await;
        let object: Value = serde_json::from_str(&printed).unwrap();
        assert_eq!((&object["ended"], &object["history"][0]["failure"]["class"]), (&json!(true), &json!("refused")));
    }

    #[tokio::test]
    async fn a_list_is_watched_until_it_is_stopped() {
        let fake = Fake::start().await;
        let address = fake.address();
        let looks = Mutex::new(0);
        let (enough, stopped) = tokio::sync::oneshot::channel();
        let enough = Mutex::new(Some(enough));
        fake.serve(move |_| {
            let mut looks = looks.lock();
            *looks += 1;
            if *looks == 3 {
                enough.lock().take().unwrap().send(()).unwrap();
            }
            // The second task is gone at the third look.
            let tasks = (1..=if *looks < 3 { 2 } else { 1 }).map(|n| fake::details(n, b"x")).collect();
            Payload::ListTasksResponse(proto::ListTasksResponse { tasks, ..Default::default() })
        });
        let (command, context, printed) = prepare(&format!("task list --watch 1ms --addr {address}"));
        let Command::Task(TaskCommand::List(args)) = command else { unreachable!() };
        list(args, &context, async { stopped.await.unwrap() }).await.unwrap();
        let lines = printed.text();
        assert_eq!(lines.lines().count(), 3, "two tasks and one that went: {lines}");
        assert_eq!(lines.lines().last(), Some(format!("{}  gone", fake::task_id(2)).as_str()));
    }
}
