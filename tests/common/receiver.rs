//! A receiver of the original protocol: framed callbacks in, framed answers out, one after the other on a connection,
//! and no word about which request an answer is for.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use prost::Message;

use super::legacy::{CallbackResponse, ERROR, Envelope, OK, Payload};
use super::raw::frame;
use super::{LATENESS_MAX_MS, PATIENCE, now_ms};

/// What a receiver does with one callback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Does {
    Accept,
    Refuse,
    /// Closes the connection instead of an answer.
    Close,
    /// Answers, and then closes.
    AcceptAndClose,
    /// Keeps the connection and never answers.
    Nothing,
}

/// How connections are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serves {
    All,
    /// The next connection is looked at when the one before it has ended.
    OneAtATime,
}

#[derive(Debug, Clone)]
pub struct Arrived {
    pub task_id: String,
    pub payload: Vec<u8>,
    pub at_ms: u64,
    pub at: Instant,
    /// Which connection brought it, counted from 0.
    pub connection: usize,
}

impl Arrived {
    /// Neither before `due_ms` nor much later.
    pub fn assert_on_time(&self, due_ms: u64) {
        assert!(self.at_ms >= due_ms, "{} ms early: {self:?}", due_ms - self.at_ms);
        assert!(self.at_ms - due_ms <= LATENESS_MAX_MS, "{} ms late: {self:?}", self.at_ms - due_ms);
    }
}

/// What it does with a payload that comes for the n-th time.
type Behaviour = Box<dyn Fn(&[u8], usize) -> Does + Send + Sync>;

pub struct Receiver {
    addr: SocketAddr,
    arrivals: mpsc::Receiver<Arrived>,
}

impl Receiver {
    pub fn that_accepts() -> Self {
        Self::start(Serves::All, |_, _| Does::Accept)
    }

    /// `does` is asked with the payload of a callback and its number, counted from 0.
    pub fn start(serves: Serves, does: impl Fn(&[u8], usize) -> Does + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (out, arrivals) = mpsc::channel();
        let served = Arc::new(Served { does: Box::new(does), number: AtomicUsize::new(0) });
        // Ends with the test's process.
        std::thread::spawn(move || {
            for (connection, stream) in listener.incoming().map_while(Result::ok).enumerate() {
                let (served, out) = (served.clone(), out.clone());
                let serving = std::thread::spawn(move || served.connection(stream, connection, &out));
                if serves == Serves::OneAtATime {
                    serving.join().unwrap();
                }
            }
        });
        Self { addr, arrivals }
    }

    pub fn endpoint(&self) -> String {
        self.addr.to_string()
    }

    pub fn next(&self) -> Arrived {
        self.arrivals.recv_timeout(PATIENCE).expect("a callback in time")
    }

    /// The next one, but only with this payload.
    pub fn next_is(&self, payload: &[u8]) -> Arrived {
        let arrived = self.next();
        let (came, expected) = (String::from_utf8_lossy(&arrived.payload), String::from_utf8_lossy(payload));
        assert_eq!(came, expected, "payload of the next callback, {arrived:?}");
        arrived
    }

    pub fn next_within(&self, within: Duration) -> Option<Arrived> {
        self.arrivals.recv_timeout(within).ok()
    }

    pub fn assert_nothing_came(&self) {
        if let Ok(arrived) = self.arrivals.try_recv() {
            panic!("a callback came that no task is waiting for: {arrived:?}");
        }
    }
}

struct Served {
    does: Behaviour,
    number: AtomicUsize,
}

impl Served {
    fn connection(&self, mut stream: TcpStream, connection: usize, out: &mpsc::Sender<Arrived>) {
        while let Some(body) = read_frame(&mut stream) {
            let (at_ms, at) = (now_ms(), Instant::now());
            let Ok(Envelope { payload: Some(Payload::CallbackRequest(request)), .. }) = Envelope::decode(&*body) else {
                panic!("not a callback: {body:?}");
            };
            let does = (self.does)(&request.payload, self.number.fetch_add(1, Ordering::SeqCst));
            let _ = out.send(Arrived { task_id: request.task_id, payload: request.payload, at_ms, at, connection });
            let answer = match does {
                Does::Accept | Does::AcceptAndClose => CallbackResponse { status: OK, error_message: String::new() },
                Does::Refuse => CallbackResponse { status: ERROR, error_message: "not today".into() },
                Does::Close => return,
                Does::Nothing => continue,
            };
            let envelope = Envelope { session_id: String::new(), payload: Some(Payload::CallbackResponse(answer)) };
            if stream.write_all(&frame(&envelope)).is_err() || does == Does::AcceptAndClose {
                return;
            }
        }
    }
}

fn read_frame(stream: &mut impl std::io::Read) -> Option<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let mut body = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut body).ok()?;
    Some(body)
}
