//! The simulation: several nodes in one process and one thread.
