//! The rows of slots: where a timer waits, and which busy slot is next. The idea is in `mod.rs`.
//!
//! ```text
//!   row 0 .. levels-1   64 slots each, one digit of the due tick   busy bit s: slot s holds timers
//!   far row             slot b: the due first differs in bit b     busy bit b: slot b holds timers
//!   ready               one list: due tick <= cursor               busy bit 0
//! ```
//!
//! A slot is a doubly linked list through the slab, first in, first out. No timer stores which list
//! it is in: due tick and cursor tell, and tell the same until the cursor enters the next busy
//! slot, for up to there every timer first differs from it in the same digit (far: the same bit).
//! So a whole slot becomes ready by changing two links. A timer moves down once per row at most,
//! and in the far row once per bit, at least halving its distance: ten years ahead, under four
//! levels of 1 ms, that is some 15 + 4 moves in a life.

use super::slab::{NIL, Slab};

/// Bits of a digit.
const SLOT_BITS: u32 = 6;

/// Slots in a row: as many as the bits of one occupancy word.
const SLOTS: u32 = 1 << SLOT_BITS;
const _: () = assert!(SLOTS == u64::BITS);

/// Most levels. Eight levels of 1 ms span 8,900 years.
pub(super) const LEVELS_MAX: u32 = 8;
const _: () = assert!(LEVELS_MAX * SLOT_BITS < u64::BITS, "the far row needs a bit of its own");

/// Rows with an occupancy word: the levels, the far row and the ready list.
const ROWS_MAX: usize = LEVELS_MAX as usize + 2;

/// One slot: a list through the slab.
#[derive(Clone, Copy)]
struct List {
    head: u32,
    tail: u32,
}

const EMPTY: List = List { head: NIL, tail: NIL };

/// Names a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    row: u32,
    slot: u32,
}

/// All slots of a wheel, and how far it has come.
pub(super) struct Slots {
    /// Number of ordinary rows; the far row comes after them, then the ready list.
    levels: u32,
    /// The tick the wheel has reached.
    cursor: u64,
    /// Per row, which slots hold timers.
    busy: [u64; ROWS_MAX],
    /// Row after row, `SLOTS` each; the ready list is a single one at the end.
    lists: Box<[List]>,
    /// Slots visited and timers moved by `advance`, for the tests that bound its work.
    #[cfg(test)]
    pub(super) steps: u64,
}

impl Slots {
    /// Empty slots with the cursor at a tick.
    pub(super) fn new(levels: u32, cursor: u64) -> Self {
        let waiting = (levels as usize + 1) * SLOTS as usize;
        Self {
            levels,
            cursor,
            busy: [0; ROWS_MAX],
            lists: vec![EMPTY; waiting + 1].into_boxed_slice(),
            #[cfg(test)]
            steps: 0,
        }
    }

    /// The slot in which a timer due at a tick waits, seen from the cursor.
    fn place_of(&self, due_tick: u64) -> Place {
        if due_tick <= self.cursor {
            return self.ready();
        }
        let first_bit = (due_tick ^ self.cursor).ilog2();
        let row = first_bit / SLOT_BITS;
        if row < self.levels {
            Place { row, slot: digit(due_tick, row) }
        } else {
            Place { row: self.levels, slot: first_bit }
        }
    }

    /// The place of the ready list.
    fn ready(&self) -> Place {
        Place { row: self.levels + 1, slot: 0 }
    }

    fn list(&mut self, place: Place) -> &mut List {
        &mut self.lists[(place.row * SLOTS + place.slot) as usize]
    }

    /// The timer that is to leave next, when one is ready.
    pub(super) fn first_ready(&self) -> Option<u32> {
        let head = self.lists[self.lists.len() - 1].head;
        (head != NIL).then_some(head)
    }

    /// The next busy slot and the tick at which it begins, always after the cursor. Looks at a word
    /// per row.
    pub(super) fn next_busy(&self) -> Option<(Place, u64)> {
        let row = (0..=self.levels).find(|&row| self.busy[row as usize] != 0)?;
        let slot = self.busy[row as usize].trailing_zeros();
        let start_tick = if row < self.levels {
            let above = SLOT_BITS * (row + 1);
            (self.cursor >> above << above) | (u64::from(slot) << (SLOT_BITS * row))
        } else {
            ((self.cursor >> slot) | 1) << slot
        };
        debug_assert!(start_tick > self.cursor, "row {row} slot {slot} lies behind the cursor");
        Some((Place { row, slot }, start_tick))
    }

    /// Takes the cursor to the next busy slot and empties that into the ready list or into lower
    /// rows. Without one up to `target_tick` it takes the cursor there and returns false. Nothing
    /// may be ready, or order would be lost.
    pub(super) fn advance<K: Copy>(&mut self, slab: &mut Slab<K>, target_tick: u64) -> bool {
        debug_assert!(self.first_ready().is_none(), "ready timers leave before the cursor moves");
        #[cfg(test)]
        {
            self.steps += 1;
        }
        match self.next_busy() {
            Some((place, start_tick)) if start_tick <= target_tick => {
                self.cursor = start_tick;
                let list = self.take(place);
                if place.row == 0 {
                    // All of a slot of the lowest row is due at the same tick, which is now the
                    // cursor's.
                    let ready = self.ready();
                    *self.list(ready) = list;
                    self.set_busy(ready);
                } else {
                    self.move_down(slab, list.head);
                }
                true
            }
            _ => {
                assert!(target_tick >= self.cursor, "the cursor never goes back");
                self.cursor = target_tick;
                false
            }
        }
    }

    /// Spreads a list over the places its timers have under the new cursor, keeping their order.
    fn move_down<K: Copy>(&mut self, slab: &mut Slab<K>, head: u32) {
        let mut next = head;
        while next != NIL {
            let timer = next;
            next = slab[timer].next;
            self.push_back(slab, timer);
            #[cfg(test)]
            {
                self.steps += 1;
            }
        }
    }

    /// Appends a timer to the list its due tick belongs to.
    pub(super) fn push_back<K: Copy>(&mut self, slab: &mut Slab<K>, timer: u32) {
        let place = self.place_of(slab[timer].due_tick);
        self.set_busy(place);
        let list = self.list(place);
        let before = std::mem::replace(&mut list.tail, timer);
        if before == NIL {
            list.head = timer;
        } else {
            slab[before].next = timer;
        }
        slab[timer].prev = before;
        slab[timer].next = NIL;
    }

    /// Puts a timer that the cursor has reached before all that are ready, and any other to where it belongs.
    pub(super) fn push_front_if_ready<K: Copy>(&mut self, slab: &mut Slab<K>, timer: u32) {
        if slab[timer].due_tick > self.cursor {
            return self.push_back(slab, timer);
        }
        let ready = self.ready();
        self.set_busy(ready);
        let list = self.list(ready);
        let after = std::mem::replace(&mut list.head, timer);
        if after == NIL {
            list.tail = timer;
        } else {
            slab[after].prev = timer;
        }
        slab[timer].next = after;
        slab[timer].prev = NIL;
    }

    /// Takes a timer out of its list; its own links are left as they were.
    pub(super) fn unlink<K: Copy>(&mut self, slab: &mut Slab<K>, timer: u32) {
        let entry = &slab[timer];
        let (prev, next) = (entry.prev, entry.next);
        let place = self.place_of(entry.due_tick);
        let list = self.list(place);
        if prev == NIL {
            debug_assert_eq!(list.head, timer, "first of a list it is not in");
            list.head = next;
        } else {
            slab[prev].next = next;
        }
        if next == NIL {
            debug_assert_eq!(list.tail, timer, "last of a list it is not in");
            list.tail = prev;
        } else {
            slab[next].prev = prev;
        }
        if list.head == NIL {
            self.take(place);
        }
    }

    /// Points the neighbours of a timer, or the ends of its list, to the place in the slab it was
    /// moved to.
    pub(super) fn relink<K: Copy>(&mut self, slab: &mut Slab<K>, timer: u32) {
        let entry = &slab[timer];
        let (prev, next) = (entry.prev, entry.next);
        let place = self.place_of(entry.due_tick);
        let list = self.list(place);
        if prev == NIL {
            list.head = timer;
        } else {
            slab[prev].next = timer;
        }
        if next == NIL {
            list.tail = timer;
        } else {
            slab[next].prev = timer;
        }
    }

    fn set_busy(&mut self, place: Place) {
        self.busy[place.row as usize] |= 1 << place.slot;
    }

    /// Empties a slot and returns the list it held.
    fn take(&mut self, place: Place) -> List {
        self.busy[place.row as usize] &= !(1 << place.slot);
        std::mem::replace(self.list(place), EMPTY)
    }

    /// Heap memory held.
    pub(super) fn allocated_bytes(&self) -> usize {
        size_of_val::<[List]>(&self.lists)
    }

    /// Walks every list and returns the timers found. Panics unless each is in the place its due
    /// tick names, linked both ways, and the busy words tell exactly which lists hold timers.
    #[cfg(test)]
    pub(super) fn validate<K: Copy>(&self, slab: &Slab<K>) -> Vec<u32> {
        let mut timers = Vec::new();
        for (number, list) in (0u32..).zip(&self.lists) {
            let place = Place { row: number / SLOTS, slot: number % SLOTS };
            let busy = self.busy[place.row as usize] >> place.slot & 1 == 1;
            assert_eq!(busy, list.head != NIL, "{place:?} busy bit");
            let mut prev = NIL;
            let mut timer = list.head;
            while timer != NIL {
                assert_eq!(self.place_of(slab[timer].due_tick), place, "timer {timer}");
                assert_eq!(slab[timer].prev, prev, "timer {timer} at {place:?}");
                timers.push(timer);
                prev = timer;
                timer = slab[timer].next;
            }
            assert_eq!(list.tail, prev, "{place:?} tail");
        }
        for (row, &busy) in self.busy.iter().enumerate().skip(self.levels as usize + 1) {
            let allowed = u64::from(row == self.levels as usize + 1);
            assert_eq!(busy & !allowed, 0, "busy bits of row {row}, which has no such slots");
        }
        timers
    }
}

/// The digit of a tick that a row looks at.
fn digit(tick: u64, row: u32) -> u32 {
    let digit = (tick >> (SLOT_BITS * row)) & u64::from(SLOTS - 1);
    #[allow(clippy::cast_possible_truncation, reason = "masked to SLOT_BITS bits just above")]
    {
        digit as u32
    }
}
