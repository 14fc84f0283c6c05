//! Links that are slow, and links that lose, double and reorder: between all machines, or around one of them.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;

use super::targets::{named, victim};
use super::{Begun, NotDone};
use crate::cluster::links::{Host, Layer, Link, among, around};
use crate::cluster::{Cluster, Wire};

pub(super) fn slow(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let delay = Duration::from_millis(rng.random_range(5..=120));
    let jitter = delay.mul_f64(rng.random_range(0.0..1.0));
    let link = Link { delay, jitter, ..Link::default() };
    begin(cluster, rng, link, format!("{delay:?} late, and up to {jitter:.0?} more"))
}

pub(super) fn lossy(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let loss = rng.random_range(0.01..0.15);
    let (duplicate, reorder) = (rng.random_range(0.0..0.05), rng.random_range(0.0..0.10));
    let link = Link { loss, duplicate, reorder, ..Link::default() };
    let percent = |part: f64| format!("{:.1} %", part * 100.0);
    let detail = format!("{} lost, {} twice, {} reordered", percent(loss), percent(duplicate), percent(reorder));
    begin(cluster, rng, link, detail)
}

fn begin(cluster: &Cluster, rng: &mut StdRng, link: Link, detail: String) -> Result<Begun, NotDone> {
    let wire = cluster.wire().ok_or_else(|| NotDone::NotNow("there is no network to spoil".into()))?;
    let everywhere = rng.random_bool(0.5);
    let host = victim(cluster, rng)?;
    let nodes: Vec<Host> = cluster.places().collect();
    let (layer, place) = if everywhere {
        (among(&nodes, link), "between all nodes".to_owned())
    } else {
        (around(host, &nodes, link), format!("around {}", named(cluster, host)))
    };
    Ok(lay(cluster, wire, layer, format!("{place}: {detail}")))
}

/// Lays `layer` over the links, until the end.
pub(super) fn lay(cluster: &Cluster, wire: &Wire, layer: Layer, detail: String) -> Begun {
    let id = wire.lay(layer);
    let cluster = cluster.clone();
    Begun::new(detail, async move {
        if let Some(wire) = cluster.wire() {
            wire.lift(id);
        }
        Ok("links as before".into())
    })
}
