//! Health, readiness and metrics of a real node.

mod common;

use common::http_get;
use common::legacy::{Client, INVALID_REQUEST, password_of};
use common::node::NodeProcess;
use common::receiver::Receiver;

/// What dashboards and alerts are built on: a name that goes missing breaks them.
const METRICS: [(&str, &str); 22] = [
    ("boomerang_lateness_seconds", "histogram"),
    ("boomerang_registration_latency_seconds", "histogram"),
    ("boomerang_registrations", "counter"),
    ("boomerang_refusals", "counter"),
    ("boomerang_cancellations", "counter"),
    ("boomerang_dispatches", "counter"),
    ("boomerang_acknowledged", "counter"),
    ("boomerang_failed_attempts", "counter"),
    ("boomerang_dead_letters", "gauge"),
    ("boomerang_pending", "gauge"),
    ("boomerang_wheel_timers", "gauge"),
    ("boomerang_wheel_bytes", "gauge"),
    ("boomerang_in_flight", "gauge"),
    ("boomerang_groups_led", "gauge"),
    ("boomerang_groups_suspended", "gauge"),
    ("boomerang_sessions", "gauge"),
    ("boomerang_connections", "gauge"),
    ("boomerang_log_syncs", "gauge"),
    ("boomerang_log_appends", "gauge"),
    ("boomerang_memtable_bytes", "gauge"),
    ("boomerang_disk_free_bytes", "gauge"),
    ("boomerang_clock_offset_us", "gauge"),
];

#[test]
fn a_node_that_has_said_it_is_ready_is_healthy_and_ready() {
    let node = NodeProcess::start(&[]);
    assert_eq!(http_get(node.started.http, "/healthz"), (200, "ok\n".to_owned()));
    assert_eq!(http_get(node.started.http, "/readyz"), (200, "ready\n".to_owned()));
    assert_eq!(http_get(node.started.http, "/nothing").0, 404, "a page that there is not");
}

#[test]
fn a_node_without_room_on_its_disk_is_healthy_and_not_ready() {
    // More than any disk has free.
    let mut node = NodeProcess::start(&[]);
    let receiver = Receiver::that_accepts();
    node.admin().add_client("orders", &receiver.endpoint(), None);
    node.kill();
    node.restart_with(&["--disk-free-min", "1000000000"]);
    assert_eq!(http_get(node.started.http, "/healthz").0, 200, "a node with a full disk is healthy");
    let (status, why) = http_get(node.started.http, "/readyz");
    assert!(status == 503 && why.contains("disk"), "a node with a full disk is not ready, and says so: {status} {why}");
    // What it says is what it does.
    let mut client = Client::login(node.started.tcp, "orders", &password_of("orders"));
    let refused = client.register(b"x", 0, 0);
    assert_eq!(refused.status, common::legacy::ERROR, "a node with a full disk takes no task: {refused:?}");
    assert!(refused.error_message.contains("disk"), "{refused:?}");
}

#[test]
fn metrics_have_their_names_and_move() {
    let receiver = Receiver::that_accepts();
    let node = NodeProcess::start(&["--shards", "4"]);
    let (status, page) = http_get(node.started.http, "/metrics");
    assert_eq!(status, 200, "{page}");
    for (name, kind) in METRICS {
        assert!(page.contains(&format!("# TYPE {name} {kind}\n")), "{name} is not a {kind} in:\n{page}");
        assert!(page.contains(&format!("# HELP {name} ")), "{name} is not explained");
    }
    assert!(page.ends_with("# EOF\n"), "a page that was cut off looks whole without its end");
    for zero in ["registrations_total", "dispatches_total", "acknowledged_total", "pending", "sessions", "connections"]
    {
        assert_eq!(node.metric(&format!("boomerang_{zero}")), 0.0, "{zero}");
    }
    assert_eq!(node.metric("boomerang_lateness_seconds_count"), 0.0);
    // The cluster's own group fires nothing.
    node.wait_for_metric("boomerang_groups_led", 4.0);
    assert!(node.metric("boomerang_disk_free_bytes") > 0.0);

    node.admin().add_client("orders", &receiver.endpoint(), None);
    let mut client = Client::login(node.started.tcp, "orders", &password_of("orders"));
    let syncs = node.metric("boomerang_log_syncs");
    client.throw(b"x", 3_600_000);
    let (near, _) = client.throw(b"y", 600_000);
    let refused = client.register(b"x", u64::MAX, 0);
    assert_eq!(refused.status, INVALID_REQUEST, "{refused:?}");
    assert_eq!(node.metric("boomerang_registrations_total"), 2.0);
    assert_eq!(node.metric("boomerang_refusals_total"), 1.0);
    assert_eq!(node.metric("boomerang_registration_latency_seconds_count"), 2.0);
    assert_eq!(node.metric("boomerang_pending"), 2.0);
    // An hour is beyond the window of half an hour, ten minutes are not.
    assert_eq!(node.metric("boomerang_wheel_timers"), 1.0);
    // The administrator's connection has ended, but it is up to the node when it notices.
    node.wait_for_metric("boomerang_connections", 1.0);
    assert_eq!(node.metric("boomerang_sessions"), 2.0);
    assert!(node.metric("boomerang_log_syncs") > syncs, "what is acknowledged is on the disk");
    assert!(node.metric("boomerang_memtable_bytes") > 0.0);
    let cancelled = client.cancel(&near);
    assert_eq!(cancelled.status, common::legacy::OK, "{cancelled:?}");
    assert_eq!(node.metric("boomerang_cancellations_total"), 1.0);
    assert_eq!(node.metric("boomerang_wheel_timers"), 0.0);

    for n in 0..5 {
        client.throw(b"fires", n * 10);
    }
    for _ in 0..5 {
        receiver.next_is(b"fires");
    }
    node.wait_for_metric("boomerang_pending", 1.0);
    assert_eq!(node.metric("boomerang_dispatches_total"), 5.0);
    assert_eq!(node.metric("boomerang_acknowledged_total"), 5.0);
    assert_eq!(node.metric("boomerang_failed_attempts_total"), 0.0);
    assert_eq!(node.metric("boomerang_in_flight"), 0.0);

    // The histogram of lateness: cumulative buckets up to all of them, and a sum that fits.
    let (_, page) = http_get(node.started.http, "/metrics");
    let buckets: Vec<f64> = page
        .lines()
        .filter(|line| line.starts_with("boomerang_lateness_seconds_bucket{le="))
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert!(buckets.len() > 10 && buckets.is_sorted(), "{buckets:?}");
    assert_eq!(buckets.last(), Some(&5.0), "{page}");
    assert_eq!(node.metric("boomerang_lateness_seconds_count"), 5.0);
    let sum = node.metric("boomerang_lateness_seconds_sum");
    assert!(sum > 0.0 && sum < 5.0 * common::LATENESS_MAX_MS as f64 / 1_000.0, "{sum}");
}
