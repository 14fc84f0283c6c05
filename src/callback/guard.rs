//! Which addresses callbacks may go to: what a client names must not lead into the network that the node stands in.
//!
//! An address is judged when a connection to it is about to be made, after its name was looked up, and again for each
//! redirect: a name may mean something else by then. What is refused gets no connection, so nothing of it comes back.
//!
//! | Address | |
//! | --- | --- |
//! | of a node of the cluster, or of its etcd | refused, whatever is allowed |
//! | unspecified: the system takes it for its own | refused, whatever is allowed |
//! | allowed by `--callback-allow` | passes |
//! | of this machine, a private network, a link, of several machines at a time, or of a cloud's own services | refused |
//! | any other | passes |
//!
//! An IPv6 address that stands for an IPv4 address is judged as that one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::sabotage::Fault;

const DISCARD_PORT: u16 = 9;

/// A network, or one address, and one port of it or all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    network: IpNet,
    port: Option<u16>,
}

impl Allowed {
    /// This machine, by its own addresses.
    pub fn loopback() -> [Self; 2] {
        let all = |network| Self { network, port: None };
        [all(IpNet::new_assert(Ipv4Addr::LOCALHOST.into(), 8)), all(IpAddr::from(Ipv6Addr::LOCALHOST).into())]
    }

    fn lets(&self, ip: IpAddr, port: u16) -> bool {
        self.network.contains(&ip) && self.port.is_none_or(|allowed| allowed == port)
    }
}

impl FromStr for Allowed {
    type Err = String;

    /// `10.0.0.0/8`, `10.1.2.3:8080`, `fd00::/8`, `[fd00::/8]:8080`
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no network, for example 10.0.0.0/8, 10.1.2.3:8080 or [fd00::/8]:8080");
        let (network, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (network, port) = rest.split_once(']').ok_or_else(wrong)?;
                (network, if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or_else(wrong)?) })
            }
            None => match text.split_once(':') {
                Some((network, port)) if !port.contains(':') => (network, Some(port)),
                _ => (text, None),
            },
        };
        let port = port.map(|port| port.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(wrong)).transpose()?;
        let network = network.parse::<IpNet>().or_else(|_| network.parse::<IpAddr>().map(IpNet::from));
        Ok(Self { network: network.map_err(|_| wrong())?.trunc(), port })
    }
}

/// Where something listens that no callback may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On every address of this machine.
    ThisMachine,
    /// A name, or an address.
    Host(String),
}

/// What no callback may reach, whatever is allowed.
pub trait Untouchable: Send + Sync + 'static {
    /// Where it listens on this port. Asked for each connection.
    fn at(&self, port: u16) -> Vec<Place>;
}

/// Nothing is.
impl Untouchable for () {
    fn at(&self, _: u16) -> Vec<Place> {
        Vec::new()
    }
}

/// Why a callback does not go to an address. Which address it is, a client is not told: names may be secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Forbidden {
    #[error("callbacks must not go there: the cluster itself listens there")]
    Ours,
    #[error("callbacks must not go there: it is {0}, and --callback-allow does not name it")]
    Special(&'static str),
    #[error("callbacks must not go there: it is the unspecified address")]
    Unspecified,
    #[error("callbacks must not go there: it is {0}, and it is not known now whether the cluster itself listens there")]
    PerhapsOurs(&'static str),
}

/// Judges addresses. Cheap to clone.
#[derive(Clone)]
pub struct Guard {
    allowed: Arc<[Allowed]>,
    untouchable: Arc<dyn Untouchable>,
}

impl Guard {
    pub fn new(allowed: Vec<Allowed>, untouchable: Arc<dyn Untouchable>) -> Self {
        Self { allowed: allowed.into(), untouchable }
    }

    /// Where nothing may be reached at this port. Names are for the caller to look up, before it has addresses judged.
    pub fn untouchable_at(&self, port: u16) -> Vec<Place> {
        self.untouchable.at(port)
    }

    /// `ours`: what is not to be reached at the port of this address.
    pub fn judge(&self, address: SocketAddr, ours: &[OurAddress]) -> Result<(), Forbidden> {
        if Fault::CallAnybody.is_on() {
            return Ok(());
        }
        let (ip, port) = (meant(address.ip()), address.port());
        let kind = kind(ip);
        if ip.is_unspecified() {
            return Err(Forbidden::Unspecified);
        }
        for ours in ours {
            match ours {
                OurAddress::At(at) if meant(*at) == ip => return Err(Forbidden::Ours),
                // Whatever is called by one address of this machine may listen on all of them.
                OurAddress::At(at) if is_of_this_machine(meant(*at)) && is_of_this_machine(ip) => {
                    return Err(Forbidden::Ours);
                }
                OurAddress::ThisMachine if is_of_this_machine(ip) => return Err(Forbidden::Ours),
                OurAddress::Unknown if let Some(kind) = kind => return Err(Forbidden::PerhapsOurs(kind)),
                _ => {}
            }
        }
        match kind {
            Some(kind) if !self.allowed.iter().any(|allowed| allowed.lets(ip, port)) => Err(Forbidden::Special(kind)),
            _ => Ok(()),
        }
    }
}

/// An address that is not to be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OurAddress {
    ThisMachine,
    At(IpAddr),
    /// Its name cannot be looked up, and never could.
    Unknown,
}

/// What a machine sends to an address of its own it sends from that very address.
fn is_of_this_machine(ip: IpAddr) -> bool {
    if ip.is_loopback() {
        return true;
    }
    let any = if ip.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    // Of datagrams, this sends none.
    // When there is no socket to be had, nobody knows.
    let Ok(socket) = UdpSocket::bind((any, 0)) else { return true };
    let found = socket.connect((ip, DISCARD_PORT)).and_then(|()| socket.local_addr());
    found.is_ok_and(|address| address.ip() == ip)
}

/// The IPv4 address that an IPv6 address stands for: mapped, behind NAT64 (RFC 6052), or by 6to4 (RFC 3056).
fn meant(ip: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = ip.to_canonical() else { return ip.to_canonical() };
    let [a, b, c, d, e, f, g, h] = v6.segments();
    let v4 = |high: u16, low: u16| IpAddr::V4(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)));
    match [a, b, c, d, e, f] {
        [0x64, 0xff9b, 0, 0, 0, 0] => v4(g, h),
        // As old systems write it; not the unspecified address and not the one of loopback.
        [0, 0, 0, 0, 0, 0] if g != 0 => v4(g, h),
        [0x2002, ..] => v4(b, c),
        _ => ip,
    }
}

/// What is special about an address; `None` when it is one of the public network, like all others.
fn kind(ip: IpAddr) -> Option<&'static str> {
    match ip {
        IpAddr::V4(ip) => kind_of_v4(ip),
        IpAddr::V6(ip) => kind_of_v6(ip),
    }
}

fn kind_of_v4(ip: Ipv4Addr) -> Option<&'static str> {
    Some(match ip.octets() {
        // Asked by machines of Azure, from inside only.
        [168, 63, 129, 16] => "an address of a cloud's own services",
        // AWS, Google, Azure and others; Oracle; Alibaba.
        [169, 254, 169, 254] | [192, 0, 0, 192] | [100, 100, 100, 200] => "an address of a cloud's own services",
        [127, ..] => "a loopback address",
        [0, ..] => "an unspecified address",
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => "an address of a private network",
        [100, 64..=127, ..] => "an address of a provider's own network",
        [169, 254, ..] => "a link-local address",
        [224..=239, ..] => "a multicast address",
        [255, 255, 255, 255] => "the broadcast address",
        [198, 18..=19, ..] | [192, 0, 0, _] | [240..=255, ..] => "a reserved address",
        _ => return None,
    })
}

fn kind_of_v6(ip: Ipv6Addr) -> Option<&'static str> {
    let [a, b, c, ..] = ip.segments();
    Some(match a {
        _ if ip.is_loopback() => "a loopback address",
        _ if ip.is_unspecified() => "an unspecified address",
        0xfd00 if b == 0xec2 => "an address of a cloud's own services",
        0xfc00..=0xfdff => "an address of a private network",
        0xfe80..=0xfebf => "a link-local address",
        0xfec0..=0xfeff => "a site-local address",
        0xff00..=0xffff => "a multicast address",
        // NAT64 of a network of its own; discarded; Teredo, which hides an IPv4 address.
        0x64 if b == 0xff9b && c == 1 => "an address of a private network",
        0x100 if b == 0 => "a reserved address",
        0x2001 if b == 0 => "a reserved address",
        // The public network begins with these three bits.
        _ if a >> 13 != 1 => "a reserved address",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(allow: &[&str]) -> Guard {
        Guard::new(allow.iter().map(|text| text.parse().unwrap()).collect(), Arc::new(()))
    }

    fn passes(guard: &Guard, address: &str) -> bool {
        guard.judge(address.parse().unwrap(), &[]).is_ok()
    }

    #[test]
    fn the_public_network_is_open_and_all_else_is_not() {
        let guard = guard(&[]);
        for address in
            ["1.1.1.1:80", "8.8.8.8:443", "[2606:4700::1111]:80", "[64:ff9b::8.8.8.8]:80", "[2002:808:808::1]:80"]
        {
            assert!(passes(&guard, address), "{address}");
        }
        for address in [
            "0.0.0.0:80",
            "0.1.2.3:80",
            "10.0.0.1:80",
            "100.64.0.1:80",
            "100.100.100.200:80",
            "127.0.0.1:80",
            "127.255.255.254:80",
            "168.63.129.16:80",
            "169.254.169.254:80",
            "169.254.0.1:80",
            "172.16.0.1:80",
            "172.31.255.255:80",
            "192.0.0.192:80",
            "192.168.1.1:80",
            "198.18.0.1:80",
            "224.0.0.1:80",
            "239.255.255.255:80",
            "240.0.0.1:80",
            "255.255.255.255:80",
            "[::]:80",
            "[::1]:80",
            "[::7f00:1]:80",
            "[::ffff:127.0.0.1]:80",
            "[::ffff:169.254.169.254]:80",
            "[64:ff9b::10.0.0.1]:80",
            "[64:ff9b:1::1]:80",
            "[100::1]:80",
            "[2001::1]:80",
            "[2002:7f00:1::]:80",
            "[fc00::1]:80",
            "[fd00:ec2::254]:80",
            "[fe80::1]:80",
            "[fec0::1]:80",
            "[ff02::1]:80",
        ] {
            assert!(!passes(&guard, address), "{address}");
        }
    }

    #[test]
    fn what_is_allowed_passes_at_its_port() {
        let guard = guard(&["10.0.0.0/8", "192.168.1.7:8080", "fd00::/8", "[fe80::1]:53", "169.254.169.254"]);
        for address in [
            "10.9.8.7:1",
            "192.168.1.7:8080",
            "[fd00::1]:80",
            "[fe80::1]:53",
            "[::ffff:10.0.0.1]:80",
            "169.254.169.254:80",
        ] {
            assert!(passes(&guard, address), "{address}");
        }
        for address in
            ["11.0.0.1:80", "192.168.1.7:8081", "192.168.1.8:8080", "[fe80::1]:54", "[fe80::2]:53", "127.0.0.1:80"]
        {
            assert_eq!(passes(&guard, address), address.starts_with("11."), "{address}");
        }
    }

    #[test]
    fn what_is_ours_is_never_reached() {
        let guard = guard(&["0.0.0.0/0", "::/0"]);
        let judge = |address: &str, ours: OurAddress| guard.judge(address.parse().unwrap(), &[ours]);
        let at = |ip: &str| OurAddress::At(ip.parse().unwrap());
        for ours in [at("127.0.0.1"), at("::1"), OurAddress::ThisMachine] {
            for address in ["127.0.0.1:9973", "127.0.0.2:9973", "[::ffff:127.0.0.1]:9973"] {
                assert_eq!(judge(address, ours), Err(Forbidden::Ours), "{address} {ours:?}");
            }
            for address in ["0.0.0.0:9973", "[::]:9973", "[::ffff:0.0.0.0]:9973"] {
                assert_eq!(judge(address, ours), Err(Forbidden::Unspecified), "{address} {ours:?}");
            }
            assert_eq!(judge("192.0.2.1:9973", ours), Ok(()), "{ours:?}");
        }
        assert_eq!(judge("10.0.0.7:9973", at("10.0.0.7")), Err(Forbidden::Ours));
        assert_eq!(judge("10.0.0.8:9973", at("10.0.0.7")), Ok(()));
        // When nobody knows where something of ours is, it is not in the public network.
        assert!(matches!(judge("10.0.0.8:9973", OurAddress::Unknown), Err(Forbidden::PerhapsOurs(_))));
        assert_eq!(judge("192.0.2.1:9973", OurAddress::Unknown), Ok(()));
    }

    #[test]
    fn networks_are_read_or_refused() {
        let read = |text: &str| text.parse::<Allowed>();
        let network = |text: &str, port| Allowed { network: text.parse().unwrap(), port };
        assert_eq!(read("10.1.2.3/8").unwrap(), network("10.0.0.0/8", None));
        assert_eq!(read("10.1.2.3:80").unwrap(), network("10.1.2.3/32", Some(80)));
        assert_eq!(read("::1").unwrap(), network("::1/128", None));
        assert_eq!(read("[::1]").unwrap(), network("::1/128", None));
        assert_eq!(read("[fd00::/8]:80").unwrap(), network("fd00::/8", Some(80)));
        for text in ["", "localhost", "10.0.0.0/33", "10.0.0.0/8:0", "10.0.0.0/8:http", "[::1", "[::1]80", "::1:x"] {
            let error = read(text).unwrap_err();
            assert!(error.contains("is no network"), "{text}: {error}");
        }
    }
}
