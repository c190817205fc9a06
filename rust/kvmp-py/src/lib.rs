//! `kvmp._kvmp`: converts and delegates. One file a Python class or verb.
//!
//! The GIL is kept around calls that only publish or harvest, and released round what can wait and round copies over
//! 64 KiB: getting it back beside a busy thread costs the 5 ms switch interval.

mod arguments;
mod bell;
mod blocks;
mod budget;
mod client;
mod commit;
mod core;
mod cuda;
mod errors;
mod layout;
mod lookup;
mod machine;
mod namespace;
mod numbers;
mod program;
mod reserve;
mod stats;
mod transfer;
mod wait;

use pyo3::prelude::*;

/// Rust side of kvmp; use the typed modules `kvmp.client`, `kvmp.core`, `kvmp.errors`.
#[pymodule(gil_used = true)]
mod _kvmp {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::bell::Bell;
    #[pymodule_export]
    use super::budget::limit_waits;
    #[pymodule_export]
    use super::client::Client;
    #[pymodule_export]
    use super::core::index::{BlockIndex, IndexGrant, IndexHit};
    #[pymodule_export]
    use super::core::policy::{Policy, policies};
    #[pymodule_export]
    use super::core::ring::Ring;
    #[pymodule_export]
    use super::cuda::CudaLanes;
    #[pymodule_export]
    use super::layout::BlockLayout;
    #[pymodule_export]
    use super::lookup::{PendingLookup, ReadLease};
    #[pymodule_export]
    use super::machine::{default_socket, kept_arena_bytes, lies_in_memory, memory_bounds};
    #[pymodule_export]
    use super::namespace::{Namespace, namespace_digest};
    #[pymodule_export]
    use super::program::main;
    #[pymodule_export]
    use super::reserve::{PendingReserve, WriteLease};
    #[pymodule_export]
    use super::transfer::Transfer;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::errors::add_to(module)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
