//! Compiles `proto/` into Rust. Needs `protoc`, which `make setup` installs.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tonic_prost_build::configure()
        // Payloads travel as reference-counted bytes: a batch is decoded without copying each payload.
        .bytes(".")
        .compile_protos(&["proto/callback.proto", "proto/client.proto", "proto/peer.proto"], &["proto"])?;
    Ok(())
}
