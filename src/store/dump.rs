//! Everything stored, for people: one line per row, used by tests and when something has to be looked at.
