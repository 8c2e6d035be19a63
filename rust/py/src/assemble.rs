//! `Assembler`: a dataset of samples made elsewhere, chunk by chunk.

use std::path::PathBuf;

use numpy::PyReadonlyArray1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use sft_fast_core::assemble::{Assembler as CoreAssembler, Description};

use crate::error::{detached, to_python};

/// See `sft_fast.Dataset.from_arrow`. Whatever was written is removed if `finish` is not called, or fails.
#[pyclass(module = "sft_fast._core")]
pub struct Assembler {
    inner: Option<CoreAssembler>,
}

#[pymethods]
impl Assembler {
    #[new]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        files: Vec<String>,
        sequence_length: u32,
        vocab_size: u32,
        pad_token_id: u32,
        tokenizer: String,
    ) -> PyResult<Self> {
        let description = Description { sequence_length, vocab_size, pad_token_id, tokenizer };
        let inner = detached(py, |call| CoreAssembler::new(&path, files, description, || call(&|_| Ok(()))))?;
        Ok(Self { inner: Some(inner) })
    }

    /// Adds samples that lie end to end: `offsets` [k + 1] are their bounds in `ids` and `mask`, `files` and `lines` [k]
    /// where they come from.
    fn push(
        &mut self,
        py: Python<'_>,
        offsets: PyReadonlyArray1<'_, i64>,
        ids: PyReadonlyArray1<'_, u32>,
        mask: PyReadonlyArray1<'_, bool>,
        files: PyReadonlyArray1<'_, u32>,
        lines: PyReadonlyArray1<'_, u32>,
    ) -> PyResult<()> {
        let inner = self.inner.as_mut().ok_or_else(closed)?;
        let (offsets, ids, mask) = (offsets.as_slice()?, ids.as_slice()?, mask.as_slice()?);
        let (files, lines) = (files.as_slice()?, lines.as_slice()?);
        let rises = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        let bounds = (offsets.first().copied(), offsets.last().copied());
        let lengths = (files.len() + 1, lines.len() + 1, mask.len());
        if !rises || bounds != (Some(0), Some(ids.len() as i64)) || lengths != (offsets.len(), offsets.len(), ids.len())
        {
            return Err(PyValueError::new_err("expected offsets that rise from 0 to the tokens, and equal lengths"));
        }
        py.detach(|| {
            offsets.windows(2).enumerate().try_for_each(|(number, pair)| {
                let range = pair[0] as usize..pair[1] as usize;
                inner.push(&ids[range.clone()], &mask[range], files[number], lines[number])
            })
        })
        .map_err(|error| to_python(py, &error))
    }

    /// Puts the dataset in its place.
    fn finish(&mut self, py: Python<'_>) -> PyResult<()> {
        let inner = self.inner.take().ok_or_else(closed)?;
        py.detach(|| inner.finish()).map(drop).map_err(|error| to_python(py, &error))
    }

    /// Gives up, if it is not finished.
    fn close(&mut self) {
        self.inner = None;
    }
}

fn closed() -> PyErr {
    PyValueError::new_err("the dataset is finished")
}
