//! `boomtool dlq`: list, get, replay, purge.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::args::dlq::{DlqChoice, DlqCommand, DlqList};
use super::output::{note, progress, table};
use super::show::{LETTER_TITLES, letter_object, letter_row, letter_text};
use super::{Context, ToolError};
use boomerang_client::{DeadLetter, DeadLetterChoice};
use boomerang_task::{DeadLetterId, Invalid};

/// What `list` asks for at a time, and how many ids go into one request.
const PAGE: usize = 100;

pub(super) async fn run(command: DlqCommand, context: &Context) -> Result<(), ToolError> {
    match command {
        DlqCommand::List(args) => list(args, context).await,
        DlqCommand::Get { id } => get(id, context).await,
        DlqCommand::Replay(choice) => replay(choice, context).await,
        DlqCommand::Purge { choice, yes } => purge(choice, yes, context).await,
    }
}

async fn list(args: DlqList, context: &Context) -> Result<(), ToolError> {
    let client = context.connect().await?;
    let filter = args.filter.filter();
    let mut left = if args.all { u64::MAX } else { args.limit };
    let (mut token, mut head) = (String::new(), true);
    loop {
        let limit = u32::try_from(left.min(PAGE as u64)).expect("a page is small");
        let mut page = client.list_dead_letters(&filter, limit, &token).await?;
        // A node may have another idea of a page than we asked for.
        let cut = page.dead_letters.len() as u64 > left;
        page.dead_letters.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        left -= page.dead_letters.len() as u64;
        print_page(&page.dead_letters, head, context)?;
        head &= page.dead_letters.is_empty();
        match page.next_token {
            Some(next) if left > 0 && !cut => token = next,
            next => {
                if cut || next.is_some() {
                    note(&format!("there are more than {}: --limit N shows more, --all shows all", args.limit));
                }
                break;
            }
        }
    }
    context.hang_up(client).await;
    Ok(())
}

/// Each page is a table of its own, since the next ones are not known yet; only the first has a head.
fn print_page(letters: &[DeadLetter], head: bool, context: &Context) -> Result<(), ToolError> {
    let output = &context.output;
    if output.json {
        return letters.iter().try_for_each(|letter| output.line(String::new, || letter_object(letter)));
    }
    let mut rows = vec![LETTER_TITLES.map(str::to_owned).to_vec()];
    rows.extend(letters.iter().map(letter_row));
    let lines = table(&rows);
    let mut lines = lines.into_iter().skip(usize::from(!head || letters.is_empty()));
    lines.try_for_each(|line| output.line(|| line, || Value::Null))
}

async fn get(id: DeadLetterId, context: &Context) -> Result<(), ToolError> {
    let client = context.connect().await?;
    let letter = client.get_dead_letter(id).await?;
    context.hang_up(client).await;
    match letter {
        Some(letter) => context.output.line(|| letter_text(&letter), || letter_object(&letter)),
        None => Err(ToolError::Undone(format!(
            "there is no dead letter {id}: it never was, was replayed or purged, or belongs to another client"
        ))),
    }
}

/// As many requests as it takes; ids in parts that fit into a frame.
fn parts(choice: DeadLetterChoice) -> Vec<DeadLetterChoice> {
    match choice {
        DeadLetterChoice::Ids(ids) => ids.chunks(PAGE).map(|part| DeadLetterChoice::Ids(part.to_vec())).collect(),
        filter => vec![filter],
    }
}

/// How many were named, when they were.
fn named(choice: &DeadLetterChoice) -> Option<u64> {
    match choice {
        DeadLetterChoice::Ids(ids) => Some(ids.len() as u64),
        DeadLetterChoice::Filter(_) => None,
    }
}

async fn replay(args: DlqChoice, context: &Context) -> Result<(), ToolError> {
    let choice = args.choice()?;
    let named = named(&choice);
    let client = context.connect().await?;
    let bar = progress("replaying", named);
    let (mut done, mut missing) = (0u64, 0u64);
    for part in parts(choice) {
        let mut token = String::new();
        loop {
            let page = client.replay_dead_letters(&part, 0, &token).await?;
            for replayed in page.replayed {
                let id = replayed.id.to_string();
                bar.inc(1);
                bar.suspend(|| match replayed.task_id {
                    Some(task_id) => {
                        done += 1;
                        let object =
                            json!({ "dead_letter_id": id, "task_id": task_id.to_string(), "result": "replayed" });
                        context.output.line(|| format!("{id}  replayed as {task_id}"), || object)
                    }
                    None => {
                        missing += 1;
                        let object = json!({ "dead_letter_id": id, "result": "not_found" });
                        context.output.line(|| format!("{id}  not found"), || object)
                    }
                })?;
            }
            match page.next_token {
                Some(next) => token = next,
                None => break,
            }
        }
    }
    bar.finish_and_clear();
    context.hang_up(client).await;
    note(&format!("{done} dead letters replayed"));
    match named {
        Some(named) if missing > 0 => {
            Err(ToolError::Undone(format!("{missing} of {named} dead letters were not found")))
        }
        _ => Ok(()),
    }
}

async fn purge(args: DlqChoice, yes: bool, context: &Context) -> Result<(), ToolError> {
    let choice = args.choice()?;
    let named = named(&choice);
    if named.is_none() && !yes {
        confirm(&choice, context)?;
    }
    let client = context.connect().await?;
    let bar = progress("purging", named);
    let mut purged = 0;
    for part in parts(choice) {
        let mut token = String::new();
        loop {
            let page = client.purge_dead_letters(&part, 0, &token).await?;
            purged += page.purged;
            bar.set_position(purged);
            match page.next_token {
                Some(next) => token = next,
                None => break,
            }
        }
    }
    bar.finish_and_clear();
    context.hang_up(client).await;
    context.output.line(|| format!("{purged} dead letters purged"), || json!({ "purged": purged }))?;
    match named {
        Some(named) if purged < named => {
            Err(ToolError::Undone(format!("{} of {named} dead letters were not found", named - purged)))
        }
        _ => Ok(()),
    }
}

/// What is purged is gone, so somebody has to mean it.
fn confirm(choice: &DeadLetterChoice, context: &Context) -> Result<(), ToolError> {
    if !context.interactive {
        return Err(Invalid::new("--all: needs --yes where nobody can be asked").into());
    }
    let all = DeadLetterChoice::Filter(Default::default());
    let which = if *choice == all { "all dead letters" } else { "all dead letters that the filters name" };
    let mut stderr = io::stderr();
    let mut answer = String::new();
    write!(stderr, "Remove {which} for good? Type 'yes': ")
        .and_then(|()| stderr.flush())
        .and_then(|()| io::stdin().read_line(&mut answer).map(drop))
        .map_err(|source| ToolError::file(std::path::Path::new("-"), source))?;
    match answer.trim() {
        "yes" => Ok(()),
        _ => Err(ToolError::Undone("nothing was purged".into())),
    }
}

#[cfg(test)]
mod tests {
    use boomerang_task::locks::Mutex;
    use std::sync::Arc;

    use super::super::tests::boomtool;
    use super::*;
    use boomerang_client::fake::{self, Fake};
    use boomerang_wire::proto::{self, Status, boomerang_envelope::Payload};

    /// A node with five dead letters, two on a page, the second page empty; it knows the first of those that are named.
    async fn node() -> (String, Arc<Mutex<Vec<Payload>>>) {
        let fake = Fake::start().await;
        let address = fake.address();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = requests.clone();
        let page = |token: &str| -> (Vec<u64>, String) {
            match token {
                "" => (vec![1, 2], "a".into()),
                "a" => (vec![], "b".into()),
                "b" => (vec![3, 4], "c".into()),
                _ => (vec![5], String::new()),
            }
        };
        fake.serve(move |request| {
            seen.lock().push(request.clone());
            match request {
                Payload::ListDeadLettersRequest(request) => {
                    let (numbers, next_token) = page(&request.next_token);
                    Payload::ListDeadLettersResponse(proto::ListDeadLettersResponse {
                        dead_letters: numbers.into_iter().map(fake::dead_letter).collect(),
                        next_token,
                        ..Default::default()
                    })
                }
                Payload::GetDeadLetterRequest(request) if request.dead_letter_id.ends_with("@5") => {
                    Payload::GetDeadLetterResponse(proto::GetDeadLetterResponse {
                        status: Status::NotFound.into(),
                        ..Default::default()
                    })
                }
                Payload::GetDeadLetterRequest(_) => Payload::GetDeadLetterResponse(proto::GetDeadLetterResponse {
                    dead_letter: Some(fake::dead_letter(1)),
                    ..Default::default()
                }),
                Payload::ReplayDeadLettersRequest(request) => {
                    let (numbers, next_token) = match request.dead_letter_ids.len() as u64 {
                        0 => page(&request.next_token),
                        count => ((1..=count).collect(), String::new()),
                    };
                    let named = !request.dead_letter_ids.is_empty();
                    let replayed = numbers.into_iter().map(|n| proto::Replayed {
                        dead_letter_id: fake::dead_letter_id(n).to_string(),
                        task_id: if named && n > 1 { String::new() } else { fake::task_id(n + 100).to_string() },
                    });
                    Payload::ReplayDeadLettersResponse(proto::ReplayDeadLettersResponse {
                        replayed: replayed.collect(),
                        next_token,
                        ..Default::default()
                    })
                }
                Payload::PurgeDeadLettersRequest(request) => {
                    let (numbers, next_token) = match request.dead_letter_ids.len() {
                        0 => page(&request.next_token),
                        _ => (vec![1], String::new()),
                    };
                    let purged = numbers.len() as u64;
                    let answer = proto::PurgeDeadLettersResponse { purged, next_token, ..Default::default() };
                    Payload::PurgeDeadLettersResponse(answer)
                }
                other => panic!("{other:?}"),
            }
        });
        (address, requests)
    }

    #[tokio::test]
    async fn list_goes_through_empty_pages() {
        let (address, requests) = node().await;
        let (printed, result) = boomtool(&format!("dlq list --class refused --all --addr {address}")).await;
        result.unwrap();
        assert_eq!(printed.lines().count(), 1 + 5, "{printed}");
        assert!(printed.starts_with("DEAD LETTER ") && printed.contains("refused: nobody listens"), "{printed}");
        let (printed, result) = boomtool(&format!("dlq list --limit 3 --json --addr {address}")).await;
        result.unwrap();
        assert_eq!(printed.lines().count(), 3);
        let object: Value = serde_json::from_str(printed.lines().next().unwrap()).unwrap();
        assert_eq!(object["dead_letter_id"], fake::dead_letter_id(1).to_string());
        assert_eq!((&object["payload"], &object["failure"]["class"]), (&json!("dead"), &json!("refused")));
        let Payload::ListDeadLettersRequest(first) = &requests.lock()[0] else { panic!() };
        assert_eq!(first.filter.as_ref().unwrap().failure_class(), proto::FailureClass::Refused);
    }

    #[tokio::test]
    async fn get_shows_everything() {
        let (address, _) = node().await;
        let id = fake::dead_letter_id(1);
        let (printed, result) = boomtool(&format!("dlq get {id} --addr {address}")).await;
        result.unwrap();
        for part in [&id.to_string(), "orders", "tcp://h:1", "\"dead\"", "attempts     5", "refused: nobody listens"] {
            assert!(printed.contains(part), "{part}: {printed}");
        }
        let error = boomtool(&format!("dlq get {}@5 --addr {address}", fake::task_id(1))).await.1.unwrap_err();
        assert!(error.to_string().contains("was replayed or purged"), "{error}");
    }

    #[tokio::test]
    async fn replay_goes_on_until_nothing_is_left() {
        let (address, requests) = node().await;
        let (printed, result) = boomtool(&format!("dlq replay --all --name-prefix n --addr {address}")).await;
        result.unwrap();
        let first = format!("{}  replayed as {}", fake::dead_letter_id(1), fake::task_id(101));
        assert_eq!((printed.lines().count(), printed.lines().next()), (5, Some(first.as_str())));
        let tokens = |requests: &[Payload]| -> Vec<String> {
            requests
                .iter()
                .map(|request| match request {
                    Payload::ReplayDeadLettersRequest(request) => request.next_token.clone(),
                    other => panic!("{other:?}"),
                })
                .collect()
        };
        assert_eq!(tokens(&requests.lock()), ["", "a", "b", "c"]);

        let ids = [fake::dead_letter_id(1), fake::dead_letter_id(2)];
        let (printed, result) = boomtool(&format!("dlq replay {} {} --json --addr {address}", ids[0], ids[1])).await;
        assert_eq!(result.unwrap_err().to_string(), "1 of 2 dead letters were not found");
        let results: Vec<Value> =
            printed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["result"].clone()).collect();
        assert_eq!(results, [json!("replayed"), json!("not_found")]);
    }

    #[tokio::test]
    async fn purge_must_be_meant() {
        let (address, requests) = node().await;
        let error = boomtool(&format!("dlq purge --all --addr {address}")).await.1.unwrap_err();
        assert_eq!(error.exit_code(), 2, "nobody can be asked: {error}");
        let one = fake::dead_letter_id(1);
        let error = boomtool(&format!("dlq purge {one} --class refused --addr {address}")).await.1.unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(requests.lock().is_empty(), "nothing was purged by mistake");

        let (printed, result) = boomtool(&format!("dlq purge --all --yes --addr {address}")).await;
        result.unwrap();
        assert_eq!(printed, "5 dead letters purged\n");
        let (printed, result) = boomtool(&format!("dlq purge {one} {one} --json --addr {address}")).await;
        assert_eq!((printed.as_str(), result.unwrap_err().exit_code()), ("{\"purged\":1}\n", 1));
    }
}
