//! Clients and receivers that write the history.
