//! `boomtool task register --batch`: many tasks from a file, one JSON object per line.
//!
//! All lines are read and checked before anything is sent, so that a wrong one in the middle leaves nothing half done.
//! Then they go out in messages of many tasks, several under way, and their results are printed in the order of the
//! lines.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use clap::ValueEnum;
use data_encoding::HEXLOWER_PERMISSIVE;
use futures::StreamExt;
use serde::Deserialize;
use serde_json::{Value, json};

use super::args::delivery::{BackoffArg, parse_callback};
use super::args::task::{TaskSpec, parse_missed};
use super::output::{note, progress};
use super::task::{registered_object, registered_text};
use super::{Context, ToolError};
use boomerang_client::{ClientError, Registered, Registration};
use boomerang_task::when::{parse_duration, parse_instant};
use boomerang_task::{InstantMs, Invalid, Secret};
use boomerang_wire::FRAME_BYTES_MAX;

/// More tasks in one message bring no more throughput.
const BATCH_TASKS: usize = 500;

/// What a message may hold besides the envelope; more than half of a frame, and not all of it.
const BATCH_BYTES: usize = FRAME_BYTES_MAX / 4 * 3;

/// Around each task of a message.
const TASK_BYTES: usize = 8;

/// So many messages are under way.
const BATCHES_UNDER_WAY: usize = 16;

/// One line. The names are those of the flags.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    payload: Option<Value>,
    payload_hex: Option<String>,
    r#in: Option<Time>,
    at: Option<Time>,
    every: Option<Time>,
    missed: Option<String>,
    overlap: Option<bool>,
    count: Option<u64>,
    until: Option<Time>,
    dedup_key: Option<String>,
    dedup_ttl: Option<Time>,
    name: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    callback: Option<String>,
    secret: Option<String>,
    callback_timeout: Option<Time>,
    ack: Option<bool>,
    http2: Option<bool>,
    follow_redirects: Option<bool>,
    attempts: Option<u32>,
    backoff: Option<String>,
    retry_interval: Option<Time>,
    retry_max_interval: Option<Time>,
    jitter: Option<u8>,
    dead_letters: Option<String>,
}

/// A time as people write it, or in milliseconds.
#[derive(Deserialize)]
#[serde(untagged)]
enum Time {
    Text(String),
    Millis(u64),
}

impl Time {
    fn span(self) -> Result<Duration, String> {
        match self {
            Time::Text(text) => parse_duration(&text),
            Time::Millis(ms) => Ok(Duration::from_millis(ms)),
        }
    }

    fn instant(self) -> Result<InstantMs, String> {
        match self {
            Time::Text(text) => parse_instant(&text),
            // Seconds by mistake are found where the flag finds them.
            Time::Millis(ms) => parse_instant(&ms.to_string()),
        }
    }
}

/// Replaces `target` by what the line names, read by `read`; an error says which field it is.
fn put<T, U>(
    target: &mut Option<U>,
    field: &str,
    value: Option<T>,
    read: impl FnOnce(T) -> Result<U, String>,
) -> Result<(), String> {
    if let Some(value) = value {
        *target = Some(read(value).map_err(|error| format!("{field}: {error}"))?);
    }
    Ok(())
}

impl Line {
    /// What the line says, over the defaults.
    fn registration(self, defaults: &TaskSpec) -> Result<Registration, String> {
        let payload = match (self.payload, self.payload_hex) {
            (Some(_), Some(_)) => return Err("payload, payload_hex: only one of them can be given".into()),
            (Some(Value::String(text)), None) => text.into_bytes(),
            (Some(value), None) => value.to_string().into_bytes(),
            (None, Some(digits)) => from_hex(&digits)?,
            (None, None) => return Err("payload: is missing; an empty one is \"\"".into()),
        };
        let mut spec = defaults.clone();
        match (&self.r#in, &self.at) {
            (Some(_), Some(_)) => return Err("in, at: only one of them can be given".into()),
            (None, None) => {}
            // The one takes the place of whichever was the default.
            _ => (spec.delay, spec.at) = (None, None),
        }
        put(&mut spec.delay, "in", self.r#in, Time::span)?;
        put(&mut spec.at, "at", self.at, Time::instant)?;
        put(&mut spec.every, "every", self.every, |every| match every.span()? {
            Duration::ZERO => Err("is zero".into()),
            every => Ok(every),
        })?;
        put(&mut spec.missed, "missed", self.missed, |text| parse_missed(&text))?;
        put(&mut spec.count, "count", self.count, Ok)?;
        put(&mut spec.until, "until", self.until, Time::instant)?;
        put(&mut spec.dedup_key, "dedup_key", self.dedup_key, Ok)?;
        put(&mut spec.dedup_ttl, "dedup_ttl", self.dedup_ttl, Time::span)?;
        put(&mut spec.name, "name", self.name, Ok)?;
        spec.overlap = self.overlap.unwrap_or(spec.overlap);
        if let Some(labels) = self.labels {
            spec.labels.retain(|(key, _)| !labels.contains_key(key));
            spec.labels.extend(labels);
        }
        let policy = &mut spec.policy;
        put(&mut policy.callback, "callback", self.callback, |url| parse_callback(&url))?;
        put(&mut policy.secret, "secret", self.secret, |text| Secret::new(&text).map_err(|error| error.to_string()))?;
        put(&mut policy.callback_timeout, "callback_timeout", self.callback_timeout, Time::span)?;
        policy.ack = self.ack.unwrap_or(policy.ack);
        policy.http2 = self.http2.unwrap_or(policy.http2);
        policy.follow_redirects = self.follow_redirects.unwrap_or(policy.follow_redirects);
        put(&mut policy.attempts, "attempts", self.attempts, Ok)?;
        put(&mut policy.backoff, "backoff", self.backoff, |text| BackoffArg::from_str(&text, true))?;
        put(&mut policy.retry_interval, "retry_interval", self.retry_interval, Time::span)?;
        put(&mut policy.retry_max_interval, "retry_max_interval", self.retry_max_interval, Time::span)?;
        put(&mut policy.jitter, "jitter", self.jitter, Ok)?;
        put(&mut policy.dead_letters, "dead_letters", self.dead_letters, Ok)?;
        spec.registration(Bytes::from(payload)).map_err(|error| error.to_string())
    }
}

fn from_hex(digits: &str) -> Result<Vec<u8>, String> {
    let bytes = HEXLOWER_PERMISSIVE.decode(digits.as_bytes());
    bytes.map_err(|_| format!("payload_hex: '{digits}' is not pairs of hexadecimal digits"))
}

/// A task and the number of its line.
type Numbered = (usize, Registration);

/// Reads and checks all lines; empty ones count and are passed over.
fn read(input: impl BufRead, path: &Path, defaults: &TaskSpec) -> Result<Vec<Numbered>, ToolError> {
    let mut tasks = Vec::new();
    for (index, line) in input.lines().enumerate() {
        let line = line.map_err(|source| ToolError::file(path, source))?;
        if line.trim().is_empty() {
            continue;
        }
        let number = index + 1;
        let registration = serde_json::from_str::<Line>(&line)
            // Every line is line 1 to the parser; only the column helps.
            .map_err(|error| format!("column {}: {}", error.column(), without_place(&error.to_string())))
            .and_then(|line| line.registration(defaults))
            .map_err(|why| Invalid(format!("line {number}: {why}; nothing was sent")))?;
        tasks.push((number, registration));
    }
    Ok(tasks)
}

fn without_place(error: &str) -> &str {
    error.rsplit_once(" at line ").map_or(error, |(text, _)| text)
}

/// Cuts tasks into messages that a frame can hold.
fn batches(tasks: Vec<Numbered>) -> Vec<Vec<Numbered>> {
    let mut batches: Vec<Vec<Numbered>> = Vec::new();
    let mut bytes = 0;
    for task in tasks {
        let more = task.1.message_bytes() + TASK_BYTES;
        match batches.last_mut() {
            Some(batch) if batch.len() < BATCH_TASKS && bytes + more <= BATCH_BYTES => {
                bytes += more;
                batch.push(task);
            }
            _ => {
                bytes = more;
                batches.push(vec![task]);
            }
        }
    }
    batches
}

pub(super) async fn run(path: &Path, defaults: &TaskSpec, context: &Context) -> Result<(), ToolError> {
    let tasks = read(BufReader::new(context.open_input(path)?), path, defaults)?;
    let total = tasks.len();
    let client = context.connect().await?;
    let bar = progress("registering", Some(total as u64));
    let send = |batch: Vec<Numbered>| {
        let client = client.clone();
        async move {
            let (numbers, batch): (Vec<usize>, Vec<Registration>) = batch.into_iter().unzip();
            let results = match client.register_batch(batch).await {
                Ok(results) => results,
                // It is the answer to each of them.
                Err(error) => numbers.iter().map(|_| Err(error.clone())).collect(),
            };
            numbers.into_iter().zip(results)
        }
    };
    let mut under_way = futures::stream::iter(batches(tasks)).map(send).buffered(BATCHES_UNDER_WAY);
    let mut failed = 0;
    while let Some(results) = under_way.next().await {
        for (number, result) in results {
            failed += usize::from(result.is_err());
            bar.suspend(|| print(number, result, context))?;
            bar.inc(1);
        }
    }
    drop(under_way);
    bar.finish_and_clear();
    context.hang_up(client).await;
    note(&format!("{} of {total} tasks registered", total - failed));
    match failed {
        0 => Ok(()),
        _ => Err(ToolError::Undone(format!("{failed} of {total} tasks were not registered"))),
    }
}

fn print(number: usize, result: Result<Registered, ClientError>, context: &Context) -> Result<(), ToolError> {
    match result {
        Ok(registered) => context.output.line(
            || format!("line {number}  {}", registered_text(&registered)),
            || {
                let mut object = registered_object(&registered);
                object["line"] = json!(number);
                object
            },
        ),
        Err(error) => context.output.line(
            || format!("line {number}  failed: {error}"),
            || json!({ "line": number, "error": error.to_string() }),
        ),
    }
}

#[cfg(test)]
mod tests {
    use boomerang_task::locks::Mutex;
    use std::io::Write as _;
    use std::sync::Arc;

    use super::super::tests::boomtool;
    use super::*;
    use boomerang_client::Due;
    use boomerang_client::fake::{self, Fake};
    use boomerang_wire::proto::{self, Status, boomerang_envelope::Payload};

    fn read_text(text: &str, defaults: &TaskSpec) -> Result<Vec<Numbered>, ToolError> {
        read(text.as_bytes(), Path::new("-"), defaults)
    }

    #[test]
    fn a_line_says_what_flags_say() {
        let text = r#"
            {"payload":"a","in":"5s"}
            {"payload":{"k":1},"at":"2030-01-31T08:00:00Z","name":"n","labels":{"a":"2"},"dedup_key":"d","dedup_ttl":1000}
            {"payload_hex":"ff00","every":60000,"missed":"all:3","overlap":true,"callback":"http://h/x","secret":"s"}
            {"payload":"","attempts":2,"backoff":"fixed","dead_letters":"ops"}"#;
        let defaults = TaskSpec {
            delay: Some(Duration::from_secs(9)),
            name: Some("many".into()),
            labels: vec![("a".into(), "1".into()), ("b".into(), "1".into())],
            ..Default::default()
        };
        let tasks = read_text(text, &defaults).unwrap();
        assert_eq!(tasks.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [2, 3, 4, 5]);
        let [a, b, c, d] = <[Numbered; 4]>::try_from(tasks).unwrap().map(|(_, task)| task);
        assert_eq!((a.payload.as_ref(), a.due, a.tags.name()), (&b"a"[..], Due::In(5_000), Some("many")));
        assert_eq!((b.payload.as_ref(), b.due), (&br#"{"k":1}"#[..], Due::At(1_896_076_800_000)));
        assert_eq!((b.tags.name(), b.tags.labels()[0].1.as_str(), b.tags.labels().len()), (Some("n"), "2", 2));
        assert_eq!(b.dedup.unwrap().ttl_ms, Some(1_000));
        assert_eq!((c.payload.as_ref(), c.recurrence.unwrap().interval_ms), (&[0xff, 0][..], 60_000));
        assert!(c.settings.callback.unwrap().options.secret.is_some());
        assert_eq!((d.due, d.settings.retry.unwrap().attempts_max), (Due::In(9_000), 2));
        assert_eq!(d.settings.dead_letters.as_deref(), Some("ops"));
    }

    #[test]
    fn a_wrong_line_is_named_by_its_number() {
        for (line, why) in [
            ("{", "column"),
            (r#"{"payload":"x"}"#, "say when"),
            (r#"{"in":"1s"}"#, "payload: is missing"),
            (r#"{"payload":"x","payload_hex":"00","in":"1s"}"#, "only one"),
            (r#"{"payload_hex":"0","in":"1s"}"#, "payload_hex"),
            (r#"{"payload":"x","in":"1s","at":"2030-01-31T08:00:00Z"}"#, "only one"),
            (r#"{"payload":"x","in":"1"}"#, "in: '1': 1 has no unit"),
            (r#"{"payload":"x","at":1896076800}"#, "at: '1896076800' looks like seconds"),
            (r#"{"payload":"x","in":"1s","nmae":"n"}"#, "unknown field `nmae`"),
            (r#"{"payload":"x","in":"1s","backoff":"never"}"#, "backoff"),
            (r#"{"payload":"x","in":"1s","callback":"h:1"}"#, "callback: 'h:1' has no scheme"),
            (r#"{"payload":"x","in":"1s","secret":"s"}"#, "--callback"),
            (r#"{"payload":"x","in":"1s","attempts":0}"#, "max_attempts"),
        ] {
            let text = format!("{{\"payload\":\"good\",\"in\":\"1s\"}}\n\n{line}\n");
            let error = read_text(&text, &TaskSpec::default()).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let error = error.to_string();
            assert!(error.starts_with("line 3: ") && error.contains(why), "{line}: {error}");
        }
    }

    #[test]
    fn a_message_holds_so_many_tasks_and_so_many_bytes() {
        let task = |bytes: usize| Registration { payload: vec![0; bytes].into(), ..Default::default() };
        let sizes = |tasks: Vec<Registration>| {
            batches(tasks.into_iter().enumerate().collect()).iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(sizes(vec![task(1); BATCH_TASKS + 1]), [BATCH_TASKS, 1]);
        assert_eq!(sizes(vec![task(BATCH_BYTES / 2 - 100); 3]), [2, 1]);
        assert_eq!(sizes(vec![task(BATCH_BYTES * 2), task(1)]), [1, 1], "the client refuses what no frame can hold");
        assert!(sizes(Vec::new()).is_empty());
    }

    #[tokio::test]
    async fn every_line_has_its_result() {
        let fake = Fake::start().await;
        let address = fake.address();
        let sent = Arc::new(Mutex::new(0));
        let count = sent.clone();
        fake.serve(move |request| {
            let Payload::RegistrationBatch(batch) = request else { panic!("{request:?}") };
            *count.lock() += batch.tasks.len();
            let answer = |task: &proto::Task| match task.payload.as_ref() {
                b"bad" => proto::RegistrationResponse {
                    status: Status::InvalidRequest.into(),
                    error_message: "payload: no".into(),
                    ..Default::default()
                },
                _ => proto::RegistrationResponse {
                    task_id: fake::task_id(task.delay_ms).to_string(),
                    scheduled_time_ms: 1_896_076_800_000,
                    duplicate: task.delay_ms == 2,
                    ..Default::default()
                },
            };
            let responses = batch.tasks.iter().map(answer).collect();
            Payload::RegistrationBatchResponse(proto::RegistrationBatchResponse { responses, ..Default::default() })
        });
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for line in [r#"{"payload":"a","in":1}"#, r#"{"payload":"bad","in":5}"#, r#"{"payload":"b","in":2}"#] {
            writeln!(file, "{line}").unwrap();
        }
        let line = format!("task register --batch {} --addr {address}", file.path().display());
        let (printed, result) = boomtool(&line).await;
        assert_eq!(result.unwrap_err().to_string(), "1 of 3 tasks were not registered");
        let due = "due 2030-01-31T08:00:00.000Z  1896076800000 ms";
        let [first, third] = [1, 2].map(fake::task_id);
        let lines = [
            format!("line 1  {first}  {due}"),
            "line 2  failed: INVALID_REQUEST: payload: no".to_owned(),
            format!("line 3  {third}  {due}  known by its key"),
        ];
        assert_eq!(printed.lines().collect::<Vec<_>>(), lines);
        let (printed, _) = boomtool(&format!("{line} --json")).await;
        let objects: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((&objects[0]["line"], &objects[2]["duplicate"]), (&json!(1), &json!(true)));
        assert_eq!(objects[1], json!({ "line": 2, "error": "INVALID_REQUEST: payload: no" }));

        writeln!(file, "x").unwrap();
        let before = *sent.lock();
        assert_eq!(boomtool(&line).await.1.unwrap_err().exit_code(), 2);
        assert_eq!(*sent.lock(), before, "nothing was sent");
    }
}
