//! Waiting for what tells nobody when it happens: a cluster that is asked by way of a tool, a process without a word.
//!
//! The one place of this package that waits by looking again and again, but for the shell that cleans up
//! (`cluster::keeper`). What can be heard of is waited for where it is said: in the history
//! ([`crate::history::Recorder::until`]), at the end of a process, at an entry that is applied.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};

/// Asks until the answer is good, or `within` is over; then the last answer stands.
pub async fn insist<T, E, F>(within: Duration, every: Duration, mut ask: impl FnMut() -> F) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let until = Instant::now() + within;
    let mut turns = tokio::time::interval(every);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        match ask().await {
            Err(_) if Instant::now() < until => {}
            answer => return answer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_good_answer_counts_or_else_the_last_bad_one() {
        let mut asked = 0;
        let third = insist(Duration::from_secs(60), Duration::from_secs(1), || {
            asked += 1;
            std::future::ready(if asked == 3 { Ok(asked) } else { Err(asked) })
        });
        assert_eq!(third.await, Ok(3));
        let began = Instant::now();
        let never = insist(Duration::from_secs(60), Duration::from_secs(1), || std::future::ready(Err::<(), _>("no")));
        assert_eq!(never.await, Err("no"));
        assert_eq!(began.elapsed(), Duration::from_secs(60));
    }
}
