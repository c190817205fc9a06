//! The block store at its boundary.
#![expect(clippy::unwrap_used, reason = "a test's fixtures panic where a test may")]

mod crash;
mod fixture;
mod logged;
mod model;
mod property;
mod recovery;
mod replay;
mod rules;
