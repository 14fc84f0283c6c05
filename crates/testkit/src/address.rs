//! An address of this machine for a process that is yet to begin, or that ends and begins again.
//!
//! Whoever asks the system for a free port, and releases it so that another process may listen there, may find that a
//! third was given it in between. Here it stays bound, and is not listened on: it is given to nobody, and whoever is told
//! of it may listen there. Linux allows that when both allow it (`SO_REUSEADDR`, as listeners of tokio, std and Go do).

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::TcpSocket;

/// On loopback; kept from others for as long as this value lives.
pub struct OwnAddress {
    address: SocketAddr,
    _bound: TcpSocket,
}

impl OwnAddress {
    pub fn take() -> io::Result<Self> {
        let bound = TcpSocket::new_v4()?;
        bound.set_reuseaddr(true)?;
        bound.bind((Ipv4Addr::LOCALHOST, 0).into())?;
        Ok(Self { address: bound.local_addr()?, _bound: bound })
    }

    /// Keeps it for as long as this process lives.
    pub fn keep(self) -> SocketAddr {
        Box::leak(Box::new(self)).address
    }
}

impl fmt::Display for OwnAddress {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(to)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn an_address_is_kept_and_may_be_listened_on_again_and_again() {
        let own = OwnAddress::take().unwrap();
        // As the system sees it when it looks for a free one: who does not allow that two have it finds it taken.
        let other = TcpSocket::new_v4().unwrap().bind(own.address);
        assert_eq!(other.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        for _ in 0..2 {
            assert!(TcpStream::connect(own.address).is_err(), "nobody listens there");
            let listener = TcpListener::bind(own.address).unwrap();
            let _client = TcpStream::connect(own.address).unwrap();
            listener.accept().unwrap();
        }
    }
}
