//! Room on the disk.
