//! A real cluster: up, partitioned, healed, gone; and gone as well when the harness is killed.
//!
//! What needs namespaces is skipped with a message where they are not permitted. `BIN` names the folder of the server, if it is
//! not the one of the tests.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use boomerang::sabotage::Fault;
use boomerang_testkit::Handle;
use jepsen::cluster::links::cut_apart;
use jepsen::cluster::{Cluster, ClusterSettings, State, find_binaries};
use jepsen::fault::{self, Kind};
use jepsen::history::{Recorder, Stage, Watch, What};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

const WITHIN: Duration = Duration::from_secs(60);
/// In the environment of the test that is killed.
const VICTIM: &str = "JEPSEN_TEST_VICTIM";

struct Since(Instant);

impl Watch for Since {
    fn now_us(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_micros()).unwrap()
    }
}

fn recorder() -> Recorder {
    let began_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    Recorder::new(u64::try_from(began_ms).unwrap(), Since(Instant::now()))
}

fn settings() -> Option<ClusterSettings> {
    let binaries = find_binaries();
    if binaries.is_none() {
        eprintln!("skipped: no boomerang and boomtool to test with; build them with 'make build'");
    }
    binaries.map(|binaries| ClusterSettings { nodes: 3, ..ClusterSettings::new(binaries) })
}

/// Waits for what is written into the history.
async fn recorded<T>(recorder: &Recorder, what: &str, look: impl Fn(&What) -> Option<T>) -> T {
    let found = recorder.until(|history| history.events.iter().rev().find_map(|event| look(&event.what)));
    timeout(WITHIN, found).await.unwrap_or_else(|_| panic!("not within {WITHIN:?}: {what}"))
}

/// Who is the first to be seen to lead group 1 after `term`, but for `not`.
async fn leader_after(recorder: &Recorder, term: u64, not: u64) -> (u64, u64) {
    recorded(recorder, "another node leads group 1", |what| match what {
        What::Leads { group: 1, node, term: later } if *later > term && *node != not => Some((*node, *later)),
        _ => None,
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_cut_off_is_followed_by_another() {
    let Some(settings) = settings() else { return };
    let recorder = recorder();
    let cluster = Cluster::start(settings, recorder.clone()).await.unwrap();
    let Some(wire) = cluster.wire() else {
        eprintln!("skipped: no namespaces here");
        return cluster.stop().await;
    };
    let (before, before_term) = leader_after(&recorder, 0, 0).await;
    let host = cluster.node(before).unwrap().host;
    let others: Vec<usize> = cluster.places().filter(|other| *other != host).collect();
    let cut = wire.lay(cut_apart(&[host], &others));
    leader_after(&recorder, before_term, before).await;
    wire.lift(cut);
    fault::heal(&cluster).await.unwrap();
    let told = cluster.record_digests().await.unwrap();
    assert_eq!(told.code, Some(0), "{told:?}");
    let history = recorder.so_far();
    assert!(history.healed_us().is_some());
    let digests = history.events.iter().filter(|event| matches!(event.what, What::Digest { .. })).count();
    // Every group, the cluster's own among them, is on each of three nodes.
    assert_eq!(digests, 3 * (usize::from(cluster.settings().shards) + 1));
    assert!(cluster.panics().is_empty(), "{:?}", cluster.panics());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_loopback_processes_are_broken_and_networks_are_not() {
    let Some(settings) = settings() else { return };
    let recorder = recorder();
    let cluster = Cluster::start(ClusterSettings { loopback: true, ..settings }, recorder.clone()).await.unwrap();
    assert!(!cluster.has_network() && !cluster.has_disks());
    let stop = CancellationToken::new();
    let killed = |what: &What| matches!(what, What::Fault(note) if note.stage == Stage::Begin).then_some(());
    let stopping = async {
        recorded(&recorder, "a node is killed", killed).await;
        stop.cancel();
    };
    let (begun, ()) = tokio::join!(fault::run::run(&cluster, 1, &[Kind::Partition, Kind::Kill], &stop), stopping);
    assert_eq!(begun, 1);
    fault::heal(&cluster).await.unwrap();
    assert!(cluster.hosts().iter().all(|view| view.state == State::Up), "{:?}", cluster.hosts());
    let notes: Vec<(String, Stage)> = recorder.look(|history| {
        let note = |what: &What| match what {
            What::Fault(note) => Some((note.fault.clone(), note.stage)),
            _ => None,
        };
        history.events.iter().filter_map(|event| note(&event.what)).collect()
    });
    let notes: Vec<(&str, Stage)> = notes.iter().map(|(fault, stage)| (fault.as_str(), *stage)).collect();
    assert_eq!(notes, [("partition", Stage::Note), ("kill", Stage::Begin), ("kill", Stage::End)]);
    cluster.stop().await;
}

/// Node 1 of these waits for ever, and node 2 ends. Certificates are none that anybody looks at.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_ends_at_the_start_is_named_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let server = folder.path().join("boomerang");
    let script = "#!/bin/sh\n[ \"$1\" != certs ] || exit 0\ncase \"$*\" in *'--node-id 2 '*) echo 'no such luck' >&2; exit 3;; esac\nexec sleep 1000\n";
    std::fs::write(&server, script).unwrap();
    std::fs::set_permissions(&server, std::fs::Permissions::from_mode(0o755)).unwrap();
    let settings = ClusterSettings { nodes: 3, loopback: true, ..ClusterSettings::new(folder.path()) };
    let starting =
        timeout(WITHIN, Cluster::start(settings, recorder())).await.expect("sooner than it waits for node 1");
    let error = starting.err().expect("it cannot start").to_string();
    assert_eq!(error, "node 2 ended before it was ready (exit status: 3); its log ends with:\nno such luck");
}

const TASKS: usize = 300;

/// How many of [`TASKS`] acknowledged ones are there after the power was cut on every machine at once; `None` where it
/// cannot be cut, or the server cannot be broken.
async fn left_by_a_blackout(sabotage: &[Fault]) -> Option<usize> {
    let cluster =
        Cluster::start(ClusterSettings { sabotage: sabotage.to_vec(), ..settings()? }, recorder()).await.unwrap();
    if !cluster.has_disks() {
        eprintln!("skipped: no disks of their own here");
        cluster.stop().await;
        return None;
    }
    let tasks = TASKS.to_string();
    let register = ["bench", "register", "--keep", "--quiet", "--connections", "1", "--tasks", &tasks];
    let report = cluster.ok(&register).await.unwrap().lines.pop().unwrap();
    assert_eq!(report["acknowledged"], TASKS);
    if !sabotage.is_empty() && report["debug_assertions"] != true {
        eprintln!("skipped: a server without assertions cannot be broken");
        cluster.stop().await;
        return None;
    }
    let hosts: Vec<usize> = cluster.places().collect();
    cluster.cut_power(&hosts).await.unwrap();
    fault::heal(&cluster).await.unwrap();
    let left = cluster.ok(&["task", "list", "--all"]).await.unwrap().lines.len();
    cluster.stop().await;
    Some(left)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blackout_takes_nothing_that_was_synced_and_shows_when_it_was_not() {
    let Some(left) = left_by_a_blackout(&[]).await else { return };
    assert_eq!(left, TASKS);
    let Some(left) = left_by_a_blackout(&[Fault::SkipFsync]).await else { return };
    assert!(left < TASKS, "all of {left} are there, and nothing was synced");
}

/// Not a test: what [`nothing_is_left_of_a_harness_that_is_killed`] kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by another test"]
async fn victim() {
    if std::env::var_os(VICTIM).is_none() {
        return;
    }
    let cluster = Cluster::start(settings().unwrap(), recorder()).await.unwrap();
    cluster.pause_node(1).unwrap();
    let pids: Vec<String> = cluster.hosts().iter().filter_map(|view| view.pid).map(|pid| pid.to_string()).collect();
    let run = cluster.logs().parent().unwrap().display();
    println!("\nvictim {run} {}", pids.join(" "));
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn nothing_is_left_of_a_harness_that_is_killed() {
    if settings().is_none() {
        return;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "victim", "--nocapture"]).env(VICTIM, "1");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let said = lines.filter_map(|line| line.strip_prefix("victim ").map(str::to_owned)).next();
    let said = said.expect("it says that its cluster is up");
    let mut words = said.split(' ');
    let folder = words.next().unwrap().to_owned();
    let id = folder.rsplit_once("jepsen-").unwrap().1.to_owned();
    let processes: Vec<Handle> = words.map(|pid| Handle::of(pid.parse().unwrap()).unwrap()).collect();
    let left = || {
        let mut left: Vec<String> =
            Some(folder.clone()).filter(|path| std::path::Path::new(path).exists()).into_iter().collect();
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        left.extend(mounts.lines().filter(|line| line.contains(&folder)).map(str::to_owned));
        let namespaces = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
        let names = namespaces.map(|entry| entry.file_name().to_string_lossy().into_owned());
        left.extend(names.filter(|name| name.starts_with(&format!("bj-{id}-"))));
        left
    };
    assert!(!processes.is_empty() && left().len() > processes.len(), "it was there: {:?}", left());
    child.kill().unwrap();
    child.wait().unwrap();
    // Its keeper has its standard error too, and leaves it when all is done.
    let mut keeper = child.stderr.take().unwrap();
    let ended = tokio::task::spawn_blocking(move || std::io::copy(&mut keeper, &mut std::io::sink()));
    timeout(WITHIN, ended).await.expect("the keeper is done in time").unwrap().unwrap();
    assert_eq!(left(), Vec::<String>::new());
    // What was killed may take a moment to die.
    for process in &processes {
        assert!(process.ends_within(Duration::from_secs(60)), "it runs on");
    }
}
