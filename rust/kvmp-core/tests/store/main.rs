//! The block store at its boundary.

mod fixture;
mod replay;
mod rules;
