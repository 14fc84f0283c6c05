//! Every metric of a node: names, meanings and units in one place. Everything counts from the start of the process.

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// From a tenth of a millisecond to a minute: the promise is a few milliseconds, the tail is what one looks for.
const LATENESS_SECONDS: [f64; 15] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 15.0, 60.0];

pub struct Metrics {
    registry: Registry,
    /// From the due instant to the moment the attempt leaves for its receiver.
    pub lateness: Histogram,
    /// From a request's arrival to its answer.
    pub registration_latency: Histogram,
    pub registrations: Counter,
    pub refusals: Counter,
    pub cancellations: Counter,
    /// Sent on to the node that leads.
    pub forwarded: Counter,
    /// Answered with where to go instead.
    pub redirected: Counter,
    pub dispatches: Counter,
    pub acknowledged: Counter,
    pub failed_attempts: Counter,
    pub leases_lost: Counter,
    pub dead_letters: Gauge,
    pub pending: Gauge,
    pub wheel_timers: Gauge,
    pub wheel_bytes: Gauge,
    pub in_flight: Gauge,
    pub waiting: Gauge,
    pub missed: Gauge,
    pub destinations_down: Gauge,
    pub groups_led: Gauge,
    pub groups_suspended: Gauge,
    pub sessions: Gauge,
    pub connections: Gauge,
    pub log_syncs: Gauge,
    pub log_appends: Gauge,
    pub memtable_bytes: Gauge,
    pub cache_bytes: Gauge,
    pub peer_messages: Gauge,
    pub lease_age_ms: Gauge,
    pub disk_free_bytes: Gauge,
    pub clock_offset_us: Gauge,
}

impl Metrics {
    #[allow(clippy::new_without_default, reason = "a registry is not a default")]
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("boomerang");
        let r = &mut registry;
        Self {
            lateness: histogram(r, "lateness", "From due to on its way to the receiver"),
            registration_latency: histogram(r, "registration_latency", "From a registration's arrival to its answer"),
            registrations: counter(r, "registrations", "Tasks accepted"),
            refusals: counter(r, "refusals", "Registrations refused, without those sent to another node"),
            cancellations: counter(r, "cancellations", "Tasks cancelled before any dispatch"),
            forwarded: counter(r, "forwarded", "Requests sent on to the node that leads"),
            redirected: counter(r, "redirected", "Requests answered with the node that leads"),
            dispatches: counter(r, "dispatches", "Attempts sent to receivers"),
            acknowledged: counter(r, "acknowledged", "Attempts acknowledged by receivers"),
            failed_attempts: counter(r, "failed_attempts", "Attempts that failed"),
            leases_lost: counter(r, "leases_lost", "Times that a lease ran out which nobody had given away"),
            dead_letters: gauge(r, "dead_letters", "Dead letters stored"),
            pending: gauge(r, "pending", "Tasks waiting, on disk"),
            wheel_timers: gauge(r, "wheel_timers", "Timers in the wheels: the tasks of the window"),
            wheel_bytes: gauge(r, "wheel_bytes", "Memory the wheels hold"),
            in_flight: gauge(r, "in_flight", "Attempts sent and not yet settled"),
            waiting: gauge(r, "waiting", "Attempts that are due and wait for their destinations"),
            missed: gauge(r, "missed", "Due instants of recurring tasks that were left out or merged, ever"),
            destinations_down: gauge(r, "destinations_down", "Destinations that get no attempts but probes"),
            groups_led: gauge(r, "groups_led", "Groups this node leads"),
            groups_suspended: gauge(r, "groups_suspended", "Groups this node led and is not sure of: nothing leaves"),
            sessions: gauge(r, "sessions", "Sessions open"),
            connections: gauge(r, "connections", "Client connections open"),
            log_syncs: gauge(r, "log_syncs", "Times the log was synced to disk"),
            log_appends: gauge(r, "log_appends", "Writes to the log that waited for a sync"),
            cache_bytes: gauge(r, "cache_bytes", "Memory of the store for what is read again"),
            peer_messages: gauge(r, "peer_messages", "Messages of Raft sent to other nodes since the start"),
            lease_age_ms: gauge(
                r,
                "lease_age_ms",
                "How long ago the others were heard by whose promises this node leads",
            ),
            memtable_bytes: gauge(r, "memtable_bytes", "Memory of the store for what is not flushed"),
            disk_free_bytes: gauge(r, "disk_free_bytes", "Free space on the disk of the data folder"),
            clock_offset_us: gauge(r, "clock_offset_us", "How far the wall clock is ahead, microseconds"),
            registry,
        }
    }

    /// What `/metrics` answers.
    pub fn text(&self) -> String {
        let mut out = String::new();
        encode(&mut out, &self.registry).expect("a string takes everything");
        out
    }
}

fn counter(registry: &mut Registry, name: &str, help: &str) -> Counter {
    let metric = Counter::default();
    registry.register(name, help, metric.clone());
    metric
}

fn gauge(registry: &mut Registry, name: &str, help: &str) -> Gauge {
    let metric = Gauge::default();
    registry.register(name, help, metric.clone());
    metric
}

fn histogram(registry: &mut Registry, name: &str, help: &str) -> Histogram {
    let metric = Histogram::new(LATENESS_SECONDS);
    registry.register_with_unit(name, help, Unit::Seconds, metric.clone());
    metric
}
