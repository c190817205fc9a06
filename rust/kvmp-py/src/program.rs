//! `main`: the `kvmp` program, inside the wheel.

use pyo3::prelude::*;

/// Runs the `kvmp` program with these arguments (the first is its name) and returns its exit code.
#[pyfunction]
pub fn main(py: Python<'_>, argv: Vec<String>) -> i32 {
    py.detach(|| kvmp_server::cli::main(argv))
}
