//! `Client`: connect, namespaces, ping, close. The other verbs have files of their own.

use std::path::PathBuf;

use kvmp_client::ConnectOptions;
use kvmp_core::wire::Role;
use pyo3::prelude::*;

use crate::errors::{OrRaise, invalid};
use crate::namespace::{Namespace, spec};
use crate::numbers::{float, integer, integers, name, optional};
use crate::wait::bounded;

/// A connection to a kvmp server. Threads may share it; a forked child may not use it.
#[pyclass(frozen, module = "kvmp._kvmp")]
pub struct Client {
    pub inner: kvmp_client::Client,
}

fn role_of(py: Python<'_>, role: &str) -> PyResult<Role> {
    match role {
        "scheduler" => Ok(Role::Scheduler),
        "worker" => Ok(Role::Worker),
        "reader" => Ok(Role::Reader),
        "tool" => Ok(Role::Tool),
        other => {
            Err(invalid(py, "role", format!("{other:?} is none of \"scheduler\", \"worker\", \"reader\", \"tool\"")))
        }
    }
}

#[pymethods]
impl Client {
    /// Connects to a server and returns the client.
    ///
    /// A scheduler is given a fresh engine token; a worker gives its scheduler's and the index of the part it writes, a
    /// reader that of a part which it only loads.
    /// `socket_dir` is the folder of the server's socket as mapped here (containers). `dma` says that copies may land
    /// after this process is gone. Servers of this uid and root are accepted, and of `allow_uids`. `reuse` is an earlier
    /// client, closed or not: where the segment is the same inode, its mapping of the arena is kept and not made anew.
    #[staticmethod]
    #[pyo3(signature = (endpoint="tcp://localhost:5555", *, role="scheduler", engine_token=None, part=None,
                        socket_dir=None, timeout_ms=1000.0, dma=false, allow_uids=Vec::new(), reuse=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    fn connect(
        py: Python<'_>,
        endpoint: &str,
        role: &str,
        #[pyo3(from_py_with = optional::<name::EngineToken, _>)] engine_token: Option<u64>,
        #[pyo3(from_py_with = optional::<name::Part, _>)] part: Option<u16>,
        socket_dir: Option<PathBuf>,
        #[pyo3(from_py_with = float::<name::TimeoutMs>)] timeout_ms: f64,
        dma: bool,
        #[pyo3(from_py_with = integers::<name::AllowUids, _>)] allow_uids: Vec<u32>,
        reuse: Option<&Self>,
    ) -> PyResult<Self> {
        let role = role_of(py, role)?;
        let keep = reuse.and_then(|client| client.inner.keep_arena());
        let options = ConnectOptions { role, engine_token, part, dma, socket_dir, allow_uids, keep };
        let inner = bounded(py, timeout_ms, |bound| kvmp_client::Client::connect(endpoint, &options, bound))?;
        if matches!(role, Role::Worker | Role::Reader) {
            inner.prefault().or_raise(py)?;
        }
        Ok(Self { inner })
    }

    /// `unix:PATH` of the socket in use.
    #[getter]
    fn endpoint(&self) -> &str {
        self.inner.endpoint()
    }

    /// The engine's token (u64); 0 for a tool.
    #[getter]
    fn engine_token(&self) -> u64 {
        self.inner.engine_token()
    }

    /// Index of the part that this client writes, or loads only.
    #[getter]
    fn part(&self) -> Option<u16> {
        self.inner.part()
    }

    /// One life of a server (u64).
    #[getter]
    fn server_epoch(&self) -> u64 {
        self.inner.server_epoch()
    }

    /// Version of the server's package.
    #[getter]
    fn server_version(&self) -> &str {
        self.inner.server_version()
    }

    /// Names of optional features of the protocol that server and client both know.
    #[getter]
    fn features(&self) -> Vec<String> {
        self.inner.features().to_vec()
    }

    /// Identity of the segment's inode, hex; equal after a warm restart.
    #[getter]
    fn segment_id(&self) -> &str {
        self.inner.segment_id()
    }

    /// Whether a hang-up or a missed bound has been seen. A look, never a wait.
    #[getter]
    fn lost(&self) -> bool {
        self.inner.lost().is_some()
    }

    /// Why the session is lost, if it is.
    #[getter]
    fn lost_reason(&self) -> Option<String> {
        self.inner.lost().map(|why| why.to_string())
    }

    /// Microseconds that this client's calls have waited, all together.
    #[getter]
    fn waited_us(&self) -> u64 {
        self.inner.waited_us()
    }

    /// Requests that are not answered and taken, those given up included.
    #[getter]
    fn open_requests(&self, py: Python<'_>) -> PyResult<usize> {
        self.inner.open_requests().or_raise(py)
    }

    /// Seconds of a round trip; an answer clears `lost` as long as the session lives.
    #[pyo3(signature = (timeout_ms=100.0))]
    fn ping(&self, py: Python<'_>, #[pyo3(from_py_with = float::<name::TimeoutMs>)] timeout_ms: f64) -> PyResult<f64> {
        bounded(py, timeout_ms, |bound| self.inner.ping(bound)).map(|took| took.as_secs_f64())
    }

    /// Opens a namespace from its spec (a `NamespaceSpec`, or its JSON).
    #[pyo3(signature = (spec, timeout_ms=1000.0))]
    fn open(
        &self,
        py: Python<'_>,
        spec: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = float::<name::TimeoutMs>)] timeout_ms: f64,
    ) -> PyResult<Namespace> {
        let spec = self::spec(spec)?;
        let inner = bounded(py, timeout_ms, |bound| self.inner.open(&spec, bound))?;
        Ok(Namespace { inner })
    }

    /// Joins a namespace that the scheduler opened; refused unless it has this digest and this part's layout.
    #[pyo3(signature = (namespace_id, digest, layout_json, timeout_ms=1000.0))]
    fn join(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = integer::<name::NamespaceId, _>)] namespace_id: u16,
        digest: &str,
        layout_json: &str,
        #[pyo3(from_py_with = float::<name::TimeoutMs>)] timeout_ms: f64,
    ) -> PyResult<Namespace> {
        let layout = serde_json::from_str(layout_json).map_err(|e| invalid(py, "layout_json", e))?;
        let inner = bounded(py, timeout_ms, |bound| self.inner.join(namespace_id, digest, &layout, bound))?;
        Ok(Namespace { inner })
    }

    /// Hangs up; again is harmless. Requests under way fail, leases end.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) {
        self.close(py);
    }

    fn __repr__(&self) -> String {
        format!("<Client of {}>", self.inner.endpoint())
    }
}
