//! Where this node, the others of its cluster and their etcd listen: no callback may go there, whatever is allowed.

use std::net::SocketAddr;

use crate::callback::guard::{Place, Untouchable};
use crate::placement::{Cluster, Placement};
use crate::settings::Settings;

use super::StartLine;

pub struct OurPlaces {
    here: Vec<SocketAddr>,
    /// Host and port of each.
    etcd: Vec<(String, u16)>,
    cluster: Cluster,
}

impl OurPlaces {
    pub fn new(settings: &Settings, listeners: &StartLine, cluster: &Cluster) -> Self {
        let here = [Some(listeners.tcp), Some(listeners.http), listeners.peer].into_iter().flatten().collect();
        let etcd = match &settings.placement {
            Placement::Etcd { endpoints, .. } => endpoints.iter().filter_map(|url| of_url(url)).collect(),
            _ => Vec::new(),
        };
        Self { here, etcd, cluster: cluster.clone() }
    }
}

impl Untouchable for OurPlaces {
    fn at(&self, port: u16) -> Vec<Place> {
        let place = |address: &SocketAddr| match address.ip() {
            ip if ip.is_unspecified() => Place::ThisMachine,
            ip => Place::Host(ip.to_string()),
        };
        let here = self.here.iter().filter(|address| address.port() == port).map(place);
        let etcd = self.etcd.iter().filter(|etcd| etcd.1 == port).map(|etcd| Place::Host(etcd.0.clone()));
        let nodes = self.cluster.hosts_at(port).into_iter().map(Place::Host);
        here.chain(etcd).chain(nodes).collect()
    }
}

/// Of `http://host:port`.
fn of_url(url: &str) -> Option<(String, u16)> {
    let url = url::Url::parse(url).ok()?;
    Some((url.host_str()?.to_owned(), url.port_or_known_default()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_of_etcd_has_a_host_and_a_port() {
        assert_eq!(of_url("http://127.0.0.1:2379"), Some(("127.0.0.1".into(), 2379)));
        assert_eq!(of_url("https://etcd.internal"), Some(("etcd.internal".into(), 443)));
        assert_eq!(of_url("http://[::1]:2379/"), Some(("[::1]".into(), 2379)));
    }
}
