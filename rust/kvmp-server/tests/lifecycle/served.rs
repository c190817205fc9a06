//! The servers of these tests.

pub use crate::support::house::{House, NAME};
pub use crate::support::served::Served;
