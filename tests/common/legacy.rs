//! A client of the original protocol. The messages are written down here once more, with the fields 1 to 19 of the
//! published protocol and nothing else, and are not made from `proto/`: whatever we change there, this client stays.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use prost::Message;

use super::PATIENCE;
use super::raw::{NoFrame, Raw, frame};

pub const OK: i32 = 0;
pub const ERROR: i32 = 1;
pub const UNAUTHORIZED: i32 = 2;
pub const INVALID_REQUEST: i32 = 3;
pub const SESSION_EXPIRED: i32 = 4;

pub const TCP: i32 = 0;
pub const FIXED: i32 = 0;

#[derive(Clone, PartialEq, Message)]
pub struct Envelope {
    #[prost(string, tag = "1")]
    pub session_id: String,
    #[prost(oneof = "Payload", tags = "2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19")]
    pub payload: Option<Payload>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Payload {
    #[prost(message, tag = "2")]
    AuthHandshake(AuthHandshake),
    #[prost(message, tag = "3")]
    AuthResponse(AuthResponse),
    #[prost(message, tag = "4")]
    RegistrationRequest(Task),
    #[prost(message, tag = "5")]
    RegistrationResponse(RegistrationResponse),
    #[prost(message, tag = "6")]
    CancellationRequest(CancellationRequest),
    #[prost(message, tag = "7")]
    CancellationResponse(CancellationResponse),
    #[prost(message, tag = "8")]
    SessionRefresh(SessionRefreshRequest),
    #[prost(message, tag = "9")]
    SessionRefreshResponse(SessionRefreshResponse),
    #[prost(message, tag = "10")]
    ClientRegistration(ClientRegistrationRequest),
    #[prost(message, tag = "11")]
    ClientRegistrationResponse(ClientRegistrationResponse),
    #[prost(message, tag = "12")]
    ClientDeregistration(ClientDeregistrationRequest),
    #[prost(message, tag = "13")]
    ClientDeregistrationResponse(ClientDeregistrationResponse),
    #[prost(message, tag = "14")]
    CallbackRequest(CallbackRequest),
    #[prost(message, tag = "15")]
    CallbackResponse(CallbackResponse),
    #[prost(message, tag = "16")]
    ListTasksRequest(ListTasksRequest),
    #[prost(message, tag = "17")]
    ListTasksResponse(ListTasksResponse),
    #[prost(message, tag = "18")]
    GetTaskRequest(GetTaskRequest),
    #[prost(message, tag = "19")]
    GetTaskResponse(GetTaskResponse),
}

#[derive(Clone, PartialEq, Message)]
pub struct AuthHandshake {
    #[prost(string, tag = "1")]
    pub client_id: String,
    #[prost(string, tag = "2")]
    pub password: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct AuthResponse {
    #[prost(string, tag = "1")]
    pub session_id: String,
    #[prost(int32, tag = "2")]
    pub status: i32,
    #[prost(string, tag = "3")]
    pub error_message: String,
    #[prost(uint64, tag = "4")]
    pub expires_at_ms: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Task {
    #[prost(bytes = "vec", tag = "1")]
    pub payload: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub delay_ms: u64,
    #[prost(uint64, tag = "3")]
    pub repeat_interval_ms: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct RegistrationResponse {
    #[prost(string, tag = "1")]
    pub task_id: String,
    #[prost(int32, tag = "2")]
    pub status: i32,
    #[prost(uint64, tag = "3")]
    pub scheduled_time_ms: u64,
    #[prost(string, tag = "4")]
    pub error_message: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct CancellationRequest {
    #[prost(string, tag = "1")]
    pub task_id: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct CancellationResponse {
    #[prost(int32, tag = "1")]
    pub status: i32,
    #[prost(string, tag = "2")]
    pub error_message: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct SessionRefreshRequest {}

#[derive(Clone, PartialEq, Message)]
pub struct SessionRefreshResponse {
    #[prost(int32, tag = "1")]
    pub status: i32,
    #[prost(uint64, tag = "2")]
    pub new_expires_at_ms: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct ClientRegistrationRequest {
    #[prost(string, tag = "1")]
    pub client_id: String,
    #[prost(string, tag = "2")]
    pub password: String,
    #[prost(bool, tag = "3")]
    pub is_admin: bool,
    #[prost(message, optional, tag = "4")]
    pub callback: Option<CallbackConfig>,
    #[prost(message, optional, tag = "5")]
    pub retry: Option<RetryPolicy>,
    #[prost(message, optional, tag = "6")]
    pub dlq: Option<DlqPolicy>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ClientRegistrationResponse {
    #[prost(int32, tag = "1")]
    pub status: i32,
    #[prost(string, tag = "2")]
    pub error_message: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ClientDeregistrationRequest {
    #[prost(string, tag = "1")]
    pub client_id: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ClientDeregistrationResponse {
    #[prost(int32, tag = "1")]
    pub status: i32,
    #[prost(string, tag = "2")]
    pub error_message: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct CallbackConfig {
    #[prost(int32, tag = "1")]
    pub protocol: i32,
    #[prost(string, tag = "2")]
    pub endpoint: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct RetryPolicy {
    #[prost(uint32, tag = "1")]
    pub max_attempts: u32,
    #[prost(int32, tag = "2")]
    pub strategy: i32,
    #[prost(uint64, tag = "3")]
    pub interval_ms: u64,
    #[prost(uint64, tag = "4")]
    pub max_interval_ms: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct DlqPolicy {
    #[prost(string, tag = "1")]
    pub destination: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ListTasksRequest {
    #[prost(string, tag = "1")]
    pub client_id: String,
    #[prost(uint64, tag = "2")]
    pub scheduled_after: u64,
    #[prost(uint64, tag = "3")]
    pub scheduled_before: u64,
    #[prost(bool, optional, tag = "4")]
    pub is_recurring: Option<bool>,
    #[prost(uint32, tag = "5")]
    pub limit: u32,
    #[prost(string, tag = "6")]
    pub next_token: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct ListTasksResponse {
    #[prost(int32, tag = "1")]
    pub status: i32,
    #[prost(string, tag = "2")]
    pub error_message: String,
    #[prost(message, repeated, tag = "3")]
    pub tasks: Vec<TaskDetails>,
    #[prost(string, tag = "4")]
    pub next_token: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct GetTaskRequest {
    #[prost(string, tag = "1")]
    pub task_id: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct GetTaskResponse {
    #[prost(int32, tag = "1")]
    pub status: i32,
    #[prost(string, tag = "2")]
    pub error_message: String,
    #[prost(message, optional, tag = "3")]
    pub task: Option<TaskDetails>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TaskDetails {
    #[prost(string, tag = "1")]
    pub task_id: String,
    #[prost(string, tag = "2")]
    pub client_id: String,
    #[prost(uint64, tag = "3")]
    pub expiration_ms: u64,
    #[prost(uint64, tag = "4")]
    pub repeat_interval_ms: u64,
    #[prost(bytes = "vec", tag = "5")]
    pub payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct CallbackRequest {
    #[prost(string, tag = "1")]
    pub task_id: String,
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct CallbackResponse {
    #[prost(int32, tag = "1")]
    pub status: i32,
    #[prost(string, tag = "2")]
    pub error_message: String,
}

impl Payload {
    fn status(&self) -> i32 {
        match self {
            Payload::AuthResponse(answer) => answer.status,
            Payload::RegistrationResponse(answer) => answer.status,
            Payload::CancellationResponse(answer) => answer.status,
            Payload::SessionRefreshResponse(answer) => answer.status,
            Payload::ClientRegistrationResponse(answer) => answer.status,
            Payload::ClientDeregistrationResponse(answer) => answer.status,
            Payload::ListTasksResponse(answer) => answer.status,
            Payload::GetTaskResponse(answer) => answer.status,
            other => panic!("not an answer: {other:?}"),
        }
    }
}

/// Fails the test when the server answers with something else.
macro_rules! expect {
    ($variant:ident, $answer:expr) => {
        match $answer {
            Payload::$variant(answer) => answer,
            other => panic!("expected {}, got {other:?}", stringify!($variant)),
        }
    };
}

/// A connection with a session. It checks of every answer that its status is one the original protocol knows.
pub struct Client {
    pub raw: Raw,
    pub session_id: String,
    pub expires_at_ms: u64,
}

impl Client {
    pub fn login(addr: SocketAddr, client_id: &str, password: &str) -> Self {
        let mut client = Self::connect(addr);
        let answer = client.authenticate(client_id, password);
        assert_eq!(answer.status, OK, "{answer:?}");
        assert!(!answer.session_id.is_empty() && answer.error_message.is_empty(), "{answer:?}");
        client.session_id = answer.session_id;
        client.expires_at_ms = answer.expires_at_ms;
        client
    }

    /// Without a session yet.
    pub fn connect(addr: SocketAddr) -> Self {
        Self { raw: Raw::connect(addr), session_id: String::new(), expires_at_ms: 0 }
    }

    pub fn authenticate(&mut self, client_id: &str, password: &str) -> AuthResponse {
        let handshake = AuthHandshake { client_id: client_id.to_owned(), password: password.to_owned() };
        expect!(AuthResponse, self.ask(Payload::AuthHandshake(handshake)))
    }

    pub fn envelope(&self, payload: Payload) -> Envelope {
        Envelope { session_id: self.session_id.clone(), payload: Some(payload) }
    }

    pub fn frame(&self, payload: Payload) -> Vec<u8> {
        frame(&self.envelope(payload))
    }

    pub fn ask(&mut self, payload: Payload) -> Payload {
        let frame = self.frame(payload);
        self.raw.send_bytes(&frame);
        self.answer()
    }

    pub fn try_answer(&mut self) -> Result<Payload, NoFrame> {
        let body = self.raw.next_frame(PATIENCE)?;
        let payload =
            Envelope::decode(&*body).expect("an envelope").payload.expect("an answer of the original protocol");
        assert!((OK..=SESSION_EXPIRED).contains(&payload.status()), "an old client does not know this: {payload:?}");
        Ok(payload)
    }

    pub fn answer(&mut self) -> Payload {
        self.try_answer().expect("an answer")
    }

    pub fn register(&mut self, payload: &[u8], delay_ms: u64, repeat_interval_ms: u64) -> RegistrationResponse {
        let task = Task { payload: payload.to_vec(), delay_ms, repeat_interval_ms };
        expect!(RegistrationResponse, self.ask(Payload::RegistrationRequest(task)))
    }

    /// Registers a task once, and returns its id and due instant.
    pub fn throw(&mut self, payload: &[u8], delay_ms: u64) -> (String, u64) {
        let answer = self.register(payload, delay_ms, 0);
        assert_eq!(answer.status, OK, "{answer:?}");
        (answer.task_id, answer.scheduled_time_ms)
    }

    pub fn cancel(&mut self, task_id: &str) -> CancellationResponse {
        let request = CancellationRequest { task_id: task_id.to_owned() };
        expect!(CancellationResponse, self.ask(Payload::CancellationRequest(request)))
    }

    pub fn get(&mut self, task_id: &str) -> GetTaskResponse {
        let request = GetTaskRequest { task_id: task_id.to_owned() };
        expect!(GetTaskResponse, self.ask(Payload::GetTaskRequest(request)))
    }

    pub fn list(&mut self, request: ListTasksRequest) -> ListTasksResponse {
        expect!(ListTasksResponse, self.ask(Payload::ListTasksRequest(request)))
    }

    /// All pages; none may show what another has shown.
    pub fn list_all(&mut self, request: &ListTasksRequest) -> Vec<TaskDetails> {
        self.list_all_from(request, String::new())
    }

    /// The pages from this token on.
    pub fn list_all_from(&mut self, request: &ListTasksRequest, mut next_token: String) -> Vec<TaskDetails> {
        let mut found = Vec::new();
        let mut seen = BTreeSet::new();
        loop {
            let answer = self.list(ListTasksRequest { next_token, ..request.clone() });
            assert_eq!(answer.status, OK, "{}", answer.error_message);
            for task in &answer.tasks {
                assert!(seen.insert(task.task_id.clone()), "shown twice: {}", task.task_id);
            }
            found.extend(answer.tasks);
            next_token = answer.next_token;
            if next_token.is_empty() {
                return found;
            }
        }
    }

    pub fn refresh(&mut self) -> SessionRefreshResponse {
        expect!(SessionRefreshResponse, self.ask(Payload::SessionRefresh(SessionRefreshRequest {})))
    }

    pub fn put_client(&mut self, request: ClientRegistrationRequest) -> ClientRegistrationResponse {
        expect!(ClientRegistrationResponse, self.ask(Payload::ClientRegistration(request)))
    }

    /// A plain client whose callbacks go to `endpoint`, with this password.
    pub fn add_client(&mut self, client_id: &str, endpoint: &str, retry: Option<RetryPolicy>) {
        let request = ClientRegistrationRequest {
            client_id: client_id.to_owned(),
            password: password_of(client_id),
            is_admin: false,
            callback: Some(CallbackConfig { protocol: TCP, endpoint: endpoint.to_owned() }),
            retry,
            dlq: None,
        };
        let answer = self.put_client(request);
        assert_eq!((answer.status, answer.error_message.as_str()), (OK, ""));
    }

    pub fn remove_client(&mut self, client_id: &str) -> ClientDeregistrationResponse {
        let request = ClientDeregistrationRequest { client_id: client_id.to_owned() };
        expect!(ClientDeregistrationResponse, self.ask(Payload::ClientDeregistration(request)))
    }
}

pub fn password_of(client_id: &str) -> String {
    format!("password of {client_id}")
}
