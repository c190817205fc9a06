//! kvmp client

pub mod copy;
