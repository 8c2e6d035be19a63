//! Python module `sft_fast._core`: registers what the other files define, nothing else.
use pyo3::prelude::*;

#[pymodule]
fn _core(_module: &Bound<'_, PyModule>) -> PyResult<()> {
    Ok(())
}
