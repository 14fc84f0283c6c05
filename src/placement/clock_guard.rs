//! One clock that is wrong must not fire a whole shard early.
//!
//! A node that leads stamps with its own clock and fires by it. So every node compares its clock with those of the
//! others, which it hears about once a second: when it is further from the median than [`OFF_BY_MAX`], it neither stamps
//! nor dispatches, gives away what it leads, and asks for no votes, until its clock agrees again. With fewer than three
//! clocks nobody can say which of them is wrong.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Cluster;
use super::cluster::Heard;
use crate::raft::Groups;

/// Clocks that are kept by anything at all agree far better.
const OFF_BY_MAX: Duration = Duration::from_millis(500);
/// What was heard longer ago says nothing about now.
const HEARD_WITHIN: Duration = Duration::from_secs(5);
/// Half of this is how wrong the comparison may be.
const TOOK_MAX: Duration = Duration::from_millis(300);
const CLOCKS_MIN: usize = 3;

/// Runs until it is dropped.
pub async fn watch(cluster: Cluster) {
    let mut hearings = cluster.hearings();
    let mut was_wrong = false;
    loop {
        let usable = |heard: &Heard| heard.at.elapsed() < HEARD_WITHIN && heard.took < TOOK_MAX;
        let ahead_us = cluster.statuses().into_values().filter(usable).map(|heard| heard.clock_ahead_us).collect();
        // When nobody can say, nobody is accused.
        let behind_us = median_ahead_us(ahead_us).unwrap_or(0);
        let wrong = behind_us.unsigned_abs() > u64::try_from(OFF_BY_MAX.as_micros()).expect("half a second");
        cluster.groups().set_clock_wrong(wrong);
        if wrong {
            // Each time: who was not there to take it may be now.
            give_away(cluster.groups()).await;
        }
        if wrong != was_wrong {
            was_wrong = wrong;
            match wrong {
                true => tracing::error!(behind_us, "this node's clock is not that of the others; it leads nothing"),
                false => tracing::info!("this node's clock agrees with the others again"),
            }
        }
        if hearings.changed().await.is_err() {
            return;
        }
    }
}

/// By how much the median of all clocks is ahead of ours, which is one of them; `None` when they are too few.
fn median_ahead_us(mut others_us: Vec<i64>) -> Option<i64> {
    others_us.push(0);
    if others_us.len() < CLOCKS_MIN {
        return None;
    }
    others_us.sort_unstable();
    let middle = others_us.len() / 2;
    // With an even number the two in the middle may be far apart: the one that is nearer to ours gives us the benefit.
    Some(if others_us.len() % 2 == 1 || others_us[middle - 1].abs() > others_us[middle].abs() {
        others_us[middle]
    } else {
        others_us[middle - 1]
    })
}

/// Without the courtesies of a hand-over: nothing is dispatched or stored here any more. Where it does not work, this
/// node falls silent as a leader (see `raft::pacer`), and the others elect one.
async fn give_away(groups: &Groups) {
    for group in groups.all() {
        if let Some(heir) = group.best_heir(&BTreeSet::new())
            && let Err(error) = group.raft.trigger().transfer_leader(heir).await
        {
            tracing::warn!(group = %group.id, %error, "leadership was not given away");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_that_differs_is_the_wrong_one() {
        assert_eq!(median_ahead_us(vec![]), None);
        assert_eq!(median_ahead_us(vec![9_000_000]), None, "two clocks: nobody knows whose is wrong");
        assert_eq!(median_ahead_us(vec![10, 9_000_000]), Some(10), "it is another's");
        assert_eq!(median_ahead_us(vec![9_000_000, 9_000_100]), Some(9_000_000), "it is ours");
        assert_eq!(median_ahead_us(vec![-9_000_000, -9_000_100]), Some(-9_000_000));
        assert_eq!(median_ahead_us(vec![9_000_000, 9_000_100, 30]), Some(30), "half of them agree with ours");
        assert_eq!(median_ahead_us(vec![9_000_000, 9_000_100, 9_000_200, 1]), Some(9_000_000));
    }
}
