//! Limits, lines and breakers: the function on a walk with a clock of its own, and the whole with real receivers.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use boomerang_testkit::seed;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::time::{Instant, timeout};

use super::super::gate::{CoolDowns, Evidence, Gate, Pass};
use super::*;

const MS: Duration = Duration::from_millis(1);

fn failed(class: FailureClass) -> Result<(), Failure> {
    Err(Failure::new(class, "somewhere: it failed"))
}

/// A destination that comes and goes, and what its gate did so far.
struct Walk {
    rng: StdRng,
    gate: Gate,
    limit: usize,
    now: Instant,
    /// Those that are out, by the instant at which they come back.
    out: BTreeMap<(Instant, u64), Pass>,
    /// Those who joined the line, in order.
    line: VecDeque<Ticket>,
    /// Those who had their turn and have not begun, in order.
    coming: VecDeque<Pass>,
    told: HashSet<u128>,
    timer: Option<Instant>,
    up: bool,
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Arrival,
    Begins,
    ComesBack,
    Timer,
}

impl Walk {
    fn tell(&mut self, ticket: Ticket) {
        assert!(self.told.insert(u128::from_be_bytes(*ticket.task.as_bytes())), "told twice: {ticket:?}");
    }

    fn leave(&mut self, pass: Pass) {
        let lasts = if self.rng.random_ratio(1, 20) { 3_000 } else { self.rng.random_range(0..100) };
        let number = self.rng.random();
        self.out.insert((self.now + lasts * MS, number), pass);
        assert!(self.out.len() + self.coming.len() <= self.limit, "more are out than may be");
    }

    fn arrive(&mut self, number: u64) {
        let ticket = ticket(number);
        match self.gate.admit(ticket, self.now) {
            Some(pass) => {
                assert!(self.line.is_empty() && self.coming.is_empty(), "somebody was overtaken");
                self.tell(ticket);
                self.leave(pass);
            }
            None => self.line.push_back(ticket),
        }
        self.set_timer();
    }

    fn set_timer(&mut self) {
        let at = self.gate.wakes_at(self.now);
        self.timer = self.timer.into_iter().chain(at).min();
    }

    fn come_back(&mut self) {
        let (_, pass) = self.out.pop_first().unwrap();
        let evidence = match self.rng.random_range(0..10) {
            0 => Evidence::Nothing,
            _ if self.up => Evidence::Answered,
            _ => Evidence::Failed(Failure::new(FailureClass::Refused, "")),
        };
        self.gate.end(pass, evidence, self.now);
    }

    /// As whoever holds the gate does after it moved.
    fn hand_out(&mut self) {
        for (tickets, _) in self.gate.take_down() {
            for ticket in tickets {
                assert_eq!(self.line.pop_front(), Some(ticket));
                self.tell(ticket);
            }
        }
        let was_open = self.gate.is_open();
        let turns = self.gate.turns(self.now);
        assert!(!was_open || turns.len() <= 1, "more than a probe");
        for (ticket, pass) in turns {
            assert_eq!(self.line.pop_front(), Some(ticket), "out of order");
            self.tell(ticket);
            self.coming.push_back(pass);
        }
        self.set_timer();
    }

    /// Or finds that its task is gone.
    fn begin(&mut self) {
        let mut pass = self.coming.pop_front().unwrap();
        if self.rng.random_ratio(1, 10) {
            return self.gate.end(pass, Evidence::Nothing, self.now);
        }
        self.gate.begin(&mut pass);
        self.leave(pass);
    }
}

#[test]
fn on_any_walk_nobody_is_lost_overtaken_or_told_twice() {
    for seed in seed::rounds(1_000) {
        let mut rng = seed.rng();
        let limit = rng.random_range(1..20);
        let cool_downs = CoolDowns { min: 50 * MS, max: 400 * MS };
        let (gate, now) = (Gate::new(limit, cool_downs), Instant::now());
        let (out, line, told) = (BTreeMap::new(), VecDeque::new(), HashSet::new());
        let coming = VecDeque::new();
        let mut walk = Walk { rng, gate, limit, now, out, line, coming, told, timer: None, up: true };
        let tickets = 400;
        let mut arrivals: VecDeque<(Instant, u64)> = VecDeque::new();
        let mut at = now;
        for number in 0..tickets {
            // In bursts, with pauses between.
            at += if walk.rng.random_ratio(1, 30) { walk.rng.random_range(0..2_000) * MS } else { Duration::ZERO };
            arrivals.push_back((at, number));
        }
        loop {
            let arrival = arrivals.front().map(|next| (next.0, Event::Arrival));
            let comes_back = walk.out.keys().next().map(|next| (next.0, Event::ComesBack));
            let begins = walk.coming.front().map(|_| (walk.now, Event::Begins));
            let timer = walk.timer.map(|at| (at, Event::Timer));
            // What happens at the same instant happens in any order.
            let mut next: Vec<_> = [arrival, begins, comes_back, timer].into_iter().flatten().collect();
            let Some(now) = next.iter().map(|next| next.0).min() else { break };
            next.retain(|next| next.0 == now);
            walk.now = now.max(walk.now);
            if walk.rng.random_ratio(1, 40) {
                walk.up = !walk.up;
            }
            match next[walk.rng.random_range(0..next.len())].1 {
                Event::Arrival => walk.arrive(arrivals.pop_front().unwrap().1),
                Event::Begins => {
                    walk.begin();
                    walk.hand_out();
                }
                Event::ComesBack => {
                    walk.come_back();
                    walk.hand_out();
                }
                Event::Timer => {
                    walk.timer = None;
                    walk.hand_out();
                }
            }
            assert_eq!((walk.gate.waiting(), walk.gate.out()), (walk.line.len(), walk.coming.len() + walk.out.len()));
        }
        assert!(walk.line.is_empty() && walk.coming.is_empty(), "the line is stuck: {:?}", walk.line);
        assert_eq!(walk.told.len() as u64, tickets);
        assert!(walk.gate.is_idle());
    }
}

/// Drops some permits at once, as when their tasks are gone, and passes the others on.
struct Careless {
    told: mpsc::UnboundedSender<(Ticket, Option<Permit>)>,
}

impl Waiters for Careless {
    fn go(&self, admitted: Vec<(Ticket, Permit)>) {
        for (ticket, permit) in admitted {
            let kept = (ticket.task.as_bytes()[15] % 3 > 0).then_some(permit);
            let _ = self.told.send((ticket, kept));
        }
    }

    fn down(&self, tickets: Vec<Ticket>, failure: &Failure, _: &DestinationName) {
        assert_eq!(failure.class, FailureClass::CircuitOpen);
        for ticket in tickets {
            let _ = self.told.send((ticket, None));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_threads_at_once_lose_nobody() {
    const LIMIT: usize = 4;
    const WORKERS: u64 = 4;
    const TICKETS: u64 = 3_000;
    let settings = CallbackSettings { in_flight_max: LIMIT, cool_down_min: MS, cool_down_max: 4 * MS, ..settings() };
    let callbacks = sockets(settings);
    let (told, mut hears) = mpsc::unbounded_channel();
    callbacks.set_waiters(Arc::new(Careless { told: told.clone() }));
    let to = callback("tcp://h:1");
    let (up, out) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let seed = seed::one();
    let mut fates = seed.rng();
    let mut hold = move |to: Callback, mut permit: Permit| {
        let (up, out, mut rng) = (up.clone(), out.clone(), fates.fork());
        tokio::spawn(async move {
            assert!(out.fetch_add(1, Ordering::SeqCst) < LIMIT, "more are out than may be");
            if rng.random() {
                permit.begin();
            }
            for _ in 0..rng.random_range(0..5) {
                tokio::task::yield_now().await;
            }
            if rng.random_ratio(1, 30) {
                up.fetch_xor(true, Ordering::Relaxed);
            }
            if rng.random_ratio(9, 10) {
                let ended = if up.load(Ordering::Relaxed) { Ok(()) } else { failed(FailureClass::Timeout) };
                permit.note(&to, &ended, false);
            }
            out.fetch_sub(1, Ordering::SeqCst);
        })
    };
    for worker in 0..WORKERS {
        let (callbacks, to, told) = (callbacks.clone(), to.clone(), told.clone());
        tokio::spawn(async move {
            for number in 0..TICKETS {
                let ticket = ticket(worker * TICKETS + number);
                if let Some(permit) = callbacks.admit(&to, ticket) {
                    let _ = told.send((ticket, Some(permit)));
                }
                tokio::task::yield_now().await;
            }
        });
    }
    let mut heard = HashSet::new();
    while heard.len() < (WORKERS * TICKETS) as usize {
        let hears = timeout(PATIENCE, hears.recv()).await;
        let (ticket, permit) = hears.unwrap_or_else(|_| panic!("stuck: {:?}", callbacks.counts())).unwrap();
        assert!(heard.insert(*ticket.task.as_bytes()), "told twice: {ticket:?}");
        if let Some(permit) = permit {
            hold(to.clone(), permit);
        }
    }
    assert_eq!(callbacks.counts().waiting, 0);
    assert!(hears.try_recv().is_err());
}

#[tokio::test]
async fn whoever_came_while_another_was_on_its_way_is_told_when_that_one_begins() {
    let callbacks = sockets(CallbackSettings { in_flight_max: 2, ..settings() });
    let mut told = listen(&callbacks);
    let to = callback("grpc://h:1");
    let [first, second] = [0, 1].map(|number| callbacks.admit(&to, ticket(number)).unwrap());
    assert!(callbacks.admit(&to, ticket(2)).is_none());
    drop(first);
    let (turn, mut permit) = one(&mut told).await;
    assert_eq!(turn, ticket(2));
    drop(second);
    assert!(callbacks.admit(&to, ticket(3)).is_none(), "there is room, and one that came before");
    assert!(told.try_recv().is_err());
    // It stays out: nobody else would say anything.
    permit.begin();
    assert_eq!(one(&mut told).await.0, ticket(3));
}

#[tokio::test]
async fn a_line_whose_permits_are_all_dropped_at_once_is_no_deep_recursion() {
    struct Drops(mpsc::UnboundedSender<usize>);
    impl Waiters for Drops {
        fn go(&self, admitted: Vec<(Ticket, Permit)>) {
            let _ = self.0.send(admitted.len());
        }
        fn down(&self, _: Vec<Ticket>, _: &Failure, _: &DestinationName) {}
    }
    let callbacks = sockets(CallbackSettings { in_flight_max: 1, ..settings() });
    let (out, mut turns) = mpsc::unbounded_channel();
    callbacks.set_waiters(Arc::new(Drops(out)));
    let to = callback("tcp://h:1");
    let first = callbacks.admit(&to, ticket(0)).unwrap();
    for number in 1..=100_000 {
        assert!(callbacks.admit(&to, ticket(number)).is_none());
    }
    assert_eq!(callbacks.counts(), CallbackCounts { waiting: 100_000, breakers_open: 0, destinations: 1 });
    drop(first);
    let mut handed = 0;
    while let Ok(count) = turns.try_recv() {
        handed += count;
    }
    assert_eq!((handed, callbacks.counts().waiting), (100_000, 0));
}

#[tokio::test]
async fn a_destination_that_is_down_costs_one_connection_per_cool_down_and_comes_back() {
    let settings = CallbackSettings { cool_down_min: 200 * MS, cool_down_max: 400 * MS, ..settings() };
    let callbacks = sockets(settings);
    let mut told = listen(&callbacks);
    let address = dead_address();
    let to = callback(&format!("tcp://{address}"));
    for _ in 0..5 {
        assert_failed(once(&callbacks, &to).await, FailureClass::Refused, &[]);
    }
    assert!((0..3).all(|number| callbacks.admit(&to, ticket(number)).is_none()));
    assert_eq!(callbacks.counts().breakers_open, 1);

    let (probe, permit) = one(&mut told).await;
    assert_eq!(probe, ticket(0));
    assert!(callbacks.admit(&to, ticket(3)).is_none());
    assert!(matches!(callbacks.deliver(permit, delivery(to.clone(), 0)).await, Outcome::Failed(_)));
    let Reported::Down(tickets, failure) = told.recv().await.unwrap() else { panic!("nobody was told") };
    assert_eq!(tickets, [ticket(1), ticket(2), ticket(3)]);
    assert_eq!(failure.class, FailureClass::CircuitOpen);
    assert!(failure.text.starts_with(&format!("not sent: {address} is down: cannot connect: ")), "{failure}");

    let listener = TcpListener::bind(address).await.unwrap();
    assert!((4..7).all(|number| callbacks.admit(&to, ticket(number)).is_none()));
    let (probe, permit) = one(&mut told).await;
    assert_eq!(probe, ticket(4));
    // Somebody is there, but hangs up instead of an answer.
    tokio::spawn(async move { listener.accept().await.map(drop) });
    let ended = callbacks.deliver(permit, delivery(to.clone(), 4)).await;
    assert!(matches!(ended, Outcome::Failed(failure) if failure.class == FailureClass::Broken));
    let Reported::Down(tickets, _) = told.recv().await.unwrap() else { panic!("nobody was told") };
    assert_eq!(tickets, [ticket(5), ticket(6)]);

    // No is an answer too.
    assert!((7..10).all(|number| callbacks.admit(&to, ticket(number)).is_none()));
    let (_, mut permit) = one(&mut told).await;
    permit.note(&to, &failed(FailureClass::BadStatus), false);
    drop(permit);
    let Reported::Go(admitted) = told.recv().await.unwrap() else { panic!("they failed") };
    assert_eq!(admitted.iter().map(|(ticket, _)| *ticket).collect::<Vec<_>>(), [ticket(8), ticket(9)]);
    assert_eq!(callbacks.counts().breakers_open, 0);
}

async fn one(told: &mut mpsc::UnboundedReceiver<Reported>) -> (Ticket, Permit) {
    let told = timeout(PATIENCE, told.recv()).await.expect("the line is stuck").unwrap();
    let Reported::Go(mut admitted) = told else { panic!("{told:?}") };
    assert_eq!(admitted.len(), 1);
    admitted.remove(0)
}

#[tokio::test]
async fn only_what_the_way_to_the_receiver_does_opens_a_breaker() {
    let callbacks = sockets(settings());
    for (class, opens) in [
        (FailureClass::Refused, true),
        (FailureClass::Timeout, true),
        (FailureClass::Broken, true),
        (FailureClass::Unreachable, true),
        (FailureClass::BadStatus, false),
        (FailureClass::BadAnswer, false),
        (FailureClass::TooLarge, false),
    ] {
        let to = callback(&format!("tcp://{class:?}:1"));
        for _ in 0..20 {
            let Some(mut permit) = callbacks.inner.destinations.admit(&to, ticket(0)) else { break };
            permit.note(&to, &failed(class), false);
        }
        let open = callbacks.inner.destinations.admit(&to, ticket(0)).is_none();
        assert_eq!(open, opens, "{class}");
    }
}

#[tokio::test]
async fn a_destination_is_a_protocol_and_a_host() {
    let callbacks = sockets(CallbackSettings { in_flight_max: 1, ..settings() });
    let _told = listen(&callbacks);
    let options = |http2, acknowledge| CallbackOptions { http2, acknowledge, ..CallbackOptions::default() };
    let distinct = [
        callback("tcp://h:1"),
        callback("udp://h:1"),
        with("udp://h:1", options(false, true)),
        callback("grpc://h:1"),
        callback("http://h:1/a"),
        callback("https://h:1/a"),
        with("http://h:1/a", options(true, false)),
        callback("http://h:2/a"),
    ];
    let permits: Vec<Permit> = distinct.iter().map(|to| callbacks.admit(to, ticket(0)).unwrap()).collect();
    for same in ["http://h:1/b", "http://h:1", "http://u:p@h:1?x=http://h:3/", "http://h:1#x"] {
        assert!(callbacks.admit(&callback(same), ticket(1)).is_none(), "{same}");
    }
    assert_eq!(callbacks.counts().destinations, distinct.len());
    assert_eq!(format!("{:?}", permits[4]), "Permit for Http h:1");
}

#[tokio::test]
async fn a_task_that_got_another_receiver_while_it_waited_says_nothing_about_the_first() {
    let callbacks = sockets(settings());
    let (first, second) = (callback("tcp://h:1"), callback("tcp://h:2"));
    for _ in 0..20 {
        let mut permit = callbacks.admit(&first, ticket(0)).expect("the breaker is closed");
        permit.note(&second, &failed(FailureClass::Refused), false);
    }
}

#[tokio::test]
async fn destinations_nobody_uses_are_forgotten() {
    let callbacks = sockets(settings());
    let permit = callbacks.admit(&callback("tcp://h:1"), ticket(0)).unwrap();
    drop(callbacks.admit(&callback("tcp://h:2"), ticket(0)));
    callbacks.inner.destinations.forget_idle(PATIENCE);
    assert_eq!(callbacks.counts().destinations, 2, "they may be used again");
    callbacks.inner.destinations.forget_idle(Duration::ZERO);
    assert_eq!(callbacks.counts().destinations, 1, "a permit is out");
    drop(permit);
    callbacks.inner.destinations.forget_idle(Duration::ZERO);
    assert_eq!(callbacks.counts().destinations, 0);
}

/// How many of `count` deliveries were acknowledged. Those that have to wait are left in line.
async fn deliver_all(callbacks: &Callbacks, to: &Callback, count: u64) -> usize {
    let attempts = (0..count).filter_map(|number| {
        let permit = callbacks.admit(to, ticket(number))?;
        let (callbacks, delivery) = (callbacks.clone(), delivery(to.clone(), number));
        Some(tokio::spawn(async move { callbacks.deliver(permit, delivery).await }))
    });
    let ended = futures::future::join_all(attempts.collect::<Vec<_>>()).await;
    ended.into_iter().filter(|ended| matches!(ended, Ok(Outcome::Acknowledged))).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_hangs_takes_its_limit_and_nothing_from_the_others() {
    let callbacks = sockets(settings());
    let mut told = listen(&callbacks);
    let router = axum::Router::new().fallback(|| async { "" });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let quick = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let limit = callbacks.inner.settings.in_flight_by_socket_max as u64;

    let hangs = callback(&format!("http://{}/x", silent().await));
    let hanging = tokio::spawn({
        let (callbacks, hangs) = (callbacks.clone(), hangs.clone());
        async move { deliver_all(&callbacks, &hangs, 4 * limit).await }
    });
    while callbacks.counts().waiting < 3 * limit as usize {
        tokio::task::yield_now().await;
    }
    let options = CallbackOptions { http2: true, ..CallbackOptions::default() };
    let began = Instant::now();
    assert_eq!(deliver_all(&callbacks, &with(&format!("http://{quick}/"), options), 1_000).await, 1_000);
    let took = began.elapsed();
    println!("1,000 deliveries beside a receiver that hangs: {took:?}");
    assert!(took < PATIENCE / 4, "{took:?}");
    assert_eq!(callbacks.counts().waiting, 3 * limit as usize);
    assert!(!hanging.is_finished() && told.try_recv().is_err());
    hanging.abort();
}
