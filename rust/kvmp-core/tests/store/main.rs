//! The block store at its boundary.

mod fixture;
mod logged;
mod model;
mod property;
mod recovery;
mod replay;
mod rules;
