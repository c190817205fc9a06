//! The block store at its boundary.

mod fixture;
mod logged;
mod model;
mod property;
mod replay;
mod rules;
