//! How two nodes on one machine show each other that they know the secret of their cluster, without saying it.
//!
//! ```text
//!   caller                                      called
//!     | -- "boompeer", version, number, nonce --> |
//!     | <------------------------------- nonce -- |
//!     | -- proof of a caller -------------------> |  wrong: it hangs up
//!     | <------------------ proof of one called -- |  wrong: the caller hangs up
//! ```
//!
//! A proof is an HMAC of both nonces by the secret, so it is of use once. It also names the cluster, both nodes, and the
//! port that was called: a stranger who listens where a node has been cannot have another node answer for it. Nothing
//! ties what is sent afterwards to the proofs, so this is for loopback, where nobody can take a connection over.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::dial::Bytes;

const MAGIC: &[u8; 8] = b"boompeer";
const VERSION: u8 = 1;
const NONCE_BYTES: usize = 32;
const PROOF_BYTES: usize = 32;
/// Fewer can be found out by trying, by whoever has seen a proof.
pub const SECRET_BYTES_MIN: usize = 16;

/// What all nodes of a cluster know. Cheap to clone.
#[derive(Clone)]
pub struct ClusterSecret(Arc<[u8]>);

/// What both sides of a connection must agree on.
#[derive(Debug, Clone, Copy)]
pub struct Called<'a> {
    pub cluster: &'a str,
    pub node_id: u64,
    pub port: u16,
}

#[derive(Clone, Copy)]
enum Side {
    Caller = 1,
    Called = 2,
}

type Nonce = [u8; NONCE_BYTES];

impl ClusterSecret {
    /// Blanks and line ends around it do not count. `None` when it is too short.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (text.len() >= SECRET_BYTES_MIN).then(|| Self(text.as_bytes().into()))
    }

    /// As node `caller`.
    pub async fn call(&self, stream: &mut impl Bytes, caller: u64, called: Called<'_>) -> io::Result<()> {
        let ours: Nonce = rand::random();
        let mut hello = Vec::with_capacity(MAGIC.len() + 1 + 8 + NONCE_BYTES);
        hello.extend_from_slice(MAGIC);
        hello.push(VERSION);
        hello.extend_from_slice(&caller.to_be_bytes());
        hello.extend_from_slice(&ours);
        stream.write_all(&hello).await?;
        let theirs: Nonce = read(stream).await?;
        let proof = |side| self.proof(side, caller, called, &ours, &theirs);
        stream.write_all(&proof(Side::Caller).finalize().into_bytes()).await?;
        let unknown = "it does not know the secret of this cluster, or is another node than was called";
        let answer: [u8; PROOF_BYTES] = read(stream).await.map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => refused(unknown),
            _ => error,
        })?;
        proof(Side::Called).verify_slice(&answer).map_err(|_| refused(unknown))
    }

    /// The number that the caller has as a node.
    pub async fn accept(&self, stream: &mut impl Bytes, called: Called<'_>) -> io::Result<u64> {
        let magic: [u8; MAGIC.len()] = read(stream).await?;
        let [version]: [u8; 1] = read(stream).await?;
        if &magic != MAGIC || version != VERSION {
            return Err(refused("it does not speak as nodes do"));
        }
        let caller = u64::from_be_bytes(read(stream).await?);
        let theirs: Nonce = read(stream).await?;
        let ours: Nonce = rand::random();
        stream.write_all(&ours).await?;
        let proof = |side| self.proof(side, caller, called, &theirs, &ours);
        let answer: [u8; PROOF_BYTES] = read(stream).await?;
        proof(Side::Caller)
            .verify_slice(&answer)
            .map_err(|_| refused("it does not know the secret of this cluster"))?;
        stream.write_all(&proof(Side::Called).finalize().into_bytes()).await?;
        Ok(caller)
    }

    fn proof(&self, side: Side, caller: u64, called: Called<'_>, first: &Nonce, second: &Nonce) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("a key of any length is good");
        mac.update(MAGIC);
        mac.update(&[VERSION, side as u8]);
        mac.update(&caller.to_be_bytes());
        mac.update(&called.node_id.to_be_bytes());
        mac.update(&called.port.to_be_bytes());
        mac.update(first);
        mac.update(second);
        // Last, because its length differs.
        mac.update(called.cluster.as_bytes());
        mac
    }
}

async fn read<const BYTES: usize>(stream: &mut impl Bytes) -> io::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

fn refused(why: &str) -> io::Error {
    io::Error::new(ErrorKind::PermissionDenied, why)
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    const HERE: Called<'_> = Called { cluster: "c", node_id: 2, port: 9 };

    fn secret(text: &str) -> ClusterSecret {
        ClusterSecret::new(text).unwrap()
    }

    /// What a caller and one who is called find out about each other.
    async fn meet(caller: (&str, Called<'_>), called: (&str, Called<'_>)) -> (io::Result<()>, io::Result<u64>) {
        let (mut near, mut far) = duplex(64);
        let (calling, answering) = (secret(caller.0), secret(called.0));
        // Whoever is done hangs up.
        let call = async move { calling.call(&mut near, 1, caller.1).await };
        let accept = async move { answering.accept(&mut far, called.1).await };
        tokio::join!(call, accept)
    }

    #[tokio::test]
    async fn those_who_know_the_same_secret_know_each_other() {
        let known = "a secret of many letters";
        let (call, accept) = meet((known, HERE), (" a secret of many letters\n", HERE)).await;
        call.unwrap();
        assert_eq!(accept.unwrap(), 1);
        for other in [
            ("a secret of many lettes!", HERE),
            (known, Called { cluster: "d", ..HERE }),
            (known, Called { node_id: 3, ..HERE }),
            (known, Called { port: 10, ..HERE }),
        ] {
            let (call, accept) = meet((known, HERE), other).await;
            assert_eq!(call.unwrap_err().kind(), ErrorKind::PermissionDenied, "{other:?}");
            assert_eq!(accept.unwrap_err().kind(), ErrorKind::PermissionDenied, "{other:?}");
        }
        assert!(ClusterSecret::new("fifteen letters").is_none(), "too short");
    }

    /// What was said once is of no use to whoever has heard it, on either side.
    #[tokio::test]
    async fn nothing_can_be_said_again() {
        let known = secret("a secret of many letters");
        let (mut near, far) = duplex(1024);
        let answering = known.clone();
        let accepted = tokio::spawn(async move { answering.accept(&mut { far }, HERE).await });
        let (mut there, mut heard) = duplex(1024);
        // Between the two, and keeps what both say.
        let between = tokio::spawn(async move {
            let (mut said, mut answered) = (Vec::new(), Vec::new());
            for (from_caller, bytes) in [(true, 49), (false, 32), (true, 32), (false, 32)] {
                let mut part = vec![0; bytes];
                let (from, to) = if from_caller { (&mut heard, &mut near) } else { (&mut near, &mut heard) };
                from.read_exact(&mut part).await.unwrap();
                to.write_all(&part).await.unwrap();
                if from_caller { said.extend(part) } else { answered.extend(part) }
            }
            (said, answered)
        });
        known.call(&mut there, 1, HERE).await.unwrap();
        accepted.await.unwrap().unwrap();
        let (said, answered) = between.await.unwrap();
        let (mut stranger, mut node) = duplex(1024);
        stranger.write_all(&said).await.unwrap();
        assert!(known.accept(&mut node, HERE).await.is_err(), "a caller's words are taken twice");
        let (mut node, mut stranger) = duplex(1024);
        stranger.write_all(&answered).await.unwrap();
        assert!(known.call(&mut node, 1, HERE).await.is_err(), "words of one called are taken twice");
    }

    /// One who is called could be sent its own words by a stranger who calls it.
    #[tokio::test]
    async fn a_proof_of_one_side_is_none_of_the_other() {
        let known = secret("a secret of many letters");
        let (ours, theirs) = ([1; NONCE_BYTES], [2; NONCE_BYTES]);
        let of = |side| known.proof(side, 1, HERE, &ours, &theirs).finalize().into_bytes();
        assert_ne!(of(Side::Caller), of(Side::Called));
    }

    #[tokio::test]
    async fn what_is_no_node_is_hung_up_on() {
        let known = secret("a secret of many letters");
        for words in [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], b"boompeer\x02", b"boompeer\x01short", b""] {
            let (mut stranger, mut node) = duplex(1024);
            stranger.write_all(words).await.unwrap();
            stranger.shutdown().await.unwrap();
            assert!(known.accept(&mut node, HERE).await.is_err(), "{words:?}");
            let mut answer = Vec::new();
            drop(node);
            stranger.read_to_end(&mut answer).await.unwrap();
            assert!(answer.is_empty(), "{words:?}: nothing is said to strangers");
        }
    }
}
