#![no_main]

use kvmp_server::fuzz::Door;
use libfuzzer_sys::fuzz_target;

thread_local! {
    static DOOR: Door = Door::new();
}

fuzz_target!(|data: &[u8]| {
    DOOR.with(|door| drop(kvmp_server::fuzz::handshake(door, data)));
});
