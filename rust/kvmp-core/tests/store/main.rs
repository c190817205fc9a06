//! The block store at its boundary.

mod fixture;
mod rules;
