//! TLS of the listeners for clients: real nodes, the Rust client, and certificates that change.

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use boomerang_client::{Client, ClientError, Credentials, Options, TaskFilter, Tls};
use boomerang_testkit::{Certs, Signal};
use common::eventually;
use common::node::{ADMIN_PASSWORD, NodeProcess, TOOL_ENDS_WITHIN, boomerang, boomtool, serve_to_its_end, to_its_end};

const WITHIN: Duration = Duration::from_secs(5);

/// Certificates of one authority, for this machine.
fn certs(folder: &Path, names: &[&str]) -> Certs {
    let nodes = names.iter().map(|name| ((*name).to_owned(), "127.0.0.1,localhost"));
    Certs::make(boomerang(), folder, nodes).unwrap()
}

/// For `boomerang serve`.
fn flags(certs: &Certs, name: &str) -> [String; 4] {
    let [_, cert, _, key, ..] = certs.flags(name);
    ["--tls-cert".into(), cert, "--tls-key".into(), key]
}

fn tls(certs: &Certs) -> Tls {
    Tls::trusting(&std::fs::read(&certs.flags("any")[5]).unwrap()).unwrap()
}

fn start(flags: &[String]) -> NodeProcess {
    NodeProcess::start(&flags.iter().map(String::as_str).collect::<Vec<_>>())
}

async fn login(address: SocketAddr, tls: Option<Tls>) -> Result<Client, ClientError> {
    let credentials =
        Credentials::Password { client_id: "admin".parse().unwrap(), password: ADMIN_PASSWORD.to_owned() };
    let options = Options::new(vec![address.to_string()], credentials);
    Client::connect(Options { tls, connect_timeout: WITHIN, ..options }).await
}

fn block_on<T>(what: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(what)
}

/// What comes back for bytes that are not TLS.
fn in_clear(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(WITHIN)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

const GET: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

#[test]
fn clients_come_by_tls_and_nobody_without() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (own, foreign) = (certs(folder.path(), &["node"]), certs(other.path(), &["node"]));
    let node = start(&flags(&own, "node"));
    let (tcp, http) = (node.started.tcp, node.started.http);
    block_on(async {
        let client = login(tcp, Some(tls(&own))).await.unwrap();
        client.list(TaskFilter::default()).await.unwrap();
        let error = format!("{:?}", login(tcp, Some(tls(&foreign))).await.err().unwrap());
        assert!(error.contains("InvalidCertificate"), "{error}");
        assert!(login(tcp, None).await.is_err(), "without TLS");
    });
    assert_eq!(in_clear(tcp, b"\0\0\0\0"), b"", "nothing is said in clear");
    assert_eq!(in_clear(http, GET), b"", "nothing is said in clear");
    let ca = own.flags("any")[5].clone();
    let tool = |flags: &[&str]| {
        let mut command = boomtool();
        command.args(["--addr", &tcp.to_string(), "--password", ADMIN_PASSWORD, "task", "list"]).args(flags);
        to_its_end(&mut command, TOOL_ENDS_WITHIN)
    };
    let listed = tool(&["--ca", &ca]);
    assert_eq!(listed.code, Some(0), "{listed:?}");
    // Whom this machine trusts has not signed it.
    let refused = tool(&["--tls"]);
    assert_ne!(refused.code, Some(0), "{refused:?}");
    let health = block_on(async {
        let ca = reqwest::Certificate::from_pem(&std::fs::read(&ca).unwrap()).unwrap();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().tls_certs_only([ca]).build().unwrap();
        client.get(format!("https://localhost:{}/healthz", http.port())).send().await.unwrap().text().await.unwrap()
    });
    assert_eq!(health, "ok\n");
}

#[test]
fn both_are_taken_while_clients_change_over() {
    let folder = tempfile::tempdir().unwrap();
    let own = certs(folder.path(), &["node"]);
    let node = start(&[&flags(&own, "node")[..], &["--insecure-plaintext".into()]].concat());
    block_on(async {
        login(node.started.tcp, Some(tls(&own))).await.unwrap();
        login(node.started.tcp, None).await.unwrap();
    });
    assert!(in_clear(node.started.http, GET).starts_with(b"HTTP/1.1 200"));
}

/// New files are seen, by their change and by SIGHUP; what is no pair changes nothing; and who is in stays in.
#[test]
fn certificates_are_read_again_and_nobody_is_hung_up_on() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (old, new) = (certs(folder.path(), &["node"]), certs(other.path(), &["node"]));
    let node = start(&flags(&old, "node"));
    let tcp = node.started.tcp;
    let [_, cert, _, key] = flags(&old, "node");
    let copy = |from: &str, to: &str| std::fs::copy(from, to).unwrap();
    let [_, new_cert, _, new_key] = flags(&new, "node");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let is_taken = |tls: Tls| runtime.block_on(login(tcp, Some(tls))).is_ok();
    let inside = runtime.block_on(login(tcp, Some(tls(&old)))).unwrap();
    copy(&new_key, &key);
    node.signal(Signal::HUP);
    eventually("half of a pair is noticed", || node.log().contains("stay as they were").then_some(()));
    assert!(is_taken(tls(&old)), "the old pair is used");
    copy(&new_cert, &cert);
    eventually("the new pair is used", || is_taken(tls(&new)).then_some(()));
    assert!(!is_taken(tls(&old)), "the old pair is not");
    runtime.block_on(inside.list(TaskFilter::default())).unwrap();
}

#[test]
fn what_others_reach_is_not_without_tls_unless_somebody_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let own = certs(folder.path(), &["node"]);
    let data = folder.path().join("data");
    let flags = flags(&own, "node");
    let ca = own.flags("any")[5].clone();
    for (refused, code, why) in [
        (&["--tls-cert", &flags[1]][..], 2, "are needed together"),
        (&["--tls-cert", &flags[1], "--tls-key", "none"], 1, "--tls-key: cannot read none"),
        (&["--tls-cert", &flags[3], "--tls-key", &flags[3]], 1, "--tls-cert"),
        // Not the key of this certificate.
        (&["--tls-cert", &ca, "--tls-key", &flags[3]], 1, "--tls-cert"),
    ] {
        let ended = serve_to_its_end(&data, refused);
        assert!(ended.code == Some(code) && ended.stderr.contains(why), "{refused:?}: {ended:?}");
    }
    let open = NodeProcess::start(&["--tcp-addr", "0.0.0.0:0", "--insecure-plaintext"]);
    block_on(login(([127, 0, 0, 1], open.started.tcp.port()).into(), None)).unwrap();
}
