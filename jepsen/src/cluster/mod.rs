//! Nodes and etcd as processes, each in a network of its own.
