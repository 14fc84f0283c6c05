//! What is committed below `src/generated` is what comes of `proto/`. Needs `protoc`, which `make setup` installs.

use std::fs;
use std::path::Path;

/// Writes the files anew instead of comparing them.
const UPDATE: &str = "UPDATE_PROTO";

#[test]
fn what_is_committed_comes_of_the_contracts() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto = root.join("../../proto");
    let made = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        // Payloads travel as reference-counted bytes: a batch is decoded without copying each payload.
        .bytes(".")
        .client_mod_attribute(".", "#[cfg(feature = \"grpc\")]")
        .server_mod_attribute(".", "#[cfg(feature = \"grpc\")]")
        .emit_rerun_if_changed(false)
        .out_dir(made.path())
        .compile_protos(&["callback.proto", "client.proto", "peer.proto"].map(|name| proto.join(name)), &[proto])
        .expect("protoc is installed, and the contracts are right");
    let mut names = Vec::new();
    for file in fs::read_dir(made.path()).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        let committed = root.join("src/generated").join(&name);
        let comes = fs::read_to_string(made.path().join(&name)).unwrap();
        if std::env::var_os(UPDATE).is_some() {
            fs::write(&committed, comes).unwrap();
        } else {
            let stands = fs::read_to_string(&committed).unwrap_or_default();
            assert!(
                stands == comes,
                "src/generated/{name} is not what comes of proto/: {UPDATE}=1 cargo test -p boomerang-wire"
            );
        }
        names.push(name);
    }
    names.sort();
    assert_eq!(names, ["boomerang.peer.rs", "boomerang.rs"]);
}
