//! `sft_fast_core::Error` → the exception classes of `sft_fast.errors`, and errors of Python callbacks back out.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use sft_fast_core::{Error, ErrorClass, ErrorKind};

/// The Python exception of `error`.
pub fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    raise(py, error).unwrap_or_else(|problem| problem)
}

fn raise(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let class = match error.kind().class() {
        ErrorClass::Input => "InputError",
        ErrorClass::Template => "TemplateError",
        ErrorClass::Tokenizer => "TokenizerError",
        ErrorClass::Argument => "ConfigError",
        ErrorClass::Dataset => "DatasetError",
        ErrorClass::File => "FileError",
        ErrorClass::Interrupted => return Ok(pyo3::exceptions::PyKeyboardInterrupt::new_err(())),
    };
    let details = PyDict::new(py);
    details.set_item("code", error.kind().code())?;
    details.set_item("path", error.path().map(|path| path.display().to_string()))?;
    details.set_item("line", error.position().map(|position| position.line))?;
    details.set_item("column", error.position().map(|position| position.column))?;
    details.set_item("location", error.location())?;
    details.set_item("hint", error.hint())?;
    let exception = py.import("sft_fast.errors")?.getattr(class)?.call((error.message(),), Some(&details))?;
    Ok(PyErr::from_value(exception))
}

/// Runs `work` without the GIL. `work` gets a function that runs a Python callback with it, and checks for signals; if the
/// callback raises, `work` is told to stop and the exception is raised from here.
pub fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(
        &mut dyn FnMut(&dyn Fn(Python<'_>) -> PyResult<()>) -> sft_fast_core::Result<()>,
    ) -> sft_fast_core::Result<T>
    + Send,
) -> PyResult<T> {
    let mut raised = None;
    let result = py.detach(|| {
        work(&mut |callback| {
            Python::attach(|py| py.check_signals().and_then(|()| callback(py))).map_err(|error| {
                raised = Some(error);
                Error::new(ErrorKind::Interrupted, "stopped by the caller")
            })
        })
    });
    result.map_err(|error| raised.unwrap_or_else(|| to_python(py, &error)))
}
