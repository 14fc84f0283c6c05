//! The network falls apart: a leader cut off, two sides, a ring, one direction only. Clients reach every node all the while,
//! or, now and then, not the ones that are cut off.

use rand::RngExt;
use rand::rngs::StdRng;

use super::targets::{named, one_of, shuffled, victim};
use super::{Begun, NotDone};
use crate::cluster::Cluster;
use crate::cluster::links::{Host, Layer, Link, cut_apart, ring};

#[derive(Clone, Copy)]
enum Shape {
    Leader,
    Sides,
    Ring,
    Deaf,
    Mute,
}

pub(super) fn begin(cluster: &Cluster, rng: &mut StdRng) -> Result<Begun, NotDone> {
    let wire = cluster.wire().ok_or_else(|| NotDone::NotNow("there is no network to cut".into()))?;
    let shape = one_of(rng, &[Shape::Leader, Shape::Leader, Shape::Sides, Shape::Ring, Shape::Deaf, Shape::Mute]);
    let (without_etcd, without_clients) = (rng.random_bool(0.5), rng.random_bool(0.25));
    let host = victim(cluster, rng)?;
    let nodes = shuffled(cluster, rng);
    let mut others: Vec<Host> = nodes.iter().copied().filter(|other| *other != host).collect();
    let count = nodes.len();
    if without_etcd {
        others.push(wire.etcd());
    }
    if without_clients {
        others.push(wire.clients());
    }
    let more = |word: &str| {
        let ends = [(without_etcd, "etcd"), (without_clients, "clients")];
        ends.iter().filter(|(is, _)| *is).map(|(_, end)| format!(", {word} {end}")).collect::<String>()
    };
    let (layer, detail): (Layer, String) = match shape {
        Shape::Leader => {
            (cut_apart(&[host], &others), format!("{} cut off from the others{}", named(cluster, host), more("from")))
        }
        Shape::Sides => {
            let (few, many) = nodes.split_at((count - 1) / 2);
            let rest: Vec<Host> = many.iter().copied().chain(without_etcd.then(|| wire.etcd())).collect();
            (
                cut_apart(few, &rest),
                format!("machines {few:?} apart from {many:?}{}", if without_etcd { " and from etcd" } else { "" }),
            )
        }
        Shape::Ring => (ring(&nodes), format!("each hears its neighbours only: {nodes:?}")),
        Shape::Deaf => {
            let layer = others.iter().map(|other| (*other, host, Link::CUT)).collect();
            (layer, format!("{} hears nothing from the others{}", named(cluster, host), more("from")))
        }
        Shape::Mute => {
            let layer = others.iter().map(|other| (host, *other, Link::CUT)).collect();
            (layer, format!("{} is not heard by the others{}", named(cluster, host), more("by")))
        }
    };
    Ok(super::links::lay(cluster, wire, layer, detail))
}
