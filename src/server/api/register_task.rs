//! Registers a task.

use std::sync::Arc;
use std::time::Duration;

use super::operation::{Operation, Respond};
use super::tasks::due;
use crate::propose::{Admission, Ask, Due, Refused};
use crate::server::Service;
use crate::server::access::auth::random_hex;
use crate::server::access::sessions::Session;
use crate::server::problem::Problem;
use crate::server::routing::leader::{in_the_background, seek};
use crate::shard::{Numbered, Reply};
use crate::task::{DedupHash, GroupId, Invalid, ShardId, Tags};
use crate::wire::convert::{policy_over, recurrence_from};
use crate::wire::problems::Code;
use crate::wire::proto::{Origin, RegistrationResponse, Task};
use crate::wire::routing::{Access, group_of_task};

/// Of the name a sender of registrations gives itself.
const SENDER_BYTES_MAX: usize = 64;
/// No sender gets that far, and what counts on from there fits.
const NUMBER_MAX: u64 = 1 << 62;
const DEDUP_TTL_MS_DEFAULT: u64 = 24 * 3600 * 1000;
const DEDUP_TTL_MS_MAX: u64 = 366 * 24 * 3600 * 1000;
/// How long the keys are remembered that this node gives to what it may have to send twice.
const OWN_KEY_TTL_MS: u64 = 10 * 60_000;
const OWN_KEY_BYTES: usize = 16;

impl Operation for Task {
    async fn here(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let place = match &self.origin {
            None => Ok(Place::anywhere(service, 1)),
            Some(origin) => Place::of(service, &session, origin),
        };
        let mut admission = service.proposer.admission();
        register(service, &session, self, place, &mut admission, respond).await;
        admission.send();
    }

    /// One that may go to any shard goes to one that is led here, if there is one.
    async fn among_nodes(self, service: &Arc<Service>, session: Arc<Session>, respond: Respond<Self>) {
        let (keeper, other) = (session.clone(), service.clone());
        if !service.router.leads_any() {
            let work = async move { register_elsewhere(&other, &keeper, self).await };
            return in_the_background(service, respond, work).await;
        }
        let kept = self.clone();
        let respond = Box::new(move |answer| match answer {
            Err(problem) if Problem::is_not_leader(&problem) => {
                other.router.look_again();
                tokio::spawn(async move {
                    let _room = other.router.room().await;
                    respond(register_elsewhere(&other, &keeper, kept).await);
                });
            }
            answer => respond(answer),
        });
        self.here(service, session, respond).await;
    }
}

/// With a key, which says where it goes and makes it safe to send it twice.
async fn register_elsewhere(
    service: &Arc<Service>,
    session: &Arc<Session>,
    mut task: Task,
) -> Result<RegistrationResponse, Problem> {
    give_key(&mut task);
    let group = group_of_task(&task, Some(&session.client), service.shards).ok().flatten().expect("a short key");
    let answer = seek(service, session, task, group, Access::Write).await?;
    // The key was not the client's.
    Ok(RegistrationResponse { duplicate: false, ..answer })
}

/// With a key, it may be sent again when no answer comes, and is stored once.
pub(super) fn give_key(task: &mut Task) {
    task.dedup_key = format!("node-{}", random_hex(OWN_KEY_BYTES));
    task.dedup_ttl_ms = OWN_KEY_TTL_MS;
}

/// Where a task without a deduplication key goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub group: GroupId,
    numbered: Option<Numbered>,
}

impl Place {
    /// Where `tasks` of them go that may go to any shard.
    pub fn anywhere(service: &Service, tasks: usize) -> Self {
        Self { group: service.any_shard(tasks), numbered: None }
    }

    /// Where its sender says.
    pub fn of(service: &Service, session: &Session, origin: &Origin) -> Result<Self, Problem> {
        let shards = service.shards;
        let shard = u16::try_from(origin.shard).ok().filter(|shard| *shard < shards);
        let shard = shard.ok_or_else(|| {
            Invalid::new(format!("origin.shard: {}, and there are {shards}, counted from 0", origin.shard))
        })?;
        let sender = match origin.sender.len() {
            1..=SENDER_BYTES_MAX => DedupHash::new(&session.client, &origin.sender)?,
            bytes => {
                return Err(
                    Invalid::new(format!("origin.sender: {bytes} bytes, must be 1 to {SENDER_BYTES_MAX}")).into()
                );
            }
        };
        if !(1..=NUMBER_MAX).contains(&origin.number) || origin.answered_below > origin.number {
            let text = "origin.number: counts from 1 to 2^62, and must not be below origin.answered_below";
            return Err(Invalid::new(text).into());
        }
        let numbered = Numbered { sender, number: origin.number, answered_below: origin.answered_below };
        Ok(Self { group: GroupId::of_shard(ShardId(shard)), numbered: Some(numbered) })
    }

    /// That of the task which lies `behind` by so many in a batch.
    pub fn behind(self, behind: usize) -> Self {
        let number = |numbered: Numbered| numbered.number.saturating_add(behind as u64);
        let numbered = self.numbered.map(|numbered| Numbered { number: number(numbered), ..numbered });
        Self { numbered, ..self }
    }
}

/// `place` is where it goes unless it has a deduplication key. `respond` is called once.
pub(super) async fn register(
    service: &Arc<Service>,
    session: &Session,
    task: Task,
    place: Result<Place, Problem>,
    admission: &mut Admission<'_>,
    respond: impl FnOnce(Result<RegistrationResponse, Problem>) + Send + 'static,
) {
    let (group, ask) = match place.and_then(|place| registration(service, session, task, place)) {
        Ok(found) => found,
        Err(problem) => return respond(Err(problem)),
    };
    let arrived_us = service.clock.now_us();
    let (clock, metrics) = (service.clock.clone(), service.metrics.clone());
    let reply = move |result: Result<Reply, Refused>| {
        respond(match result {
            Ok(Reply::Registered { id, due_ms, duplicate }) => {
                metrics.registrations.inc();
                let took = clock.now_us().saturating_sub(arrived_us);
                metrics.registration_latency.observe(Duration::from_micros(took).as_secs_f64());
                let task_id = id.to_string();
                Ok(RegistrationResponse { task_id, scheduled_time_ms: due_ms, duplicate, ..Default::default() })
            }
            Ok(Reply::GivenUp) => Err(Problem::invalid(
                "origin.number: its sender has given it up, or had an answer to it; nothing was stored",
            )),
            Ok(Reply::TooManyOpen { open_max }) => Err(Problem::new(
                Code::LimitReached,
                format!(
                    "origin: {open_max} registrations of this sender wait in this shard for origin.answered_below to \
                     pass them; raise it, or register by another sender"
                ),
            )),
            Ok(other) => unreachable!("a registration is never answered with {other:?}"),
            Err(refused) => Err(refused.into()),
        });
    };
    admission.put(group, ask, Box::new(reply)).await;
}

fn registration(service: &Service, session: &Session, task: Task, place: Place) -> Result<(GroupId, Ask), Problem> {
    let limits = service.limits.with(session.limits);
    limits.check_payload(task.payload.len())?;
    limits.check_interval(task.repeat_interval_ms)?;
    let due = due(service, session, Some(task.delay_ms).filter(|delay| *delay > 0), task.due_ms)?;
    let due = due.unwrap_or(Due::After(0));
    let recurrence = recurrence_from(task.repeat_interval_ms, task.recurrence.as_ref())?;
    if let Some(recurrence) = &recurrence {
        recurrence.validate(Some(due.at(service.clock.now_ms())))?;
    }
    let tags = Tags::new(&task.name, task.labels)?;
    let policy = if task.callback.is_some() || task.retry.is_some() || task.dlq.is_some() {
        let own = (task.callback.as_ref(), task.retry.as_ref(), task.dlq.as_ref());
        policy_over(session.policy.as_deref(), own.0, own.1, own.2)?.map(Arc::new)
    } else {
        session.policy.clone()
    };
    let policy = policy.ok_or_else(|| {
        Invalid::new(
            "callback: neither the task, nor the session, nor the client has one; give it with the task or in the \
             handshake, or register the client with one",
        )
    })?;
    policy.check_payload(task.payload.len())?;
    let mut dedup = None;
    let Place { mut group, mut numbered } = place;
    if !task.dedup_key.is_empty() {
        if task.origin.is_some() {
            return Err(Invalid::new("origin: cannot be given together with dedup_key").into());
        }
        numbered = None;
        let hash = DedupHash::new(&session.client, &task.dedup_key)?;
        let ttl_ms = if task.dedup_ttl_ms == 0 { DEDUP_TTL_MS_DEFAULT } else { task.dedup_ttl_ms };
        if ttl_ms > DEDUP_TTL_MS_MAX {
            return Err(
                Invalid::new(format!("dedup_ttl_ms: {ttl_ms}, the limit is {DEDUP_TTL_MS_MAX} (366 days)")).into()
            );
        }
        dedup = Some((hash, ttl_ms));
        group = service.proposer.shard_of(hash);
    }
    let tags = (!tags.is_empty()).then_some(tags);
    let client = session.client.clone();
    Ok((group, Ask::Register { client, policy, due, recurrence, tags, dedup, numbered, payload: task.payload }))
}

#[cfg(test)]
mod tests {
    use super::super::rig::{DISK, ELSEWHERE, HERE, HOUR_MS, Rig, anywhere, check, in_an_hour};
    use super::*;
    use crate::task::ClientLimits;

    fn of_sender(shard: ShardId, number: u64) -> Task {
        let origin = Origin { sender: "sender".into(), shard: shard.0.into(), number, answered_below: number };
        Task { origin: Some(origin), ..in_an_hour() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_is_registered_once_under_its_key() {
        let rig = Rig::start().await;
        let keyed = Task { dedup_key: key_in(HERE), ..anywhere() };
        let first = rig.ask(&rig.client(), keyed.clone()).await.unwrap();
        let again = rig.ask(&rig.client(), keyed.clone()).await.unwrap();
        assert_eq!((first.duplicate, again.duplicate, &again.task_id), (false, true, &first.task_id));
        let strangers =
            rig.ask(&rig.stranger(), Task { dedup_key: key_of("stranger", HERE), ..anywhere() }).await.unwrap();
        assert_ne!(strangers.task_id, first.task_id, "a key is its client's own");
        let now_ms = rig.service.clock.now_ms();
        assert!(first.scheduled_time_ms.abs_diff(now_ms + HOUR_MS) < 1_000, "{first:?} at {now_ms}");
    }

    /// A key that the client's own shard is found by.
    fn key_in(shard: ShardId) -> String {
        key_of("orders", shard)
    }

    fn key_of(client: &str, shard: ShardId) -> String {
        let client = client.parse().unwrap();
        let keys = (0..).map(|number: u32| format!("key {number}"));
        let mut fitting = keys.filter(|key| DedupHash::new(&client, key).unwrap().shard(2) == shard);
        fitting.next().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_makes_no_sense_is_refused_by_name() {
        let rig = Rig::start().await;
        let far = 6 * 366 * 24 * HOUR_MS;
        for (name, task, text) in [
            ("a payload too large", Task { payload: vec![0; 600 * 1024].into(), ..in_an_hour() }, "payload"),
            ("a delay too long", Task { delay_ms: far, ..Default::default() }, "delay_ms"),
            ("two due instants", Task { due_ms: u64::MAX / 4, ..in_an_hour() }, "due_ms: cannot be given together"),
            (
                "a key remembered too long",
                Task { dedup_key: "k".into(), dedup_ttl_ms: far, ..anywhere() },
                "dedup_ttl_ms",
            ),
            ("a key and a number", Task { dedup_key: "k".into(), ..of_sender(HERE, 1) }, "origin: cannot be given"),
            ("a shard that is not there", of_sender(ShardId(7), 1), "origin.shard: 7"),
            ("no number", of_sender(HERE, 0), "origin.number"),
        ] {
            check(name, &rig.refusal(&rig.client(), task).await, Code::InvalidRequest, text);
        }
        let nameless = Session::of_caller("new".parse().unwrap(), false, None, ClientLimits::default());
        let refusal = rig.refusal(&Arc::new(nameless), in_an_hour()).await;
        check("without a callback", &refusal, Code::InvalidRequest, "callback: neither");
    }

    #[tokio::test(start_paused = true)]
    async fn what_its_sender_has_given_up_is_not_stored() {
        let rig = Rig::start().await;
        rig.ask(&rig.client(), of_sender(HERE, 5)).await.unwrap();
        let refusal = rig.refusal(&rig.client(), of_sender(HERE, 4)).await;
        check("a number below", &refusal, Code::InvalidRequest, "has given it up");
    }

    #[tokio::test(start_paused = true)]
    async fn without_room_it_is_refused_and_without_a_disk_nobody_knows() {
        let rig = Rig::start().await;
        rig.let_disk_run_low();
        let refusal = rig.refusal(&rig.client(), of_sender(HERE, 1)).await;
        check("a full disk", &refusal, Code::Overloaded, DISK);
        assert!(refusal.detail.unwrap().retry_after_ms > 0);
        let rig = Rig::start().await;
        rig.hang_disk();
        check(
            "a disk that hangs",
            &rig.refusal(&rig.client(), of_sender(HERE, 1)).await,
            Code::MaybeDone,
            "may have been",
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_belongs_elsewhere_is_sent_there_or_kept_waiting() {
        let rig = Rig::start().await;
        check("alone", &rig.refusal(&rig.client(), of_sender(ELSEWHERE, 1)).await, Code::NotLeader, "");
        let rig = rig.with_another_node();
        check("redirected", &rig.refusal(&rig.client(), of_sender(ELSEWHERE, 1)).await, Code::NotLeader, "shard 1");
        let before = tokio::time::Instant::now();
        check("waits", &rig.refusal(&rig.follows_nobody(), of_sender(ELSEWHERE, 1)).await, Code::NotLeader, "shard 1");
        assert!(before.elapsed() > Duration::from_secs(4), "somebody may lead soon");
        // One that may go anywhere goes to what is led here.
        let anywhere = rig.ask(&rig.client(), anywhere()).await.unwrap();
        assert_eq!(anywhere.task_id.parse::<crate::task::TaskId>().unwrap().shard(), HERE);
    }
}
