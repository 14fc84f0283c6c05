//! The other end of callbacks, over every protocol: writes down each delivery, and answers as its task wants.
//!
//! For tasks that ask for it, it keeps what a receiver of real effects would keep ([`crate::effects`]).

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use boomerang_receiver::Receiver;
use boomerang_receiver::{Answer, Received, Reply};
use boomerang_task::locks::Mutex;
use boomerang_task::{Callback, Protocol};

use super::ANSWER_WITHIN_MS;
use crate::effects::Effects;
use crate::history::{Delivery, Recorder, What};
use crate::payload::Payload;

const PROTOCOLS: [Protocol; 4] = [Protocol::Tcp, Protocol::Http, Protocol::Grpc, Protocol::Udp];
/// Of a hundred first deliveries to a fenced receiver, so many are not answered, and so many late.
const SILENT_PERCENT: u64 = 5;
const LATE_PERCENT: u64 = 10;

pub struct Receivers {
    listening: Vec<Receiver>,
    host: IpAddr,
}

struct Sink {
    recorder: Recorder,
    effects: Mutex<Effects>,
}

impl Receivers {
    pub async fn start(host: IpAddr, recorder: Recorder) -> std::io::Result<Self> {
        let sink = Arc::new(Sink { recorder, effects: Mutex::default() });
        let mut listening = Vec::new();
        for protocol in PROTOCOLS {
            let sink = sink.clone();
            let take = move |received: &Received| sink.take(received);
            listening.push(Receiver::listen(protocol, &SocketAddr::new(host, 0).to_string(), None, take).await?);
        }
        Ok(Self { listening, host })
    }

    pub fn callback(&self, protocol: Protocol) -> Callback {
        let receiver = self.listening.iter().find(|receiver| receiver.protocol() == protocol);
        let port = receiver.expect("all of them listen").local_addr().port();
        let address = SocketAddr::new(self.host, port);
        let endpoint = match protocol {
            Protocol::Http | Protocol::Grpc => format!("http://{address}"),
            Protocol::Tcp | Protocol::Udp => address.to_string(),
        };
        Callback::new(protocol, &endpoint).expect("an address is a valid endpoint")
    }

    /// Where copies of dead letters go.
    pub fn dead_letters(&self) -> String {
        format!("tcp://{}", self.callback(Protocol::Tcp).endpoint)
    }
}

impl Sink {
    fn take(&self, received: &Received) -> Answer {
        // What comes without one is nobody's: a checker finds that nobody has registered it.
        let payload = Payload::read(&received.payload).unwrap_or_default();
        let copy = received.dead_letter.is_some();
        let answer = if copy { Reply::Accept.into() } else { answer(&payload, received) };
        // Until it is written down: another delivery of the occurrence must not be written down before it.
        let mut effects = self.effects.lock();
        let effect = (payload.fenced && !copy).then(|| {
            let willing = received.attempt > payload.refusals;
            effects.take(received.task_id, received.occurrence, received.fence, willing)
        });
        self.recorder.record(What::Delivered(Delivery {
            token: payload.token,
            task: received.task_id.to_string(),
            occurrence: received.occurrence,
            attempt: received.attempt,
            version: payload.version,
            due_ms: received.due_ms,
            fence: received.fence,
            accepted: answer.reply == Reply::Accept,
            effect,
            dead_letter: copy,
            datagram: received.protocol == Protocol::Udp,
        }));
        answer
    }
}

/// The same for the same delivery.
fn answer(payload: &Payload, received: &Received) -> Answer {
    if received.attempt <= payload.refusals {
        return Reply::refuse(format!("refuses {} attempts", payload.refusals)).into();
    }
    let mut hasher = DefaultHasher::new();
    (payload.token, received.occurrence).hash(&mut hasher);
    let chance = hasher.finish() % 100;
    match payload.fenced {
        true if received.attempt == 1 && chance < SILENT_PERCENT => Reply::Silence.into(),
        true if chance < SILENT_PERCENT + LATE_PERCENT => {
            Answer { reply: Reply::Accept, delay: Duration::from_millis(ANSWER_WITHIN_MS / 2) }
        }
        _ => Reply::Accept.into(),
    }
}
