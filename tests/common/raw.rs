//! A client that sends whatever it is told to, and reads frames.

use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use boomerang_wire::proto::{BoomerangEnvelope, boomerang_envelope::Payload};
use prost::Message;

use super::PATIENCE;

pub struct Raw {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

/// Why there is no frame.
#[derive(Debug, PartialEq, Eq)]
pub enum NoFrame {
    /// The other side has closed.
    Closed,
    /// Nothing has come in time.
    TimedOut,
}

/// A length and an envelope.
pub fn frame(message: &impl Message) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(message.encoded_len() + 4);
    bytes.extend(u32::try_from(message.encoded_len()).unwrap().to_be_bytes());
    message.encode(&mut bytes).unwrap();
    bytes
}

impl Raw {
    pub fn connect(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).unwrap();
        Self::over(stream)
    }

    /// One whose own side takes only little before it is read: it stands for a slow receiver.
    pub fn connect_with_small_buffer(addr: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let stream = runtime.block_on(async {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.set_recv_buffer_size(4096).unwrap();
            socket.connect(addr).await.unwrap().into_std().unwrap()
        });
        stream.set_nonblocking(false).unwrap();
        Self::over(stream)
    }

    fn over(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        Self { stream, reader }
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.stream.local_addr().unwrap()
    }

    /// A second handle on the connection, for a thread that writes.
    pub fn stream(&self) -> TcpStream {
        self.stream.try_clone().unwrap()
    }

    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The other side may be gone by now, or go meanwhile.
    pub fn try_send_bytes(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    pub fn send(&mut self, message: &impl Message) {
        self.send_bytes(&frame(message));
    }

    /// Nothing more will be sent; answers are still read.
    pub fn finish(&self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    pub fn next_frame(&mut self, within: Duration) -> Result<Vec<u8>, NoFrame> {
        self.stream.set_read_timeout(Some(within)).unwrap();
        let mut length = [0; 4];
        read_whole(&mut self.reader, &mut length)?;
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        read_whole(&mut self.reader, &mut body)?;
        Ok(body)
    }

    pub fn next(&mut self) -> Result<BoomerangEnvelope, NoFrame> {
        let body = self.next_frame(PATIENCE)?;
        Ok(BoomerangEnvelope::decode(&*body).expect("an envelope"))
    }

    /// The next answer, with all the fields there are.
    pub fn answer(&mut self) -> Payload {
        self.next().expect("an answer").payload.expect("something in it")
    }

    pub fn ask(&mut self, session_id: &str, payload: Payload) -> Payload {
        self.send(&BoomerangEnvelope { session_id: session_id.to_owned(), request_id: 0, payload: Some(payload) });
        self.answer()
    }

    /// Status and text of an answer to what was no request.
    pub fn problem(&mut self) -> (i32, String) {
        match self.answer() {
            Payload::ErrorResponse(answer) => (answer.status, answer.error_message),
            other => panic!("an error was expected: {other:?}"),
        }
    }

    pub fn assert_closed(&mut self) {
        let found = self.next_frame(PATIENCE).map(|body| format!("a frame of {} bytes", body.len()));
        assert_eq!(found, Err(NoFrame::Closed), "the server closes the connection, and sends nothing more");
    }
}

fn read_whole(reader: &mut impl Read, into: &mut [u8]) -> Result<(), NoFrame> {
    reader.read_exact(into).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => NoFrame::Closed,
        ErrorKind::WouldBlock | ErrorKind::TimedOut => NoFrame::TimedOut,
        _ => panic!("cannot read: {error}"),
    })
}
