//! Tasks, what became of them, and dead letters: as rows and lines for people, and as objects for programs.
//!
//! Pure functions. Objects have every field always, `null` where there is nothing, so that a program need not guess.

use serde_json::{Map, Value, json};

use super::output::{payload_into, payload_text, table};
use boomerang_client::{DeadLetter, FailureView, Outcome, PastOccurrence, TaskState, TaskView};
use boomerang_task::when::{format_duration, format_instant};
use boomerang_task::{Backoff, Callback, InstantMs, Missed, Protocol, Recurrence, Retry, Tags};

/// How much of a payload a table shows.
const PAYLOAD_WIDTH: usize = 40;

/// How much of the text of a failure a table shows.
const FAILURE_WIDTH: usize = 60;

pub const TASK_TITLES: [&str; 9] =
    ["TASK", "CLIENT", "NAME", "STATE", "DUE", "EVERY", "ATTEMPT", "CALLBACK", "PAYLOAD"];

/// What is paused is due at no instant.
pub fn due_text(due_ms: InstantMs) -> String {
    if due_ms == 0 { "-".into() } else { format_instant(due_ms) }
}

pub fn task_row(task: &TaskView) -> Vec<String> {
    vec![
        task.task_id.to_string(),
        task.client_id.clone(),
        task.tags.name().unwrap_or("-").to_owned(),
        state_text(task.state).to_owned(),
        due_text(task.due_ms),
        task.recurrence.map_or("once".into(), |recurrence| format_duration(recurrence.interval_ms)),
        task.attempt.to_string(),
        callback_text(task.callback.as_ref()),
        payload_text(&task.payload, PAYLOAD_WIDTH),
    ]
}

pub fn task_text(task: &TaskView) -> String {
    let mut rows = vec![
        ("task", task.task_id.to_string()),
        ("client", task.client_id.clone()),
        ("state", format!("{}, version {}", state_text(task.state), task.version)),
    ];
    rows.extend(tags_rows(&task.tags));
    rows.extend([
        ("due", if task.due_ms == 0 { due_text(0) } else { instant_text(task.due_ms) }),
        ("first due", instant_text(task.first_due_ms)),
        ("repeats", task.recurrence.map_or("once".into(), |recurrence| recurrence_text(&recurrence))),
        ("occurrence", task.occurrence.to_string()),
        ("attempt", task.attempt.to_string()),
        ("callback", callback_long(task.callback.as_ref())),
        ("retries", task.retry.map_or("-".into(), |retry| retry_text(&retry))),
    ]);
    rows.extend(task.dead_letters.iter().map(|destination| ("dead letters", destination.clone())));
    rows.extend(task.last_failure.iter().map(|failure| ("last failure", failure_long(failure))));
    rows.push(("payload", payload_text(&task.payload, usize::MAX)));
    pairs(rows)
}

pub fn task_object(task: &TaskView) -> Map<String, Value> {
    let recurrence = task.recurrence.as_ref();
    let mut object = object([
        ("task_id", json!(task.task_id.to_string())),
        ("client_id", json!(task.client_id)),
        ("state", json!(state_name(task.state))),
        ("version", json!(task.version)),
        ("due_ms", json!(task.due_ms)),
        ("due", json!((task.due_ms > 0).then(|| format_instant(task.due_ms)))),
        ("first_due_ms", json!(task.first_due_ms)),
        ("repeat_interval_ms", json!(recurrence.map(|recurrence| recurrence.interval_ms))),
        ("recurrence", recurrence.map_or(Value::Null, recurrence_object)),
        ("occurrence", json!(task.occurrence)),
        ("attempt", json!(task.attempt)),
        ("callback", callback_object(task.callback.as_ref())),
        ("retry", task.retry.as_ref().map_or(Value::Null, retry_object)),
        ("dead_letters", json!(task.dead_letters)),
        ("last_failure", failure_object(task.last_failure.as_ref())),
    ]);
    tags_into(&mut object, &task.tags);
    payload_into(&mut object, &task.payload);
    object
}

/// One row for each occurrence, or for each run of them that was left out.
pub fn history_table(past: &[PastOccurrence]) -> Vec<String> {
    let titles = ["OCCURRENCE", "OUTCOME", "DUE", "DISPATCHED", "ENDED", "LATE", "ATTEMPTS", "FAILURE"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    rows.extend(past.iter().map(|past| {
        vec![
            match past.count {
                1 => past.occurrence.to_string(),
                count => format!("{}-{}", past.occurrence, past.occurrence.saturating_add(count - 1)),
            },
            outcome_name(past.outcome).to_owned(),
            format_instant(past.due_ms),
            past.dispatched_ms.map_or("-".into(), format_instant),
            format_instant(past.ended_ms),
            lateness_ms(past).map_or("-".into(), format_span),
            past.attempts.to_string(),
            past.failure.as_ref().map_or("-".into(), |failure| cut(&failure_text(failure), FAILURE_WIDTH)),
        ]
    }));
    table(&rows)
}

pub fn past_object(past: &PastOccurrence) -> Value {
    json!({
        "occurrence": past.occurrence,
        "count": past.count,
        "outcome": outcome_name(past.outcome),
        "due_ms": past.due_ms,
        "dispatched_ms": past.dispatched_ms,
        "ended_ms": past.ended_ms,
        "lateness_ms": lateness_ms(past),
        "attempts": past.attempts,
        "failure": failure_object(past.failure.as_ref()),
    })
}

/// From the due instant to the last attempt.
fn lateness_ms(past: &PastOccurrence) -> Option<u64> {
    past.dispatched_ms.map(|dispatched_ms| dispatched_ms.saturating_sub(past.due_ms))
}

pub const LETTER_TITLES: [&str; 9] =
    ["DEAD LETTER", "CLIENT", "NAME", "DIED", "OCCURRENCE", "ATTEMPTS", "CALLBACK", "COPY", "FAILURE"];

pub fn letter_row(letter: &DeadLetter) -> Vec<String> {
    vec![
        letter.id.to_string(),
        letter.client_id.clone(),
        letter.tags.name().unwrap_or("-").to_owned(),
        format_instant(letter.died_ms),
        letter.occurrence.to_string(),
        letter.attempts.to_string(),
        callback_text(letter.callback.as_ref()),
        if letter.copy.is_empty() { "-".to_owned() } else { cut(&printable(&letter.copy), FAILURE_WIDTH) },
        letter.failure.as_ref().map_or("-".into(), |failure| cut(&failure_text(failure), FAILURE_WIDTH)),
    ]
}

pub fn letter_text(letter: &DeadLetter) -> String {
    let mut rows = vec![
        ("dead letter", letter.id.to_string()),
        ("task", letter.task_id.to_string()),
        ("client", letter.client_id.clone()),
    ];
    rows.extend(tags_rows(&letter.tags));
    rows.extend([
        ("due", instant_text(letter.due_ms)),
        ("died", instant_text(letter.died_ms)),
        ("occurrence", letter.occurrence.to_string()),
        ("attempts", letter.attempts.to_string()),
        ("failure", letter.failure.as_ref().map_or("-".into(), failure_long)),
        ("callback", callback_long(letter.callback.as_ref())),
        ("retries", letter.retry.map_or("-".into(), |retry| retry_text(&retry))),
    ]);
    if !letter.destination.is_empty() {
        let copy = if letter.copy.is_empty() { "no copy".to_owned() } else { printable(&letter.copy) };
        rows.push(("copy", format!("for {}: {copy}", printable(&letter.destination))));
    }
    rows.push(("payload", payload_text(&letter.payload, usize::MAX)));
    pairs(rows)
}

pub fn letter_object(letter: &DeadLetter) -> Value {
    let mut object = object([
        ("dead_letter_id", json!(letter.id.to_string())),
        ("task_id", json!(letter.task_id.to_string())),
        ("client_id", json!(letter.client_id)),
        ("occurrence", json!(letter.occurrence)),
        ("due_ms", json!(letter.due_ms)),
        ("died_ms", json!(letter.died_ms)),
        ("died", json!(format_instant(letter.died_ms))),
        ("attempts", json!(letter.attempts)),
        ("failure", failure_object(letter.failure.as_ref())),
        ("callback", callback_object(letter.callback.as_ref())),
        ("retry", letter.retry.as_ref().map_or(Value::Null, retry_object)),
        ("destination", json!(letter.destination)),
        ("copy", json!(letter.copy)),
    ]);
    tags_into(&mut object, &letter.tags);
    payload_into(&mut object, &letter.payload);
    Value::Object(object)
}

pub fn state_text(state: TaskState) -> &'static str {
    state_name(state).unwrap_or("-")
}

fn state_name(state: TaskState) -> Option<&'static str> {
    Some(match state {
        TaskState::Unspecified => return None,
        TaskState::Scheduled => "scheduled",
        TaskState::Retrying => "retrying",
        TaskState::Out => "out",
        TaskState::Paused => "paused",
    })
}

pub fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Unknown => "unknown",
        Outcome::Acknowledged => "acknowledged",
        Outcome::Dead => "dead",
        Outcome::Cancelled => "cancelled",
        Outcome::Skipped => "skipped",
        Outcome::Merged => "merged",
    }
}

pub fn failure_text(failure: &FailureView) -> String {
    match failure.class {
        Some(class) => format!("{class}: {}", printable(&failure.text)),
        None => printable(&failure.text),
    }
}

fn failure_long(failure: &FailureView) -> String {
    format!("{}  at {}", failure_text(failure), format_instant(failure.at_ms))
}

fn failure_object(failure: Option<&FailureView>) -> Value {
    failure.map_or(Value::Null, |failure| {
        json!({
            "class": failure.class.map(|class| class.to_string().replace(' ', "_")),
            "text": failure.text,
            "at_ms": failure.at_ms,
        })
    })
}

pub fn callback_text(callback: Option<&Callback>) -> String {
    match callback {
        Some(callback) if callback.protocol == Protocol::Grpc => match callback.endpoint.as_str() {
            url if url.starts_with("https://") => url.replacen("https", "grpcs", 1),
            url if url.starts_with("http://") => url.replacen("http", "grpc", 1),
            host => format!("grpc://{host}"),
        },
        // Endpoints of HTTP are URLs already.
        Some(callback) if callback.protocol == Protocol::Http => callback.endpoint.to_string(),
        Some(callback) => format!("{}://{}", callback.protocol, callback.endpoint),
        None => "-".to_owned(),
    }
}

fn callback_long(callback: Option<&Callback>) -> String {
    let mut text = callback_text(callback);
    let Some(options) = callback.map(|callback| &callback.options) else { return text };
    if let Some(timeout_ms) = options.timeout_ms {
        text.push_str(&format!(", answers within {}", format_duration(timeout_ms)));
    }
    for (is_set, what) in [
        (options.acknowledge, ", acknowledged"),
        (options.http2, ", HTTP/2"),
        (options.follow_redirects, ", follows redirects"),
    ] {
        text.push_str(if is_set { what } else { "" });
    }
    text
}

fn callback_object(callback: Option<&Callback>) -> Value {
    callback.map_or(Value::Null, |callback| json!(callback_text(Some(callback))))
}

fn retry_text(retry: &Retry) -> String {
    let backoff = match retry.backoff {
        Backoff::Fixed => format!("{} apart", format_duration(retry.interval_ms)),
        Backoff::Exponential => {
            let (first, most) = (format_duration(retry.interval_ms), format_duration(retry.interval_max_ms));
            format!("{first} apart, doubling up to {most}")
        }
    };
    let jitter = if retry.jitter_percent > 0 { format!(", jitter {}%", retry.jitter_percent) } else { String::new() };
    match retry.attempts_max {
        1 => "one attempt".to_owned(),
        attempts => format!("{attempts} attempts, {backoff}{jitter}"),
    }
}

fn retry_object(retry: &Retry) -> Value {
    json!({
        "attempts": retry.attempts_max,
        "backoff": match retry.backoff { Backoff::Fixed => "fixed", Backoff::Exponential => "exponential" },
        "interval_ms": retry.interval_ms,
        "max_interval_ms": retry.interval_max_ms,
        "jitter_percent": retry.jitter_percent,
    })
}

fn recurrence_text(recurrence: &Recurrence) -> String {
    let mut text = format!("every {}, missed: {}", format_duration(recurrence.interval_ms), missed_text(recurrence));
    if recurrence.overlap {
        text.push_str(", may overlap");
    }
    if let Some(count) = recurrence.count {
        text.push_str(&format!(", {count} times"));
    }
    if let Some(until_ms) = recurrence.until_ms {
        text.push_str(&format!(", until {}", format_instant(until_ms)));
    }
    text
}

fn missed_text(recurrence: &Recurrence) -> String {
    match recurrence.missed {
        Missed::Skip => "skip".to_owned(),
        Missed::Once => "once".to_owned(),
        Missed::All { max } => format!("all:{max}"),
    }
}

fn recurrence_object(recurrence: &Recurrence) -> Value {
    json!({
        "missed": missed_text(recurrence),
        "overlap": recurrence.overlap,
        "count": recurrence.count,
        "until_ms": recurrence.until_ms,
    })
}

fn tags_rows(tags: &Tags) -> Vec<(&'static str, String)> {
    let mut rows: Vec<_> = tags.name().map(|name| ("name", name.to_owned())).into_iter().collect();
    if !tags.labels().is_empty() {
        let labels: Vec<_> = tags.labels().iter().map(|(key, value)| format!("{key}={value}")).collect();
        rows.push(("labels", labels.join("  ")));
    }
    rows
}

fn tags_into(object: &mut Map<String, Value>, tags: &Tags) {
    object.insert("name".into(), json!(tags.name()));
    let labels = tags.labels().iter().map(|(key, value)| (key.clone(), json!(value)));
    object.insert("labels".into(), Value::Object(labels.collect()));
}

/// Names and values below each other.
fn pairs(rows: Vec<(&'static str, String)>) -> String {
    let rows: Vec<_> = rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
    table(&rows).join("\n")
}

fn object<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn instant_text(at_ms: u64) -> String {
    format!("{}  {at_ms} ms", format_instant(at_ms))
}

/// A short span as it is, a long one to the second: it stands in a column.
fn format_span(span_ms: u64) -> String {
    format_duration(if span_ms < 60_000 { span_ms } else { span_ms - span_ms % 1000 })
}

/// What a receiver said does not reach the terminal as it is.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn cut(text: &str, width: usize) -> String {
    match text.char_indices().nth(width) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::delivery::parse_callback;

    #[test]
    fn a_callback_is_shown_as_it_is_typed() {
        for url in ["tcp://h:1", "udp://[::1]:2", "http://h/x", "https://h/x", "grpc://h:3", "grpcs://h:4"] {
            assert_eq!(callback_text(Some(&parse_callback(url).unwrap())), url);
        }
        assert_eq!(callback_text(None), "-");
    }

    #[test]
    fn history_has_a_row_for_each_run() {
        let past = |occurrence, count, outcome, dispatched_ms| PastOccurrence {
            occurrence,
            count,
            outcome,
            due_ms: 1_896_076_800_000,
            dispatched_ms,
            ended_ms: 1_896_076_800_100,
            attempts: 2,
            failure: Some(FailureView { class: None, text: format!("x\u{1b}{}", "y".repeat(100)), at_ms: 0 }),
        };
        let rows =
            history_table(&[past(7, 1, Outcome::Dead, Some(1_896_076_800_020)), past(2, 5, Outcome::Skipped, None)]);
        assert_eq!(rows.len(), 3);
        assert!(
            rows[1].starts_with("7           dead") && rows[1].contains("20ms") && rows[1].ends_with("y..."),
            "{rows:?}"
        );
        assert!(rows[2].starts_with("2-6         skipped") && !rows[2].contains('\u{1b}'), "{rows:?}");
    }

    #[test]
    fn settings_are_told_in_words() {
        let retry = Retry { jitter_percent: 20, ..Retry::default() };
        assert_eq!(retry_text(&retry), "5 attempts, 1s apart, doubling up to 1m, jitter 20%");
        assert_eq!(retry_text(&Retry { attempts_max: 1, ..retry }), "one attempt");
        let recurrence = Recurrence {
            missed: Missed::All { max: 3 },
            overlap: true,
            count: Some(9),
            until_ms: Some(1_896_076_800_000),
            ..Recurrence::every(60_000)
        };
        let text = recurrence_text(&recurrence);
        assert_eq!(text, "every 1m, missed: all:3, may overlap, 9 times, until 2030-01-31T08:00:00.000Z");
        let callback = parse_callback("http://h/x").unwrap();
        let options = boomerang_task::CallbackOptions { timeout_ms: Some(2_000), http2: true, ..Default::default() };
        assert_eq!(callback_long(Some(&callback.with(options).unwrap())), "http://h/x, answers within 2s, HTTP/2");
    }
}
