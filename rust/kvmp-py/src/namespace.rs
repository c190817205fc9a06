//! `Namespace`, and the digest of a spec.

use kvmp_core::namespace::NamespaceSpec;
use pyo3::prelude::*;

use crate::errors::{Class, raise};

/// A namespace that a client opened or joined; good for that client only.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct Namespace {
    pub inner: kvmp_client::Namespace,
}

#[pymethods]
impl Namespace {
    /// Number in this segment.
    #[getter]
    fn id(&self) -> u16 {
        self.inner.id()
    }

    /// Digest of the spec, 64 hex digits.
    #[getter]
    fn digest(&self) -> &str {
        self.inner.digest()
    }

    /// Life of the server that this holds for.
    #[getter]
    fn server_epoch(&self) -> u64 {
        self.inner.server_epoch()
    }

    /// The spec as JSON with sorted keys.
    fn spec_json(&self) -> String {
        self.inner.spec().canonical_json()
    }

    /// Bytes of a slot of a group, all parts with their alignment.
    #[pyo3(signature = (group=0))]
    fn slot_bytes(&self, py: Python<'_>, group: u16) -> PyResult<u64> {
        use crate::errors::OrRaise;
        Ok(u64::from(self.inner.slot_layout(group).or_raise(py)?.pages) * kvmp_core::geometry::PAGE)
    }

    fn __repr__(&self) -> String {
        format!("<Namespace {} of {:?}, {}>", self.inner.id(), self.inner.spec().model, &self.inner.digest()[..12])
    }
}

/// A spec, given as `NamespaceSpec` or as its JSON text.
pub fn spec(argument: &Bound<'_, PyAny>) -> PyResult<NamespaceSpec> {
    let json: String = match argument.extract() {
        Ok(json) => json,
        Err(_) => argument.call_method0("to_json")?.extract()?,
    };
    parse(argument.py(), &json)
}

fn parse(py: Python<'_>, json: &str) -> PyResult<NamespaceSpec> {
    NamespaceSpec::from_json(json).map_err(|error| raise(py, Class::Namespace, error.to_string()))
}

/// Digest of a namespace spec in JSON: 64 hex digits.
#[pyfunction]
pub fn namespace_digest(py: Python<'_>, spec_json: &str) -> PyResult<String> {
    Ok(parse(py, spec_json)?.digest().iter().map(|byte| format!("{byte:02x}")).collect())
}
