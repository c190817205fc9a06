//! What clients do to the server and to each other: die, freeze, fork, lie, flood. Real processes: `kvmp serve`, and this
//! very test binary again as a client of its own ([`puppet`]).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]

mod aborted;
mod deaths;
mod descriptors;
mod footprint;
mod forked;
mod frozen;
mod full;
mod liars;
mod many;
mod minute;
mod namespaces;
mod puppet;
mod raw;
mod readers;
mod scarce;
mod serve;
#[allow(dead_code, reason = "each test binary uses its share of `support`")]
#[path = "../support/mod.rs"]
mod support;
mod theatre;
