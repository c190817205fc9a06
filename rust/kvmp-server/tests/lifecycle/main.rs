//! What happens to a server and its file: the real binary is stopped, killed, taken over from, starved and damaged.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]
#![allow(dead_code, reason = "each test binary uses its share of `support`")]

#[path = "../support/mod.rs"]
mod support;

mod attached;
mod clock;
mod damage;
mod file;
mod image;
mod load;
#[path = "../clients/raw.rs"]
mod raw;
mod restarts;
mod room;
mod served;
mod severed;
mod stopped;
mod strangers;
mod taken;
mod unread;
mod upgrade;
mod waits;
