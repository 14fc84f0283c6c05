//! Dead letters, once they are there: played again, or thrown away. Touches: dead letter, task, timeline, policy.

use super::{Effect, Purge, Replay, Reply, Shard};
use crate::store::StoreError;
use crate::store::keys::{Key, client_hash};
use crate::store::rows::{DeadLetterRow, Role, TaskRow};
use crate::task::{ClientId, DeadLetterId};

impl Shard<'_, '_> {
    /// Due at once, with all its attempts; delivered in the name of the task that died.
    pub(super) fn replay(&mut self, replay: Replay) -> Result<Reply, StoreError> {
        let Replay { letter, owner, stand_in } = replay;
        let Some(row) = self.take_letter(letter, owner.as_ref())? else { return Ok(Reply::NotFound) };
        let DeadLetterRow { client, policy, payload, tags, occurrence, due_ms, .. } = row;
        let policy = self.bring(policy);
        let now_ms = self.meta.now_ms;
        let task = TaskRow {
            client,
            policy,
            first_due_ms: now_ms,
            first_occurrence: 0,
            recurrence: None,
            version: 1,
            tags,
            role: Role::StandIn { task: letter.task, occurrence, due_ms },
            payload,
        };
        self.add(stand_in, &task);
        self.effects.push(Effect::Scheduled { id: stand_in, due_ms: now_ms });
        Ok(Reply::Replayed { id: stand_in })
    }

    pub(super) fn purge(&mut self, purge: Purge) -> Result<Reply, StoreError> {
        let Purge { letter, owner } = purge;
        let taken = self.take_letter(letter, owner.as_ref())?;
        Ok(if taken.is_some() { Reply::Stored } else { Reply::NotFound })
    }

    fn take_letter(
        &mut self,
        letter: DeadLetterId,
        owner: Option<&ClientId>,
    ) -> Result<Option<DeadLetterRow>, StoreError> {
        let key = Key::dead_letter(self.group, letter);
        let row: Option<DeadLetterRow> = self.rows.get("a dead letter", &key)?;
        let Some(row) = row.filter(|row| owner.is_none_or(|owner| *owner == row.client)) else { return Ok(None) };
        self.rows.delete(key);
        self.rows.delete(Key::letter_of_client(self.group, client_hash(&row.client), letter));
        self.meta.dead_letters =
            self.meta.dead_letters.checked_sub(1).expect("a dead letter that is there was counted");
        Ok(Some(row))
    }
}
