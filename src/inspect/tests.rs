//! A store with one row of every kind.

use std::collections::{BTreeMap, BTreeSet};

use openraft::entry::{Entry, EntryPayload};
use serde::Serialize;

use crate::raft::types::{Command, LogEntry, Member, Membership, Vote, VoteRow, encode_entry, log_id};
use crate::shard::Batch;
use crate::store::keys::{Key, TagKind, client_hash};
use crate::store::overlay::Write as StateWrite;
use crate::store::rows::{
    ApiKeyRow, Applied, ClientRow, CopyState, CursorRow, DeadLetterRow, DedupRow, Ended, HistoryRow, PolicyRow, Role,
    ShardMetaRow, StandInsRow, TaskRow, TimelineRow,
};
use crate::store::{LogWrite, Store, codec};
use crate::task::{
    Callback, CallbackOptions, ClientId, ClientLimits, DeadLetterId, DedupHash, Failure, FailureClass, GroupId, Policy,
    Protocol, Recurrence, Retry, Secret, ShardId, Tags, TaskId,
};

pub const GROUP: GroupId = GroupId(1);

fn policy() -> Policy {
    let callback = Callback::new(Protocol::Tcp, "h:1").unwrap();
    Policy { callback, retry: Retry::default(), dead_letter: Some("http://dead/".into()) }
}

pub fn id() -> TaskId {
    TaskId::new(1_700_000_000_000, ShardId(0), 7)
}

pub fn put(store: &Store, key: Key, value: &impl Serialize) {
    store.write_state([(key, StateWrite::Put(codec::encode(value)))]).unwrap();
}

/// One row of every kind.
pub fn fill(store: &Store) {
    let client: ClientId = "orders".parse().unwrap();
    let payload = bytes::Bytes::from(vec![b'x'; 100]);
    put(
        store,
        Key::task(GROUP, id()),
        &TaskRow {
            client: client.clone(),
            policy: policy().id(),
            first_due_ms: 5,
            first_occurrence: 0,
            recurrence: Some(Recurrence::every(9)),
            version: 1,
            tags: Some(Tags::new("nightly", [("env".into(), "test".into())]).unwrap()),
            role: Role::StandIn { task: id(), occurrence: 7, due_ms: 3 },
            payload: payload.clone(),
        },
    );
    let row = TimelineRow { occurrence: 1, attempt: 2, recurring: true };
    put(store, Key::timeline(GROUP, 5, id()), &row);
    let hash = client_hash(&client);
    put(store, Key::by_client(GROUP, hash, 5, id()), &row);
    put(store, Key::by_tag(GROUP, hash, TagKind::Name, "nightly", id()), &());
    let failure = Failure::new(FailureClass::Refused, "refused");
    let failed = Some((failure.clone(), 4));
    let cursor = CursorRow { due_ms: 5, occurrence: 1, attempt: 2, failure: failed, out_due_ms: None };
    put(store, Key::cursor(GROUP, id()), &cursor);
    let key = DedupHash::new(&client, "key").unwrap();
    put(store, Key::dedup(GROUP, key), &DedupRow { id: id(), due_ms: 5, expires_ms: 50 });
    put(store, Key::dedup_end(GROUP, 50, key), &vec![key]);
    put(store, Key::stand_ins(GROUP, id()), &StandInsRow(vec![id()]));
    let ended = HistoryRow {
        client: client.clone(),
        ended: Ended::Acknowledged,
        count: 1,
        due_ms: 2,
        dispatched_ms: 3,
        attempts: 1,
        failure: None,
    };
    put(store, Key::history(GROUP, 4, id(), 0), &ended);
    put(store, Key::policy(GROUP, policy().id()), &PolicyRow { policy: policy(), tasks: 1 });
    let died = DeadLetterRow {
        client: client.clone(),
        policy: policy(),
        payload,
        occurrence: 1,
        due_ms: 5,
        attempts: 3,
        failure,
        tags: None,
        copy: CopyState::UnderWay,
    };
    let letter = DeadLetterId { died_ms: 6, task: id() };
    put(store, Key::dead_letter(GROUP, letter), &died);
    put(store, Key::letter_of_client(GROUP, hash, letter), &());
    put(store, Key::applied(GROUP), &Applied { term: 1, index: 3 });
    put(store, Key::shard_meta(GROUP), &ShardMetaRow::default());
    let options = CallbackOptions { secret: Some(Secret::new("whsec_c3dvcmRmaXNo").unwrap()), ..Default::default() };
    let signed = Callback::new(Protocol::Http, "http://me:swordfish@h/due").unwrap().with(options).unwrap();
    let with_secrets = Policy { callback: signed, dead_letter: Some("https://me:swordfish@dead".into()), ..policy() };
    let row = ClientRow {
        password_hash: "$argon2id$secret".into(),
        admin: true,
        policy: Some(with_secrets),
        limits: ClientLimits::default(),
        since_ms: 1,
        api_keys: vec!["k1".into()],
    };
    put(store, Key::client("orders"), &row);
    let row = ApiKeyRow { client, label: "ci".into(), secret_hash: [7; 32], since_ms: 1 };
    put(store, Key::api_key("k1"), &row);

    let members = BTreeMap::from([(1, Member { node_id: 4 })]);
    let membership = Membership::new(vec![BTreeSet::from([1])], members).unwrap();
    let batch = Batch { now_ms: 11, ..Batch::default() }.encode(64);
    let payloads = [EntryPayload::Blank, EntryPayload::Membership(membership), EntryPayload::Normal(Command(batch))];
    for (index, payload) in (1..).zip(payloads) {
        let entry: LogEntry = Entry { log_id: log_id(1, index), payload };
        store.write_log(vec![LogWrite::Put(Key::log_entry(GROUP, index), encode_entry(&entry))]).unwrap();
    }
    let vote = VoteRow::from(&Vote::new(3, 1));
    store
        .write_log(vec![
            LogWrite::Put(Key::log_vote(GROUP), codec::encode(&vote)),
            LogWrite::Put(Key::log_purged(GROUP), codec::encode(&Applied { term: 1, index: 0 })),
            LogWrite::Put(Key::log_replica(GROUP), codec::encode(&1u64)),
        ])
        .unwrap();
}
