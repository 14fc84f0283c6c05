//! An etcd that asks for a certificate, a user and a password, as one that others can reach should.

mod common;

use boomerang_testkit::Certs;
use common::etcd::Etcd;
use common::eventually;
use common::node::{NodeProcess, boomerang, serve_to_its_end};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, Permission, PermissionType, TlsOptions};

const USER: &str = "boomerang";
const PASSWORD: &str = "a password for etcd";

/// From here on, nothing is done for anybody but its users.
fn ask_for_users(etcd: &Etcd, certs: &Certs) {
    let read = |at: usize| std::fs::read(&certs.flags("etcd")[at]).unwrap();
    let tls =
        TlsOptions::new().ca_certificate(Certificate::from_pem(read(5))).identity(Identity::from_pem(read(1), read(3)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = Client::connect([etcd.url()], Some(ConnectOptions::new().with_tls(tls))).await.unwrap();
        client.user_add("root", "root's", None).await.unwrap();
        client.role_add("root").await.unwrap();
        client.user_grant_role("root", "root").await.unwrap();
        client.user_add(USER, PASSWORD, None).await.unwrap();
        client.role_add(USER).await.unwrap();
        // What `boomerang serve --help` says is needed.
        let keys = Permission::new(PermissionType::Readwrite, "/boomerang/").with_prefix();
        client.role_grant_permission(USER, keys).await.unwrap();
        client.user_grant_role(USER, USER).await.unwrap();
        client.auth_enable().await.unwrap();
    });
}

#[test]
fn an_etcd_is_spoken_to_as_a_user_with_a_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let hosts = "127.0.0.1,localhost";
    let certs = Certs::make(boomerang(), folder.path(), ["etcd", "node"].map(|name| (name.to_owned(), hosts))).unwrap();
    let etcd = Etcd::start_with_tls(&certs);
    ask_for_users(&etcd, &certs);
    let password = folder.path().join("password");
    std::fs::write(&password, format!("{PASSWORD}\n")).unwrap();
    let (url, password) = (etcd.url(), password.to_str().unwrap());
    let peer = certs.flags("node");
    let (cert, key, ca) = (peer[1].as_str(), peer[3].as_str(), peer[5].as_str());
    let cluster = ["--etcd", &url, "--replicas", "1", "--bootstrap-expect", "1"];
    let user = ["--etcd-user", USER, "--etcd-password-file", password];
    let identity = ["--etcd-ca", ca, "--etcd-cert", cert, "--etcd-key", key];
    let node = NodeProcess::start(&[&cluster[..], &user, &identity].concat());
    node.admin();
    // Whoever lacks something says what; a node that is in stays, so these need a number each.
    let cases: [(&[&[&str]], &str); 4] = [
        (&[&["--etcd-user", USER, "--etcd-password", "wrong"], &identity], "authentication failed"),
        (&[&identity], "permission denied"),
        (&[&user, &["--etcd-ca", ca]], "not registered in etcd yet"),
        (&[&user, &["--etcd-cert", cert, "--etcd-key", key]], "UnknownIssuer"),
    ];
    for (number, (flags, why)) in (2..).zip(cases) {
        let number = number.to_string();
        let flags = [&cluster[..], &["--node-id", &number], &flags.concat()].concat();
        let node = NodeProcess::start_unready(&flags);
        eventually(&format!("{flags:?} says {why}"), || node.log().contains(why).then_some(()));
        assert_eq!(node.exit_code(), None, "it goes on trying");
    }
    let nonsense = [&cluster[..], &user, &["--etcd-ca", password]].concat();
    let refused = serve_to_its_end(&folder.path().join("data"), &nonsense);
    assert!(refused.code == Some(1) && refused.stderr.contains("holds nothing in PEM"), "{refused:?}");
}
