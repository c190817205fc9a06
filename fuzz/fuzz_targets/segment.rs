#![no_main]

use std::sync::LazyLock;

use kvmp_server::fuzz::Quarry;
use libfuzzer_sys::fuzz_target;

static QUARRY: LazyLock<Quarry> = LazyLock::new(Quarry::new);

fuzz_target!(|data: &[u8]| {
    let _ = kvmp_server::fuzz::segment(&QUARRY, data);
});
