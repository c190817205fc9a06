//! numpy arrays as slices; what does not fit is refused with the argument's name.

use numpy::{Element, PyArray1, PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::errors::invalid;

/// Hashes `(n, 32)` of uint8.
pub fn hashes(argument: &Bound<'_, PyAny>) -> PyResult<Vec<[u8; 32]>> {
    let what = "an array of shape (n, 32) and dtype uint8 is needed";
    let flat = flat::<u8>(argument, "hashes", what, |shape| matches!(shape, [_, 32]))?;
    Ok(flat.as_chunks::<32>().0.to_vec())
}

/// The hash before the first one: 32 bytes.
pub fn parent(py: Python<'_>, argument: Option<&[u8]>) -> PyResult<Option<[u8; 32]>> {
    let wrong = |bytes: &[u8]| invalid(py, "parent", format!("32 bytes are needed, got {}", bytes.len()));
    argument.map(|bytes| bytes.try_into().map_err(|_| wrong(bytes))).transpose()
}

/// A list of numbers `(n,)` of the element's dtype.
pub fn list<T: Element + Copy>(argument: &Bound<'_, PyAny>, name: &str) -> PyResult<Vec<T>> {
    let dtype = T::get_dtype(argument.py()).to_string();
    flat(argument, name, &format!("an array of shape (n,) and dtype {dtype} is needed"), |shape| shape.len() == 1)
}

/// An array's elements in C order.
pub fn flat<T: Element + Copy>(
    argument: &Bound<'_, PyAny>,
    name: &str,
    what: &str,
    fits: impl Fn(&[usize]) -> bool,
) -> PyResult<Vec<T>> {
    let wrong = || invalid(argument.py(), name, format!("{what}, got {}", describe(argument)));
    let array = argument.cast::<PyArrayDyn<T>>().map_err(|_| wrong())?;
    if !fits(array.shape()) {
        return Err(wrong());
    }
    let array = array.try_readonly().map_err(|e| invalid(argument.py(), name, e))?;
    match array.as_slice() {
        Ok(slice) => Ok(slice.to_vec()),
        Err(_) => Ok(array.as_array().iter().copied().collect()),
    }
}

fn describe(argument: &Bound<'_, PyAny>) -> String {
    match argument.cast::<PyUntypedArray>() {
        Ok(array) => format!("shape {:?} and dtype {}", array.shape(), array.dtype()),
        Err(_) => argument.get_type().name().map_or_else(|_| "something else".into(), |name| name.to_string()),
    }
}

/// An array of its own for Python.
pub fn array<'py, T: Element>(py: Python<'py>, values: &[T]) -> Bound<'py, PyArray1<T>> {
    PyArray1::from_slice(py, values)
}
