//! The data folder and the process: who may start on it, with what, and how it stops and starts again.

mod common;

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use boomerang::store::keys::Key;
use boomerang::store::overlay::Write;
use boomerang::store::{LogWrite, Store};
use boomerang::task::GroupId;
use common::legacy::{Client, ListTasksRequest, OK, Payload, Task, UNAUTHORIZED, password_of};
use common::node::{ADMIN_PASSWORD, Ended, NodeProcess, run_to_its_end, serve_to_its_end};
use common::raw::Raw;
use common::receiver::{Does, Receiver, Serves};

/// From the start of a process to its start line, on a folder that has data. It takes a tenth of that.
const START_MAX: Duration = Duration::from_secs(3);

/// Every file below a folder, with its bytes.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let name = entry.path().display().to_string();
        if entry.path().is_dir() {
            files.push((name, Vec::new()));
            files.extend(contents(&entry.path()));
        } else {
            files.push((name, std::fs::read(entry.path()).unwrap()));
        }
    }
    files.sort();
    files
}

#[test]
fn a_second_process_on_a_folder_is_refused() {
    let node = NodeProcess::start(&[]);
    let ended = serve_to_its_end(&node.data_dir(), &[]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert_eq!(ended.stdout, "", "no start line");
    let folder = node.data_dir().display().to_string();
    assert!(ended.stderr.contains(&folder), "{}", ended.stderr);
    assert!(ended.stderr.contains(&format!("pid {}", node.pid())), "{}", ended.stderr);
    // The first one does not mind.
    node.admin();
    assert_eq!(ended.stderr.lines().filter(|line| line.starts_with("error:")).count(), 1, "{}", ended.stderr);
}

#[test]
fn folders_of_others_are_refused_and_left_alone() {
    let mut node = NodeProcess::start(&["--shards", "4"]);
    assert_eq!(node.terminate(), Some(0), "exit code after SIGTERM");
    let folder = node.data_dir();
    for (flags, why) in [
        (
            vec!["--shards", "4", "--cluster", "prod"],
            "cluster 'boomerang', not 'prod'; choose another --data-dir or correct --cluster",
        ),
        (vec!["--shards", "4", "--node-id", "2"], "node 1, not 2; choose another --data-dir or correct --node-id"),
        (vec!["--shards", "8"], "shards"),
        (vec![], "4, not 16; choose another --data-dir or correct --shards"),
    ] {
        let ended = serve_to_its_end(&folder, &flags);
        assert_eq!(ended.code, Some(1), "{flags:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(why), "{flags:?}: {}", ended.stderr);
    }
    // Written by something newer, in a way we know nothing of.
    let identity = folder.join("boomerang.json");
    let ours = std::fs::read(&identity).unwrap();
    std::fs::write(&identity, r#"{"format": 4711, "of_the_future": []}"#).unwrap();
    let before = contents(&folder.join("db"));
    let ended = serve_to_its_end(&folder, &["--shards", "4"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("format 4711") && ended.stderr.contains("newer"), "{}", ended.stderr);
    assert_eq!(contents(&folder.join("db")), before, "nothing was touched");
    std::fs::write(&identity, "{ not json").unwrap();
    let ended = serve_to_its_end(&folder, &["--shards", "4"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("boomerang.json") && ended.stderr.contains("damaged"), "{}", ended.stderr);
    // And it is still good for the one it belongs to.
    std::fs::write(&identity, ours).unwrap();
    node.restart();
    node.admin();
}

#[test]
fn a_folder_with_somebodys_files_is_refused_and_untouched() {
    let temp = tempfile::tempdir().unwrap();
    std::fs::create_dir(temp.path().join("photos")).unwrap();
    std::fs::write(temp.path().join("photos/cat.jpg"), "meow").unwrap();
    std::fs::write(temp.path().join("thesis.tex"), "years of work").unwrap();
    let before = contents(temp.path());
    let ended = serve_to_its_end(temp.path(), &[]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("boomerang.json") && ended.stderr.contains("empty"), "{}", ended.stderr);
    assert_eq!(contents(temp.path()), before, "a folder that is refused stays as it was");
    // A file where the folder should be.
    let ended = serve_to_its_end(&temp.path().join("thesis.tex"), &[]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("thesis.tex"), "{}", ended.stderr);
    assert_eq!(contents(temp.path()), before, "a file that is refused as a folder stays as it was");
}

#[test]
fn inspect_shows_what_a_stopped_node_holds_and_changes_nothing() {
    const LATER_MS: u64 = 3_600_000;
    let mut node = NodeProcess::start(&["--shards", "2"]);
    node.admin().add_client("orders", "127.0.0.1:1", None);
    let mut client = Client::login(node.started.tcp, "orders", &password_of("orders"));
    let (task, due_ms) = client.throw(b"open sesame", LATER_MS);
    let (other, _) = client.throw(b"another", LATER_MS);
    let (cancelled, _) = client.throw(b"cancelled", LATER_MS);
    assert_eq!(client.cancel(&cancelled).status, OK);
    node.kill();
    let folder = node.data_dir();
    // All of it is in the log, and the state is as old as its last flush.
    let before = contents(&folder);
    let found = inspect_json(&folder, &[]);
    let to_apply: u64 = found.groups().map(|group| number(&group["to_apply"])).sum();
    assert!(to_apply > 0 && number(&found.0["tasks"]) < 2, "{:?}", found.0);
    let ended = inspect(&folder, &["--task", &task]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains(" register (not applied yet)"), "{}", ended.stdout);
    assert_eq!(contents(&folder), before);

    node.restart();
    assert_eq!(node.terminate(), Some(0));
    let before = contents(&folder);
    let found = inspect_json(&folder, &[]);
    for (field, wanted) in [("format", 4), ("node_id", 1), ("shards", 2), ("tasks", 2), ("damaged_rows", 0)] {
        assert_eq!(number(&found.0[field]), wanted, "{field} in {:?}", found.0);
    }
    assert_eq!(found.0["cluster"], "boomerang");
    assert_eq!(found.0["clients"], serde_json::json!(["admin", "orders"]));
    assert_eq!(found.groups().map(|group| number(&group["group"])).collect::<Vec<_>>(), [0, 1, 2]);
    for group in found.groups() {
        assert_eq!(number(&group["to_apply"]), 0, "{group}");
        assert_eq!(group["applied"]["index"], group["log"]["last"]["index"], "{group}");
        assert_eq!(group["membership"]["voters"], serde_json::json!([{ "replica": 1, "node_id": 1 }]), "{group}");
        assert_eq!(group["rows"].get("task").map_or(0, number), number(&group["tasks"]), "{group}");
    }
    let holds = found.groups().find(|group| number(&group["tasks"]) > 0).unwrap();
    let number_of_group = number(&holds["group"]).to_string();
    let one = inspect_json(&folder, &["--group", &number_of_group]);
    assert_eq!(one.groups().collect::<Vec<_>>(), [holds]);

    let text = |flags: &[&str]| {
        let ended = inspect(&folder, flags);
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{flags:?}");
        ended.stdout
    };
    let page = text(&[]);
    for wanted in ["node 1 of cluster 'boomerang', 2 shards, format 4", "2 tasks", "2 clients (admin, orders)", "GROUP"]
    {
        assert!(page.contains(wanted), "{wanted} is missing in:\n{page}");
    }
    assert!(!page.contains("Damaged"), "{page}");
    let paragraph = text(&["--group", &format!("g{number_of_group}")]);
    for wanted in ["voters 1 (node 1)", holds["digest"].as_str().unwrap(), "armed up to"] {
        assert!(paragraph.contains(wanted), "{wanted} is missing in:\n{paragraph}");
    }
    let rows = text(&["--rows"]);
    assert_eq!(rows.lines().filter(|line| line.starts_with("state") && line.contains(" task 0")).count(), 2, "{rows}");
    let as_json = text(&["--rows", "--json"]);
    assert_eq!(as_json.lines().count(), rows.lines().count());
    let lines: Vec<serde_json::Value> = as_json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|line| line["row"] == format!("task {task}") && line["family"] == "state"), "{as_json}");
    let of_task = text(&["--task", &task]);
    for wanted in
        [&format!(" task {task} client=orders"), &format!(" timeline {due_ms} {task}"), " policy ", "open sesame"]
    {
        assert!(of_task.contains(wanted), "{wanted} is missing in:\n{of_task}");
    }
    assert!(!of_task.contains(&other), "{of_task}");
    for shown in [page, paragraph, rows, as_json, of_task] {
        assert!(!shown.contains("argon2") && !shown.contains(ADMIN_PASSWORD), "{shown}");
    }
    assert_eq!(contents(&folder), before, "nothing was changed");
    node.restart();
    assert_eq!(node.metric("boomerang_pending"), 2.0);
}

#[test]
fn inspect_refuses_what_it_cannot_show_and_says_what_to_do() {
    let mut node = NodeProcess::start(&["--shards", "2"]);
    let folder = node.data_dir();
    let ended = inspect(&folder, &[]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""));
    for wanted in
        [format!("pid {}", node.pid()), folder.display().to_string(), "stop it first".into(), "boomtool".into()]
    {
        assert!(ended.stderr.contains(&wanted), "{wanted} is missing in: {}", ended.stderr);
    }
    node.admin();
    assert_eq!(node.terminate(), Some(0));

    let temp = tempfile::tempdir().unwrap();
    let other = |name: &str, files: &[(&str, &str)]| {
        let path = temp.path().join(name);
        std::fs::create_dir(&path).unwrap();
        files.iter().for_each(|(file, text)| std::fs::write(path.join(file), text).unwrap());
        path
    };
    let identity = std::fs::read_to_string(folder.join("boomerang.json")).unwrap();
    let of_shard = |shard: u16| format!("01a1fcdf-d301-7{shard:03x}-838b-2ee828ed8c5d");
    let thesis = other("thesis", &[("thesis.tex", "years of work")]);
    let before = contents(temp.path());
    let near = format!("did you mean {}?", folder.display());
    for (path, flags, code, why) in [
        (temp.path().join("missing"), vec![], 1, "No such file or directory"),
        (thesis.join("thesis.tex"), vec![], 1, "cannot read boomerang.json: Not a directory"),
        (other("empty", &[]), vec![], 1, "is empty: no node was ever started on it"),
        (thesis.clone(), vec![], 1, "it is not the data folder of a node; give the folder"),
        (folder.join("db"), vec![], 1, &near[..]),
        (folder.parent().unwrap().to_owned(), vec![], 1, &near[..]),
        (other("newer", &[("boomerang.json", r#"{"format": 4711}"#)]), vec![], 1, "format 4711"),
        (other("older", &[("boomerang.json", r#"{"format": 1}"#)]), vec![], 1, "the one that wrote it can"),
        (other("damaged", &[("boomerang.json", "{ not json")]), vec![], 1, "boomerang.json is damaged"),
        (other("begun", &[("boomerang.json", &identity)]), vec![], 1, "holds no database"),
        (folder.clone(), vec!["--group", "3"], 1, "it holds groups 0, 1, 2"),
        (folder.clone(), vec!["--group", "3", "--rows"], 1, "it holds groups 0, 1, 2"),
        (folder.clone(), vec!["--task", &of_shard(1)], 1, "no row of group 2 names it"),
        (folder.clone(), vec!["--task", &of_shard(2)], 1, "this cluster has shards 0 to 1"),
        (folder.clone(), vec!["--group", "many"], 2, "--group"),
        (folder.clone(), vec!["--group", "4097"], 2, "0 to 4096"),
        (folder.clone(), vec!["--task", "nonsense"], 2, "is not a UUID"),
        (folder.clone(), vec!["--task", &of_shard(0), "--rows"], 2, "--rows"),
    ] {
        let ended = inspect(&path, &flags);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(code), ""), "{path:?} {flags:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(why), "{path:?} {flags:?}: {}", ended.stderr);
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    }
    assert!(before.iter().all(|file| contents(temp.path()).contains(file)), "nothing was changed");
    assert_eq!(run_to_its_end(&["inspect"]).code, Some(2));
    let help = run_to_its_end(&["inspect", "--help"]);
    assert!(help.code == Some(0) && help.stdout.contains("Examples:"), "{}", help.stdout);
}

#[test]
fn inspect_names_what_is_damaged() {
    let mut node = NodeProcess::start(&["--shards", "2"]);
    node.admin().add_client("orders", "127.0.0.1:1", None);
    assert_eq!(node.terminate(), Some(0));
    let folder = node.data_dir();
    let last = {
        let store = Store::open(&folder.join("db")).unwrap();
        let meta = Key::shard_meta(GroupId(1));
        let client = Key::client("admin");
        let cut_off = store.get_state(&client).unwrap().unwrap()[..40].to_vec();
        store.write_state([(meta, Write::Put(vec![99])), (client, Write::Put(cut_off))]).unwrap();
        let cluster = GroupId::CLUSTER;
        let (from, until) = (Key::log_entry(cluster, 0), Key::log_end(cluster));
        let rows = store.scan_log(&from, &until, usize::MAX).unwrap();
        let last = rows.len() as u64 - 1;
        assert!(last > 1, "there is one between the first and the last");
        let gone = LogWrite::DeleteRange(Key::log_entry(cluster, 1), Key::log_entry(cluster, last));
        store.write_log(vec![gone]).unwrap();
        store.flush_state(true).unwrap();
        last
    };
    let ended = inspect(&folder, &[]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains(&format!("error: {} rows are damaged or missing", 2 + last - 1)), "{}", ended.stderr);
    for wanted in [
        "state g0 client \"admin\" ? the value is damaged",
        "state g1 meta ? the value is damaged: version 99 is unknown",
        &format!("log   g0 entries 1 to {} ? they are missing", last - 1),
    ] {
        assert!(ended.stdout.contains(wanted), "{wanted} is missing in:\n{}", ended.stdout);
    }
    let rows = inspect(&folder, &["--rows"]);
    assert_eq!(rows.code, Some(1));
    assert!(rows.stderr.contains("error: 2 rows are damaged"), "{}", rows.stderr);
    assert_eq!(rows.stdout.lines().filter(|line| line.contains(" ? ")).count(), 2, "{}", rows.stdout);
    assert!(!rows.stdout.contains("argon2") && !ended.stdout.contains("argon2"));
    // Below the rows: a file of the database.
    let tables = contents(&folder.join("db")).into_iter().filter(|(name, _)| name.ends_with(".sst"));
    for (name, mut bytes) in tables {
        bytes[..16].fill(0xff);
        std::fs::write(name, bytes).unwrap();
    }
    let ended = inspect(&folder, &["--rows"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stdout);
    assert!(ended.stderr.contains("Corruption") && ended.stderr.contains(".sst"), "{}", ended.stderr);
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
}

/// What `boomerang inspect --json` found, when all of it can be read.
struct Found(serde_json::Value);

impl Found {
    fn groups(&self) -> impl Iterator<Item = &serde_json::Value> {
        self.0["groups"].as_array().unwrap().iter()
    }
}

fn number(value: &serde_json::Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is a number"))
}

fn inspect_json(folder: &Path, flags: &[&str]) -> Found {
    let ended = inspect(folder, &[flags, &["--json"]].concat());
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{}", ended.stdout);
    assert_eq!(ended.stdout.lines().count(), 1, "{}", ended.stdout);
    Found(serde_json::from_str(&ended.stdout).unwrap())
}

fn inspect(folder: &Path, flags: &[&str]) -> Ended {
    run_to_its_end(&[&["inspect", folder.to_str().unwrap()], flags].concat())
}

#[test]
fn wrong_usage_names_the_flag() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("data");
    let long = "x".repeat(1_025);
    for (flags, why) in [
        (vec!["--shards", "0"], "--shards"),
        (vec!["--shards", "many"], "--shards"),
        (vec!["--node-id", "0"], "--node-id"),
        (vec!["--cluster", "a b"], "--cluster"),
        (vec!["--session-timeout", "30"], "--session-timeout"),
        (vec!["--delay-max", "0s"], "--delay-max"),
        (vec!["--payload-max", "1048576"], "--payload-max"),
        (vec!["--frame-max", "1"], "--frame-max"),
        (vec!["--write-timeout", "1ms"], "--write-timeout"),
        (vec!["--connections-max", "0"], "--connections-max"),
        (vec!["--tick-ms", "0"], "--tick-ms"),
        (vec!["--wheel-levels", "99"], "--wheel-levels"),
        (vec!["--window", "1ms"], "--window"),
        (vec!["--disk-free-min", "18446744073709551615"], "--disk-free-min"),
        (vec!["--disk-reserve", "18446744073709551615"], "--disk-reserve"),
        (vec!["--admin-password", &long], "--admin-password"),
        (vec!["--log", "=?="], "--log"),
        (vec!["--no-such-flag"], "--no-such-flag"),
        (vec!["--config", "/nowhere/boomerang.toml"], "/nowhere/boomerang.toml"),
    ] {
        let ended = serve_to_its_end(&folder, &flags);
        assert_eq!(ended.code, Some(2), "{flags:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(why), "{flags:?}: {}", ended.stderr);
        assert_eq!(ended.stdout, "", "{flags:?}");
    }
    assert!(!folder.exists(), "nothing is made before the settings are right");
    let ended = run_to_its_end(&["serve"]);
    assert_eq!(ended.code, Some(2), "without a folder: {}", ended.stderr);
    assert!(ended.stderr.contains("--data-dir"), "{}", ended.stderr);
    let ended = run_to_its_end(&["serve", "--data-dir", folder.to_str().unwrap(), "--tcp-addr", "nowhere"]);
    assert_eq!(ended.code, Some(2), "with an address that is none: {}", ended.stderr);
    assert!(ended.stderr.contains("--tcp-addr") && ended.stderr.contains("nowhere"), "{}", ended.stderr);
    for (argument, code) in [("frobnicate", 2), ("--help", 0), ("--version", 0)] {
        let ended = run_to_its_end(&[argument]);
        assert_eq!(ended.code, Some(code), "exit code of 'boomerang {argument}': {}", ended.stderr);
    }
}

#[test]
fn a_port_in_use_is_named() {
    let temp = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let folder = temp.path().join("data");
    for flag in ["--tcp-addr", "--http-addr", "--peer-addr"] {
        // One that is alone does not listen for others.
        let known_by = ["--peers", "1=127.0.0.1:1", "--cluster-secret", "a secret of many letters"];
        let mut args = [&["serve", "--data-dir", folder.to_str().unwrap()][..], &known_by].concat();
        for any in ["--tcp-addr", "--http-addr", "--peer-addr"] {
            args.extend([any, if any == flag { &address } else { "127.0.0.1:0" }]);
        }
        let ended = run_to_its_end(&args);
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        assert!(ended.stderr.contains(&address) && ended.stderr.contains(flag), "{}", ended.stderr);
    }
}

#[test]
fn a_node_stops_in_order_and_starts_again_at_once() {
    let receiver = Receiver::that_accepts();
    let mut node = NodeProcess::start(&[]);
    node.admin().add_client("orders", &receiver.endpoint(), None);
    let mut client = Client::login(node.started.tcp, "orders", &password_of("orders"));
    let (while_down, _) = client.throw(b"while it is down", 600);
    let (later, later_ms) = client.throw(b"later", 3_600_000);
    let first = node.took;
    // Connections that are open and say nothing do not keep it from stopping.
    let idle = Raw::connect(node.started.tcp);
    let idle_http = Raw::connect(node.started.http);
    let begun = std::time::Instant::now();
    assert_eq!(node.terminate(), Some(0), "exit code after SIGTERM");
    let stopped = begun.elapsed();
    drop((idle, idle_http));
    assert!(stopped < Duration::from_secs(5), "it took {stopped:?} to stop");
    // A session does not outlive the node; the connection has been closed.
    client.raw.assert_closed();

    node.restart();
    eprintln!("first start {first:?}, stop {stopped:?}, second start {:?}", node.took);
    assert!(node.took < START_MAX, "the second start took {:?}", node.took);
    // At once: a login, a request and a callback.
    let mut client = Client::login(node.started.tcp, "orders", &password_of("orders"));
    let arrived = receiver.next_is(b"while it is down");
    assert_eq!(arrived.task_id, while_down, "the task that came due while the node was down");
    client.throw(b"now", 0);
    receiver.next_is(b"now");
    assert_eq!(client.get(&later).task.unwrap().expiration_ms, later_ms, "due instant of a task over a restart");
    node.wait_for_metric("boomerang_pending", 1.0);
    receiver.assert_nothing_came();
}

#[test]
fn what_is_out_comes_back_before_a_node_stops() {
    let (answer, may_answer) = std::sync::mpsc::channel::<()>();
    let may_answer = std::sync::Mutex::new(may_answer);
    let receiver = Receiver::start(Serves::All, move |payload, _| {
        if payload == b"slow" {
            may_answer.lock().unwrap().recv().unwrap();
        }
        Does::Accept
    });
    let mut node = NodeProcess::start(&[]);
    node.admin().add_client("orders", &receiver.endpoint(), None);
    let mut client = Client::login(node.started.tcp, "orders", &password_of("orders"));
    client.throw(b"slow", 0);
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| {
            // The stop is asked for while the receiver has the task, and is waiting for it.
            client.raw.assert_closed();
            answer.send(()).expect("the receiver is waiting to answer");
        });
        // The receiver tells of an arrival only when it has answered, so the metric says that it is out.
        node.wait_for_metric("boomerang_in_flight", 1.0);
        assert_eq!(node.terminate(), Some(0), "exit code after SIGTERM, with a task out");
        stopping.join().unwrap();
    });
    receiver.next_is(b"slow");
    node.restart();
    assert_eq!(node.metric("boomerang_pending"), 0.0, "what is out when a node stops is settled before it ends");
    receiver.assert_nothing_came();
}

#[test]
fn a_killed_node_has_lost_nothing() {
    let receiver = Receiver::that_accepts();
    let mut node = NodeProcess::start(&[]);
    node.admin().add_client("orders", &receiver.endpoint(), None);
    let mut client = Client::login(node.started.tcp, "orders", &password_of("orders"));
    let mut missing: std::collections::BTreeSet<String> =
        (0..50u64).map(|n| client.throw(b"survivor", 200 + 20 * n).0).collect();
    let (cancelled, _) = client.throw(b"cancelled", 1_500);
    let answer = client.cancel(&cancelled);
    assert_eq!(answer.status, OK, "{answer:?}");
    // In the middle of the firing.
    missing.remove(&receiver.next_is(b"survivor").task_id);
    node.kill();
    node.restart();
    eprintln!("start after a kill: {:?}", node.took);
    assert!(node.took < START_MAX, "the start took {:?}", node.took);
    let mut client = Client::login(node.started.tcp, "orders", &password_of("orders"));
    client.throw(b"sentinel", 1_800);
    let mut sentinel = false;
    while !missing.is_empty() || !sentinel {
        let arrived = receiver.next();
        assert_ne!(arrived.payload, b"cancelled", "a cancelled task came anyway: {arrived:?}");
        sentinel |= arrived.payload == b"sentinel";
        missing.remove(&arrived.task_id);
    }
    node.wait_for_metric("boomerang_pending", 0.0);
}

#[test]
fn a_password_is_made_up_when_none_is_given() {
    let mut node = NodeProcess::start_with(&[]);
    let path = node.data_dir().join("admin-password");
    let mode = path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600, "the file with the password is its owner's alone; its mode is {mode:o}");
    let password = std::fs::read_to_string(&path).unwrap().trim().to_owned();
    assert!(password.len() >= 16, "a password of {} characters is too short: {password}", password.len());
    Client::login(node.started.tcp, "admin", &password);
    let without = Client::connect(node.started.tcp).authenticate("admin", "");
    assert_eq!(without.status, UNAUTHORIZED, "without a password: {without:?}");
    assert!(!node.log().contains(&password), "the password is logged: {}", node.log());
    // It stays, however the node ends. Several times: whether a start knows the administrator before it has read its
    // log to the end is a matter of luck.
    for _ in 0..4 {
        node.kill();
        node.restart();
        Client::login(node.started.tcp, "admin", &password);
        assert_eq!(std::fs::read_to_string(&path).unwrap().trim(), password, "the password in the file after a kill");
    }
    std::fs::remove_file(&path).unwrap();
    node.kill();
    node.restart();
    Client::login(node.started.tcp, "admin", &password);
    assert!(!path.exists(), "a node that has an administrator makes up no password for it");
}

#[test]
fn a_node_that_is_ready_knows_all_it_knew() {
    const TASKS: usize = 20_000;
    let mut node = NodeProcess::start(&[]);
    node.admin().add_client("orders", "127.0.0.1:1", None);
    let mut client = Client::login(node.started.tcp, "orders", &password_of("orders"));
    let task = Task { payload: vec![b'x'; 100], delay_ms: 3_600_000, repeat_interval_ms: 0 };
    let register = client.frame(Payload::RegistrationRequest(task));
    for _ in 0..10 {
        client.raw.send_bytes(&register.repeat(TASKS / 10));
        for _ in 0..TASKS / 10 {
            let answer = client.answer();
            let accepted = matches!(&answer, Payload::RegistrationResponse(answer) if answer.status == OK);
            assert!(accepted, "a registration was refused: {answer:?}");
        }
    }
    // Nothing of it was flushed: the next start reads it from the log, and must have done so when it says it is ready.
    node.kill();
    node.restart();
    // First what takes no time to ask.
    assert_eq!(node.metric("boomerang_pending"), TASKS as f64, "tasks, at the moment the node says it is ready");
    let mut client = Client::login(node.started.tcp, "orders", &password_of("orders"));
    let listed = client.list_all(&ListTasksRequest { limit: 1_000, ..Default::default() }).len();
    assert_eq!(listed, TASKS, "tasks in the list, just after the node says it is ready");
}

#[test]
fn the_first_password_is_kept() {
    let mut node = NodeProcess::start(&[]);
    assert!(!node.data_dir().join("admin-password").exists(), "a password was made up though one was given");
    assert!(!node.log().contains(ADMIN_PASSWORD), "the password is logged: {}", node.log());
    assert_eq!(node.terminate(), Some(0), "exit code after SIGTERM");
    node.restart_with(&["--admin-password", "another one"]);
    let with_another = Client::connect(node.started.tcp).authenticate("admin", "another one");
    assert_eq!(with_another.status, UNAUTHORIZED, "a password given later changes nothing: {with_another:?}");
    node.admin();
}
