//! `Packing`: the rows of an epoch and the batches they make; `Steps`: the order in which they are trained on.

use std::num::NonZero;
use std::sync::Arc;

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray2, PyUntypedArrayMethods};
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use sft_fast_core::batch::{Arrays, Segments, fill};
use sft_fast_core::dataset::Dataset;
use sft_fast_core::pack::{PackError, Packing as CorePacking, pack};
use sft_fast_core::plan::{self, CostModel, StepPlanner, assign, imbalance, row_cost};
use sft_fast_core::{Error, ErrorKind};

use crate::error::to_python;

/// The Python exception for lengths that can't be packed.
pub fn pack_error(py: Python<'_>, error: &PackError) -> PyErr {
    let hint = "preprocess with this sequence_length, or train with that of the dataset";
    to_python(py, &Error::new(ErrorKind::Argument, error.to_string()).with_hint(hint))
}

/// See `sft_fast.Packing`.
#[pyclass(frozen, module = "sft_fast._core")]
pub struct Packing {
    dataset: Arc<Dataset>,
    inner: Arc<CorePacking>,
    sequence_length: u32,
    seed: u64,
    epoch: u64,
    is_packed: bool,
}

type BatchArrays<'py> = (Bound<'py, PyArray2<i64>>, Bound<'py, PyArray2<i64>>, Bound<'py, PyArray2<i64>>);

impl Packing {
    /// Wraps what `Dataset.pack` made.
    pub fn new(
        dataset: Arc<Dataset>,
        inner: Arc<CorePacking>,
        sequence_length: u32,
        seed: u64,
        epoch: u64,
        is_packed: bool,
    ) -> Self {
        Self { dataset, inner, sequence_length, seed, epoch, is_packed }
    }

    fn samples(&self, rows: &[usize]) -> PyResult<Vec<&[u32]>> {
        let num_rows = self.inner.len();
        rows.iter()
            .map(|&row| match row < num_rows {
                true => Ok(self.inner.get(row)),
                false => Err(PyIndexError::new_err(format!("row {row} of {num_rows}"))),
            })
            .collect()
    }

    fn num_tokens(&self, samples: &[u32]) -> usize {
        samples.iter().map(|&sample| self.dataset.lengths()[sample as usize] as usize).sum()
    }

    fn row_costs(&self) -> Vec<u64> {
        let lengths = self.dataset.lengths();
        let cost = |row: &[u32]| row_cost(row.iter().map(|&sample| lengths[sample as usize]), CostModel::REFERENCE);
        self.inner.iter().map(cost).collect()
    }
}

#[pymethods]
impl Packing {
    fn __len__(&self) -> usize {
        self.inner.len()
    }

    /// Sample numbers of row `index`, uint32 [k].
    fn row<'py>(&self, py: Python<'py>, index: usize) -> PyResult<Bound<'py, PyArray1<u32>>> {
        Ok(PyArray1::from_slice(py, self.samples(&[index])?[0]))
    }

    /// The part of all positions that holds a token: of rows of `sequence_length`, 0 to 1.
    #[getter]
    fn fill_ratio(&self) -> f64 {
        self.inner.fill_ratio(self.sequence_length)
    }

    #[getter]
    fn sequence_length(&self) -> u32 {
        self.sequence_length
    }

    #[getter]
    fn is_packed(&self) -> bool {
        self.is_packed
    }

    /// Tokens of each row, uint32 [num_rows].
    fn row_lengths<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u32>> {
        let lengths = self.dataset.lengths();
        let num_tokens = |row: &[u32]| row.iter().map(|&sample| lengths[sample as usize]).sum();
        PyArray1::from_vec(py, py.detach(|| self.inner.iter().map(num_tokens).collect()))
    }

    /// Tokens of the longest of `rows`.
    fn max_row_tokens(&self, rows: Vec<usize>) -> PyResult<usize> {
        Ok(self.samples(&rows)?.iter().map(|samples| self.num_tokens(samples)).max().unwrap_or(0))
    }

    /// (tokens, tokens with a loss) of `rows`.
    fn count_tokens(&self, py: Python<'_>, rows: Vec<usize>) -> PyResult<(usize, u64)> {
        let rows = self.samples(&rows)?;
        Ok(py.detach(|| {
            let samples = rows.iter().flat_map(|row| row.iter());
            let num_labels = samples.map(|&sample| self.dataset.sample(sample as usize).num_label_tokens()).sum();
            (rows.iter().map(|row| self.num_tokens(row)).sum(), num_labels)
        }))
    }

    /// New arrays int64 [len(rows), width] of input ids, labels and position ids, then `cu_seqlens` int32 and `max_seqlen`.
    fn batch<'py>(
        &self,
        py: Python<'py>,
        rows: Vec<usize>,
        width: usize,
        shift_labels: bool,
    ) -> PyResult<(BatchArrays<'py>, Bound<'py, PyArray1<i32>>, i32)> {
        if rows.len().checked_mul(width).is_none_or(|num_tokens| i32::try_from(num_tokens).is_err()) {
            let message = format!("expected less than 2^31 positions, found {} rows of {width}", rows.len());
            return Err(PyValueError::new_err(message));
        }
        let new = || PyArray2::zeros(py, [rows.len(), width], false);
        let arrays: BatchArrays<'py> = (new(), new(), new());
        let (ids, labels, positions) = (arrays.0.readwrite(), arrays.1.readwrite(), arrays.2.readwrite());
        let (segments, max_seqlen) = self.fill(py, rows, shift_labels, ids, labels, positions)?;
        Ok((arrays, segments, max_seqlen))
    }

    /// As `batch`, with the samples of all rows laid end to end in one row, [1, tokens], without padding.
    fn flat_batch<'py>(
        &self,
        py: Python<'py>,
        rows: Vec<usize>,
        shift_labels: bool,
    ) -> PyResult<(BatchArrays<'py>, Bound<'py, PyArray1<i32>>, i32)> {
        let samples = self.samples(&rows)?.concat();
        let width = self.num_tokens(&samples);
        if i32::try_from(width).is_err() {
            return Err(PyValueError::new_err(format!("expected less than 2^31 tokens, found {width}")));
        }
        let new = || PyArray2::zeros(py, [1, width], false);
        let arrays: BatchArrays<'py> = (new(), new(), new());
        let (mut ids, mut labels, mut positions) = (arrays.0.readwrite(), arrays.1.readwrite(), arrays.2.readwrite());
        let whole = "a new array is contiguous";
        let filled = Arrays {
            input_ids: ids.as_slice_mut().expect(whole),
            labels: labels.as_slice_mut().expect(whole),
            position_ids: positions.as_slice_mut().expect(whole),
        };
        let Segments { cu_seqlens, max_seqlen, .. } =
            py.detach(|| fill(&self.dataset, &[&samples], width, shift_labels, filled));
        drop((ids, labels, positions));
        Ok((arrays, PyArray1::from_vec(py, cu_seqlens), max_seqlen))
    }

    /// Fills the caller's arrays int64 [len(rows), width]; returns `cu_seqlens` int32 and `max_seqlen`.
    fn fill<'py>(
        &self,
        py: Python<'py>,
        rows: Vec<usize>,
        shift_labels: bool,
        mut input_ids: PyReadwriteArray2<'py, i64>,
        mut labels: PyReadwriteArray2<'py, i64>,
        mut position_ids: PyReadwriteArray2<'py, i64>,
    ) -> PyResult<(Bound<'py, PyArray1<i32>>, i32)> {
        let samples = self.samples(&rows)?;
        let shape = input_ids.as_array().dim();
        let shapes = [labels.as_array().dim(), position_ids.as_array().dim()];
        let longest = samples.iter().map(|row| self.num_tokens(row)).max().unwrap_or(0);
        if shape.0 != rows.len()
            || shapes != [shape; 2]
            || shape.1 < longest
            || i32::try_from(shape.0 * shape.1).is_err()
        {
            let expected = format!("expected three arrays of {} rows of at least {longest} tokens", rows.len());
            return Err(PyValueError::new_err(format!("{expected}, found shapes {shape:?} and {shapes:?}")));
        }
        let contiguous = || PyValueError::new_err("expected C-contiguous arrays");
        // A slice of a Fortran-ordered array could be had too, and would be filled in the wrong order.
        if ![&input_ids, &labels, &position_ids].iter().all(|array| array.is_c_contiguous()) {
            return Err(contiguous());
        }
        let arrays = Arrays {
            input_ids: input_ids.as_slice_mut().map_err(|_| contiguous())?,
            labels: labels.as_slice_mut().map_err(|_| contiguous())?,
            position_ids: position_ids.as_slice_mut().map_err(|_| contiguous())?,
        };
        let Segments { cu_seqlens, max_seqlen, .. } =
            py.detach(|| fill(&self.dataset, &samples, shape.1, shift_labels, arrays));
        Ok((PyArray1::from_vec(py, cu_seqlens), max_seqlen))
    }

    /// The order in which the rows are trained on, `num_rows_per_step` in a step.
    fn steps(&self, py: Python<'_>, num_rows_per_step: NonZero<usize>) -> Steps {
        py.detach(|| {
            let costs = self.row_costs();
            let planner = StepPlanner::new(&costs, num_rows_per_step, self.seed, self.epoch);
            Steps { costs, planner }
        })
    }
}

/// See `sft_fast.stream.StepStream`: the steps of one epoch.
#[pyclass(frozen, module = "sft_fast._core")]
pub struct Steps {
    costs: Vec<u64>,
    planner: StepPlanner,
}

#[pymethods]
impl Steps {
    fn __len__(&self) -> usize {
        self.planner.num_steps()
    }

    /// Row numbers of step `index`, in no particular order.
    fn rows(&self, index: usize) -> PyResult<Vec<u32>> {
        if index >= self.__len__() {
            return Err(PyIndexError::new_err(format!("step {index} of {}", self.__len__())));
        }
        Ok(self.planner.step(index).to_vec())
    }

    /// Row numbers of each micro-batch of `rank` in step `index`; every rank has the same number of micro-batches.
    fn assign(
        &self,
        index: usize,
        rank: usize,
        world_size: NonZero<usize>,
        rows_per_micro_batch: NonZero<usize>,
    ) -> PyResult<Vec<Vec<u32>>> {
        let rows = self.rows(index)?;
        if rank >= world_size.get() {
            return Err(PyIndexError::new_err(format!("rank {rank} of {world_size}")));
        }
        Ok(assign(&rows, &self.costs, world_size, rows_per_micro_batch).swap_remove(rank))
    }

    /// How much longer than the mean rank the slowest one takes, mean over steps: (in order, as planned).
    fn imbalance(&self, py: Python<'_>, world_size: NonZero<usize>) -> (f64, f64) {
        let result = py.detach(|| imbalance(&self.planner, &self.costs, world_size));
        (result.before, result.after)
    }
}

/// The plan of an epoch from lengths alone: (offsets of the packs uint32 [num_packs + 1], sample numbers uint32
/// [num_samples], steps). It is the plan of a dataset with samples of these lengths.
#[pyfunction]
#[expect(clippy::type_complexity, reason = "a tuple for Python")]
pub fn plan_lengths<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, u32>,
    sequence_length: u32,
    seed: u64,
    epoch: u64,
    num_rows_per_step: NonZero<usize>,
) -> PyResult<(Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<u32>>, Steps)> {
    let lengths = lengths.as_slice().map_err(|_| PyValueError::new_err("expected a C-contiguous array"))?;
    let made = py.detach(|| {
        let packing = pack(lengths, sequence_length, seed, epoch)?;
        let cost = |row: &[u32]| row_cost(row.iter().map(|&sample| lengths[sample as usize]), CostModel::REFERENCE);
        let costs: Vec<u64> = packing.iter().map(cost).collect();
        let planner = StepPlanner::new(&costs, num_rows_per_step, seed, epoch);
        Ok((packing.into_parts(), Steps { costs, planner }))
    });
    let ((offsets, samples), steps) = made.map_err(|error| pack_error(py, &error))?;
    Ok((PyArray1::from_vec(py, offsets), PyArray1::from_vec(py, samples), steps))
}

/// Steps of a run: `max_steps` if given, else `num_epochs` epochs, a part of a step counting as one.
#[pyfunction]
#[pyo3(signature = (num_steps_per_epoch, num_epochs, max_steps=None))]
pub fn total_steps(num_steps_per_epoch: u64, num_epochs: f64, max_steps: Option<u64>) -> u64 {
    plan::total_steps(num_steps_per_epoch, num_epochs, max_steps)
}
