//! Who is no node of a cluster and speaks to the port for nodes: whatever it says, nothing is done and nothing is told.
//! And how the nodes of a cluster come to know each other by something else, without a stop.

mod common;

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use boomerang::raft::dial::Dial;
use boomerang::raft::peer_credentials::PeerCredentials;
use boomerang::raft::peer_secret::ClusterSecret;
use boomerang::sabotage::Fault;
use boomerang::store::codec;
use boomerang_task::locks::Mutex;
use boomerang_task::{ClientId, ClientLimits, Policy};
use boomerang_testkit::Certs;
use boomerang_wire::peer::nodes_client::NodesClient;
use boomerang_wire::peer::requests_client::RequestsClient;
use boomerang_wire::peer::{ForwardRequest, IdentifyRequest, StatusRequest, forward_response, identify_request};
use boomerang_wire::proto::{self, BoomerangEnvelope, ClientRegistrationRequest, boomerang_envelope::Payload};
use common::cluster::Cluster;
use common::node::{NodeProcess, boomerang, certs, free_address, serve_to_its_end};
use common::{eventually, http_get};
use prost::Message;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

const WITHIN: Duration = Duration::from_secs(10);

/// One cluster at a time: each has three nodes, and two cores between them.
static ALONE: Mutex<()> = Mutex::new(());

fn on_a_runtime<T>(what: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(what)
}

/// As a gRPC client of its own speaks to a node.
async fn channel(peer: SocketAddr, tls: Option<ClientTlsConfig>) -> Result<Channel, String> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{peer}")).unwrap().timeout(WITHIN);
    if let Some(tls) = tls {
        endpoint = endpoint.tls_config(tls).unwrap();
    }
    endpoint.connect().await.map_err(|error| error.to_string())
}

/// What a node says of itself to its peers.
fn ask_status(peer: SocketAddr, tls: Option<ClientTlsConfig>) -> Result<u64, String> {
    on_a_runtime(async {
        let request = StatusRequest { cluster: "boomerang".into() };
        let answer = NodesClient::new(channel(peer, tls).await?).status(request).await;
        Ok(answer.map_err(|status| status.to_string())?.into_inner().node_id)
    })
}

/// Makes itself an administrator, as whoever reached this port once could: `Forward` with a caller that it has made up.
fn make_administrator(peer: SocketAddr) -> Result<proto::Status, String> {
    let caller = (ClientId::ADMIN.parse::<ClientId>().unwrap(), true, None::<Policy>, ClientLimits::default());
    let register = ClientRegistrationRequest {
        client_id: "mallory".into(),
        password: "let me in".into(),
        is_admin: true,
        ..Default::default()
    };
    let envelope = BoomerangEnvelope {
        session_id: String::new(),
        request_id: 1,
        payload: Some(Payload::ClientRegistration(register)),
    };
    let request = ForwardRequest {
        cluster: "boomerang".into(),
        caller: codec::encode(&caller).into(),
        envelope: envelope.encode_to_vec().into(),
    };
    on_a_runtime(async {
        let answer = RequestsClient::new(channel(peer, None).await?).forward(request).await;
        let result = answer.map_err(|status| status.to_string())?.into_inner().result;
        let Some(forward_response::Result::Envelope(bytes)) = result else { return Err(format!("{result:?}")) };
        match BoomerangEnvelope::decode(bytes).unwrap().payload {
            Some(Payload::ClientRegistrationResponse(answer)) => Ok(answer.status()),
            other => Err(format!("{other:?}")),
        }
    })
}

/// Whether a node of `cluster` lets in who has made itself an administrator there.
fn strangers_get_in(cluster: &Cluster) -> bool {
    let peers = cluster.nodes.iter().map(|node| node.started.peer.unwrap());
    let made: Vec<_> = peers.map(make_administrator).collect();
    eprintln!("{made:?}");
    made.contains(&Ok(proto::Status::Ok))
}

#[test]
fn a_node_that_is_alone_listens_to_no_nodes() {
    let address = free_address();
    let node = NodeProcess::start(&["--peer-addr", &address]);
    assert_eq!(node.started.peer, None, "--peer-addr is given, and there are no peers");
    let error = TcpStream::connect(&address).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn without_a_certificate_of_the_common_authority_nobody_speaks_to_a_node() {
    let _alone = ALONE.lock_after_panic();
    let cluster = Cluster::with_peers(3, &[]);
    let peer = cluster.nodes[0].started.peer.unwrap();
    let read = |certs: &Certs, at: usize| std::fs::read_to_string(&certs.flags("node")[at]).unwrap();
    let (own, folder) = (certs(), tempfile::tempdir().unwrap());
    let foreign = Certs::make(boomerang(), folder.path(), [("node".to_owned(), "127.0.0.1")]).unwrap();
    let trusting = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&own, 5)));
    let with = |certs| trusting.clone().identity(Identity::from_pem(read(certs, 1), read(certs, 3)));
    assert_eq!(ask_status(peer, Some(with(&own))).unwrap(), 1, "the node that answers");
    ask_status(peer, None).unwrap_err();
    ask_status(peer, Some(trusting.clone())).unwrap_err();
    ask_status(peer, Some(with(&foreign))).unwrap_err();
    assert!(!strangers_get_in(&cluster));
    let who = Some(identify_request::Who::Client("admin".into()));
    let identify = IdentifyRequest { cluster: "boomerang".into(), who };
    on_a_runtime(async {
        let channel = channel(peer, None).await;
        let answer =
            async { RequestsClient::new(channel?).identify(identify).await.map_err(|error| error.to_string()) };
        answer.await.unwrap_err();
    });
    // And all of that costs the cluster nothing.
    let account = cluster.load(&["--tasks", "200", "--spread", "1s"]).finish();
    account.assert_promises();
    account.assert_all_acknowledged();
}

/// What the tests above rest on, taken away: they would notice.
#[test]
fn strangers_that_are_trusted_are_noticed() {
    let _alone = ALONE.lock_after_panic();
    let cluster = Cluster::broken(3, Fault::TrustStrangers);
    assert!(strangers_get_in(&cluster), "the switch changes nothing, or the attack is none");
}

#[test]
fn what_nodes_know_each_other_by_must_be_given_and_be_of_use() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (nonsense, secret) = (file("nonsense", "nonsense"), file("secret", "a secret of many letters"));
    let own = certs().flags("node");
    let peers = ["--peers", "1=127.0.0.1:1"];
    for (flags, code, why) in [
        (&["--cluster-secret", ""][..], 2, "are needed in a cluster"),
        (&["--peer-cert", &own[1]], 2, "are needed together"),
        (&["--peer-cert", &own[5], "--peer-key", &own[3], "--peer-ca", &own[5]], 1, "--peer-cert"),
        (&["--peer-cert", &own[1], "--peer-key", &nonsense, "--peer-ca", &own[5]], 1, "--peer-key"),
        (&["--peer-cert", &own[1], "--peer-key", &own[3], "--peer-ca", &nonsense], 1, "--peer-ca"),
        (&["--peer-cert", &own[1], "--peer-key", &own[3], "--peer-ca", "none"], 1, "cannot read none"),
        (&["--cluster-secret", "short"], 1, "shorter than 16 bytes"),
        // The file can be read by others.
        (&["--cluster-secret-file", &secret], 1, "chmod 600"),
        (&["--cluster-secret-file", &secret, "--advertise-host", "10.0.0.1"], 2, "on loopback only"),
    ] {
        let refused = serve_to_its_end(&folder.path().join("data"), &[&peers[..], flags].concat());
        assert!(refused.code == Some(code) && refused.stderr.contains(why), "{flags:?}: {refused:?}");
    }
}

/// Under load, node after node: first by a secret, then by both, then by certificates only. Nothing is lost, and at the end
/// the secret is of no use.
#[test]
fn a_cluster_goes_from_a_secret_to_certificates_without_a_stop() {
    let _alone = ALONE.lock_after_panic();
    const SECRET: &str = "a secret of many letters";
    let mut cluster = Cluster::with_peers(3, &["--cluster-secret", SECRET]);
    let load = cluster.load(&["--tasks", "3000", "--spread", "20s", "--lead", "3s"]);
    let by_secret = PeerCredentials::secret("boomerang", 9, ClusterSecret::new(SECRET).unwrap());
    let is_let_in = |cluster: &Cluster| {
        let address = cluster.nodes[0].started.peer.unwrap().to_string();
        on_a_runtime(async { by_secret.dial(1, &address).await.is_ok() })
    };
    roll(&mut cluster, |flags| flags.extend(certs().flags("node")));
    assert!(is_let_in(&cluster), "both are taken");
    roll(&mut cluster, |flags| {
        let at = flags.iter().position(|flag| flag == "--cluster-secret").unwrap();
        flags.drain(at..at + 2);
    });
    assert!(!is_let_in(&cluster), "the secret is not taken any more");
    let account = load.finish();
    account.assert_promises();
    account.assert_all_acknowledged();
    cluster.assert_replicas_agree();
}

/// One node after the other: it stops, and begins again with other flags.
fn roll(cluster: &mut Cluster, change: impl Fn(&mut Vec<String>)) {
    for node in 0..cluster.nodes.len() {
        assert_eq!(cluster.nodes[node].terminate(), Some(0), "node {} stops in order", node + 1);
        cluster.nodes[node].restart_changed(&change);
        eventually("a node is ready", || {
            (http_get(cluster.nodes[node].started.http, "/readyz").0 == 200).then_some(())
        });
    }
}
