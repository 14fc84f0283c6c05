//! What a stranger sends to the TCP port. The property is stated where it is checked, in `wire::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    boomerang_wire::fuzz::frames(data);
});
