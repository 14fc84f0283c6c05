//! The data folder and the process: who may start on it, with what, and how it stops and starts again.

mod common;

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use common::legacy::{Client, ListTasksRequest, OK, Payload, Task, UNAUTHORIZED, password_of};
use common::node::{ADMIN_PASSWORD, NodeProcess, run_to_its_end, serve_to_its_end};
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
    assert_eq!(node.terminate(), Some(0));
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
    assert_eq!(ended.code, Some(1));
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
    assert_eq!(contents(temp.path()), before);
    // A file where the folder should be.
    let ended = serve_to_its_end(&temp.path().join("thesis.tex"), &[]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("thesis.tex"), "{}", ended.stderr);
    assert_eq!(contents(temp.path()), before);
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
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("--data-dir"), "{}", ended.stderr);
    let ended = run_to_its_end(&["serve", "--data-dir", folder.to_str().unwrap(), "--tcp-addr", "nowhere"]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("--tcp-addr") && ended.stderr.contains("nowhere"), "{}", ended.stderr);
    assert_eq!(run_to_its_end(&["frobnicate"]).code, Some(2));
    assert_eq!(run_to_its_end(&["--help"]).code, Some(0));
    assert_eq!(run_to_its_end(&["--version"]).code, Some(0));
}

#[test]
fn a_port_in_use_is_named() {
    let temp = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let folder = temp.path().join("data");
    for flag in ["--tcp-addr", "--http-addr", "--peer-addr"] {
        let mut args = vec!["serve", "--data-dir", folder.to_str().unwrap()];
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
    assert_eq!(node.terminate(), Some(0));
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
    assert_eq!(arrived.task_id, while_down);
    client.throw(b"now", 0);
    receiver.next_is(b"now");
    assert_eq!(client.get(&later).task.unwrap().expiration_ms, later_ms);
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
            assert!(answer.send(()).is_ok());
        });
        // The receiver tells of an arrival only when it has answered, so the metric says that it is out.
        node.wait_for_metric("boomerang_in_flight", 1.0);
        assert_eq!(node.terminate(), Some(0));
        stopping.join().unwrap();
    });
    receiver.next_is(b"slow");
    node.restart();
    assert_eq!(node.metric("boomerang_pending"), 0.0, "it was settled before the end");
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
    assert_eq!(client.cancel(&cancelled).status, OK);
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
        assert_ne!(arrived.payload, b"cancelled");
        sentinel |= arrived.payload == b"sentinel";
        missing.remove(&arrived.task_id);
    }
    node.wait_for_metric("boomerang_pending", 0.0);
}

#[test]
fn a_password_is_made_up_when_none_is_given() {
    let mut node = NodeProcess::start_with(&[]);
    let path = node.data_dir().join("admin-password");
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let password = std::fs::read_to_string(&path).unwrap().trim().to_owned();
    assert!(password.len() >= 16, "{password}");
    Client::login(node.started.tcp, "admin", &password);
    assert_eq!(Client::connect(node.started.tcp).authenticate("admin", "").status, UNAUTHORIZED);
    assert!(!node.log().contains(&password), "it is nowhere else");
    // It stays, however the node ends. Several times: whether a start knows the administrator before it has read its
    // log to the end is a matter of luck.
    for _ in 0..4 {
        node.kill();
        node.restart();
        Client::login(node.started.tcp, "admin", &password);
        assert_eq!(std::fs::read_to_string(&path).unwrap().trim(), password);
    }
    std::fs::remove_file(&path).unwrap();
    node.kill();
    node.restart();
    Client::login(node.started.tcp, "admin", &password);
    assert!(!path.exists(), "there is nothing to be made up");
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
            assert!(matches!(client.answer(), Payload::RegistrationResponse(answer) if answer.status == OK));
        }
    }
    // Nothing of it was flushed: the next start reads it from the log, and must have done so when it says it is ready.
    node.kill();
    node.restart();
    // First what takes no time to ask.
    assert_eq!(node.metric("boomerang_pending"), TASKS as f64);
    let mut client = Client::login(node.started.tcp, "orders", &password_of("orders"));
    assert_eq!(client.list_all(&ListTasksRequest { limit: 1_000, ..Default::default() }).len(), TASKS);
}

#[test]
fn the_first_password_is_kept() {
    let mut node = NodeProcess::start(&[]);
    assert!(!node.data_dir().join("admin-password").exists(), "one was given");
    assert!(!node.log().contains(ADMIN_PASSWORD));
    assert_eq!(node.terminate(), Some(0));
    node.restart_with(&["--admin-password", "another one"]);
    assert_eq!(Client::connect(node.started.tcp).authenticate("admin", "another one").status, UNAUTHORIZED);
    node.admin();
}
