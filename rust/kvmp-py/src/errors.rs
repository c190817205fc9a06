//! The one tree of Python exceptions, and the one place that turns a client's error into one of them.

use kvmp_client::ClientError;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

/// A class of the tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    Kvmp,
    Connect,
    ServerLost,
    BoundExceeded,
    Busy,
    Protocol,
    Namespace,
    Lease,
    Segment,
    InvalidInput,
    NoServer,
    Unreachable,
    Device,
}

/// Name and docstring of each class, in the order of [`Class`].
const CLASSES: [(&str, &str); 13] = [
    ("KvmpError", "Base of everything that kvmp raises."),
    ("ConnectError", "No server, or it refused (uid, version, engine), or the hello went wrong."),
    ("ServerLost", "The session ended, or is marked lost until a ping is answered; nothing was asked for."),
    ("BoundExceeded", "A call passed its bound, which marks the session lost until a ping is answered."),
    ("Busy", "No room for one more request now: nothing was asked and nothing is lost; ask again later."),
    ("ProtocolError", "The other side sent what the protocol does not allow."),
    ("NamespaceError", "A namespace spec, digest or part layout was refused, or no more namespaces fit."),
    ("LeaseError", "An unknown or ended lease, another's part, or a lease of another life of the server."),
    ("SegmentError", "The server's memory cannot be mapped, or is not what it says."),
    ("InvalidInput", "A bad argument (shape, dtype, range); the message names it. Also a ValueError."),
    ("NoServer", "Nobody listens at the endpoint: the socket does not exist, or it or the port refuses."),
    (
        "Unreachable",
        "Whether anybody listens there cannot be told: rights, an unknown host, a socket of another container.",
    ),
    ("DeviceError", "A GPU or its driver is missing or refused; a copy under way then has moved garbage."),
];

static TREE: PyOnceLock<Vec<Py<PyType>>> = PyOnceLock::new();

fn tree(py: Python<'_>) -> PyResult<&Vec<Py<PyType>>> {
    TREE.get_or_try_init(py, || make_tree(py))
}

fn make_tree(py: Python<'_>) -> PyResult<Vec<Py<PyType>>> {
    let runtime = PyTuple::new(py, [py.get_type::<PyRuntimeError>()])?;
    let base = make_class(py, CLASSES[Class::Kvmp as usize], &runtime)?;
    let only = PyTuple::new(py, [&base])?;
    let value_too = PyTuple::new(py, [base.clone(), py.get_type::<PyValueError>()])?;
    let mut tree = vec![base.unbind()];
    for &class in &CLASSES[1..] {
        let bases = if class == CLASSES[Class::InvalidInput as usize] {
            &value_too
        } else if [Class::NoServer, Class::Unreachable].iter().any(|&of| class == CLASSES[of as usize]) {
            &PyTuple::new(py, [&tree[Class::Connect as usize]])?
        } else {
            &only
        };
        tree.push(make_class(py, class, bases)?.unbind());
    }
    Ok(tree)
}

fn make_class<'py>(
    py: Python<'py>,
    (name, doc): (&str, &str),
    bases: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyType>> {
    let members = PyDict::new(py);
    members.set_item("__doc__", doc)?;
    members.set_item("__module__", "kvmp.errors")?;
    Ok(py.get_type::<PyType>().call1((name, bases, members))?.cast_into()?)
}

/// Puts the classes into the module.
pub fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    for ((name, _), class) in CLASSES.iter().zip(tree(module.py())?) {
        module.add(*name, class)?;
    }
    Ok(())
}

/// An exception of a class of the tree.
pub fn raise(py: Python<'_>, class: Class, message: impl Into<String>) -> PyErr {
    match tree(py) {
        Ok(tree) => PyErr::from_type(tree[class as usize].bind(py).clone(), message.into()),
        Err(error) => error,
    }
}

/// A bad argument, named.
pub fn invalid(py: Python<'_>, name: &str, why: impl std::fmt::Display) -> PyErr {
    raise(py, Class::InvalidInput, format!("{name}: {why}"))
}

/// The class of a client's error.
fn class_of(error: &ClientError) -> Class {
    match error {
        ClientError::NoServer { .. } => Class::NoServer,
        ClientError::Unreachable { .. } | ClientError::SocketElsewhere { .. } => Class::Unreachable,
        ClientError::PeerUid { .. } | ClientError::Hello { .. } | ClientError::Refused { .. } => Class::Connect,
        ClientError::Lost(_) => Class::ServerLost,
        ClientError::BoundExceeded { .. } => Class::BoundExceeded,
        ClientError::Busy { .. } => Class::Busy,
        ClientError::Protocol(_) => Class::Protocol,
        ClientError::Namespace(_) => Class::Namespace,
        ClientError::Lease { .. } | ClientError::Epoch { .. } => Class::Lease,
        ClientError::Attach(_) | ClientError::Segment(_) => Class::Segment,
        ClientError::Endpoint { .. } | ClientError::Input { .. } | ClientError::Copy(_) => Class::InvalidInput,
        ClientError::Forked { .. } | ClientError::Interrupted => Class::Kvmp,
    }
}

/// The exception for a client's error.
pub fn from_client(py: Python<'_>, error: &ClientError) -> PyErr {
    raise(py, class_of(error), error.to_string())
}

/// `Result::map_err` towards Python.
pub trait OrRaise<T> {
    /// The value, or the exception.
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for Result<T, ClientError> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| from_client(py, &error))
    }
}
