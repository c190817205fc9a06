//! Numbers as arguments. One that its type cannot hold is refused with the argument's name, its value and what may be.
//!
//! PyO3 names the argument in a `TypeError` only, so each number is taken with the name as a type:
//! `#[pyo3(from_py_with = integer::<name::Group, _>)] group: u16`.

use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;

use crate::errors::invalid;

/// The name of an argument, as a type.
pub trait Name {
    /// As Python has it.
    const NAME: &'static str;
}

/// The names there are.
pub mod name {
    use super::Name;

    macro_rules! names {
        ($($name:ident = $text:literal),* $(,)?) => {
            $(
                pub struct $name;

                impl Name for $name {
                    const NAME: &'static str = $text;
                }
            )*
        };
    }

    names! {
        After = "after",
        AllowUids = "allow_uids",
        ArenaBytes = "arena_bytes",
        Chunk = "chunk",
        ChunkBytes = "chunk_bytes",
        Device = "device",
        Engine = "engine",
        EngineToken = "engine_token",
        Fd = "fd",
        FirstBlock = "first_block",
        Group = "group",
        Heir = "heir",
        LeaseId = "lease_id",
        Length = "length",
        NamespaceId = "namespace_id",
        NowS = "now_s",
        NumBlocks = "num_blocks",
        Offset = "offset",
        MomentUs = "moment_us",
        Part = "part",
        ReadTtlS = "read_ttl_s",
        ServerEpoch = "server_epoch",
        Slot = "slot",
        Slots = "slots",
        Threads = "threads",
        TimeoutMs = "timeout_ms",
        Width = "width",
    }
}

/// A type of whole numbers.
pub trait Integer: Sized {
    /// The least and the greatest, for a person.
    const RANGE: (i128, i128);

    /// As PyO3 converts it.
    fn convert(argument: &Bound<'_, PyAny>) -> PyResult<Self>;
}

macro_rules! integers {
    ($($type:ty),*) => {
        $(
            impl Integer for $type {
                const RANGE: (i128, i128) = (<$type>::MIN as i128, <$type>::MAX as i128);

                fn convert(argument: &Bound<'_, PyAny>) -> PyResult<Self> {
                    argument.extract()
                }
            }
        )*
    };
}

integers!(i32, u16, u32, u64, usize);

/// An error of range with the argument's name and value; any other as it is.
fn named<N: Name>(argument: &Bound<'_, PyAny>, error: PyErr, allowed: &str) -> PyErr {
    let py = argument.py();
    if error.is_instance_of::<PyOverflowError>(py) {
        return invalid(py, N::NAME, format!("{argument} is out of range; {allowed}"));
    }
    error
}

/// A whole number.
pub fn integer<N: Name, T: Integer>(argument: &Bound<'_, PyAny>) -> PyResult<T> {
    let (least, most) = T::RANGE;
    T::convert(argument).map_err(|error| named::<N>(argument, error, &format!("{least} to {most} is allowed")))
}

/// A whole number or None.
pub fn optional<N: Name, T: Integer>(argument: &Bound<'_, PyAny>) -> PyResult<Option<T>> {
    if argument.is_none() { Ok(None) } else { integer::<N, T>(argument).map(Some) }
}

/// Whole numbers, any number of them.
pub fn integers<N: Name, T: Integer>(argument: &Bound<'_, PyAny>) -> PyResult<Vec<T>> {
    argument.try_iter()?.map(|item| integer::<N, T>(&item?)).collect()
}

/// A number with a fraction; whole ones may be too large for it.
pub fn float<N: Name>(argument: &Bound<'_, PyAny>) -> PyResult<f64> {
    let allowed = "a number that a float can hold is needed";
    argument.extract().map_err(|error| named::<N>(argument, error, allowed))
}
