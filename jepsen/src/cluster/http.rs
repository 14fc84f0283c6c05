//! A look at a page, for those who watch: no pool, no redirects, and an end after a while.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Pages are small; whatever is larger is cut off.
const PAGE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// The body of a page, if it is answered with 200 in time.
pub async fn get(address: &str, path: &str, within: Duration) -> Option<String> {
    tokio::time::timeout(within, fetch(address, path)).await.ok()?
}

async fn fetch(address: &str, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut page = String::new();
    stream.take(PAGE_BYTES_MAX).read_to_string(&mut page).await.ok()?;
    let (head, body) = page.split_once("\r\n\r\n")?;
    (head.split(' ').nth(1) == Some("200")).then(|| body.to_owned())
}
