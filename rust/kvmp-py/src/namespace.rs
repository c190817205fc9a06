//! `Namespace`, and the digest of a spec.

use kvmp_client::ListedNamespace;
use kvmp_core::namespace::NamespaceSpec;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::client::Client;
use crate::errors::{Class, OrRaise, raise};
use crate::numbers::{integer, name};

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
    fn slot_bytes(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::Group, _>)] group: u16,
    ) -> PyResult<u64> {
        Ok(u64::from(self.inner.slot_layout(group).or_raise(py)?.pages) * kvmp_core::geometry::PAGE)
    }

    fn __repr__(&self) -> String {
        format!("<Namespace {} of {:?}, {}>", self.inner.id(), self.inner.spec().model, &self.inner.digest()[..12])
    }
}

#[pymethods]
impl Client {
    /// The namespaces that the segment has, whoever opened them: a list of dicts with "id" (int), "digest" (64 hex
    /// digits) and "spec" (dict), by id. A look into shared memory, never a wait, also when the session is lost.
    fn namespaces<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let listed = py.detach(|| self.inner.namespaces()).or_raise(py)?;
        let loads = py.import("json")?.getattr("loads")?;
        let entry = |one: ListedNamespace| {
            let dict = PyDict::new(py);
            dict.set_item("id", one.id)?;
            dict.set_item("digest", one.digest)?;
            dict.set_item("spec", loads.call1((one.spec,))?)?;
            Ok(dict)
        };
        listed.into_iter().map(entry).collect()
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
