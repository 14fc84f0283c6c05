//! A look at a page, for those who watch: no pool, no redirects.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Pages are small; whatever is larger is cut off.
const PAGE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// The body of a page that is answered with 200; an error otherwise. Waits for as long as it takes.
pub async fn page(address: &str, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.take(PAGE_BYTES_MAX).read_to_string(&mut text).await?;
    match text.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => Err(io::Error::other(text.lines().next().unwrap_or("an empty answer").to_owned())),
    }
}
