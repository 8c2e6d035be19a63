//! `Dataset`: a dataset opened for reading.

use std::iter::repeat_n;
use std::path::PathBuf;
use std::sync::Arc;

use numpy::{PyArray1, ToPyArray};
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use sft_fast_core::dataset::Dataset as CoreDataset;
use sft_fast_core::mix::{Share, epoch_samples};
use sft_fast_core::pack::{self, PackError, Packing as CorePacking};
use sft_fast_core::survey::survey;

use crate::error::{detached, to_python};
use crate::packing::{Packing, pack_error};

/// See `sft_fast.Dataset`.
#[pyclass(frozen, module = "sft_fast._core")]
pub struct Dataset {
    inner: Arc<CoreDataset>,
}

#[pymethods]
impl Dataset {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let inner = py.detach(|| CoreDataset::open(&path)).map_err(|error| to_python(py, &error))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    fn __len__(&self) -> usize {
        self.inner.num_samples()
    }

    /// (token ids uint32 [n], label mask bool [n], path of the input file, line) of sample `index`.
    #[expect(clippy::type_complexity, reason = "a tuple for Python")]
    fn sample<'py>(
        &self,
        py: Python<'py>,
        index: usize,
    ) -> PyResult<(Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<bool>>, &str, u32)> {
        if index >= self.__len__() {
            return Err(PyIndexError::new_err(format!("sample {index} of {}", self.__len__())));
        }
        let sample = self.inner.sample(index);
        let (path, line) = self.inner.source(index).map_err(|error| to_python(py, &error))?;
        let mask: Vec<bool> = sample.label_mask().collect();
        Ok((PyArray1::from_vec(py, sample.token_ids.to_vec()), PyArray1::from_vec(py, mask), path, line))
    }

    /// Samples `start..end` end to end: token ids uint32 [n], label mask bool [n], file numbers and lines uint32 [k].
    #[expect(clippy::type_complexity, reason = "a tuple for Python")]
    fn samples<'py>(
        &self,
        py: Python<'py>,
        start: usize,
        end: usize,
    ) -> PyResult<(
        Bound<'py, PyArray1<u32>>,
        Bound<'py, PyArray1<bool>>,
        Bound<'py, PyArray1<u32>>,
        Bound<'py, PyArray1<u32>>,
    )> {
        if start > end || end > self.__len__() {
            return Err(PyIndexError::new_err(format!("samples {start} to {end} of {}", self.__len__())));
        }
        let (ids, mask, files, lines) = py.detach(|| {
            let (mut ids, mut mask, mut records) = (Vec::new(), Vec::new(), Vec::with_capacity(end - start));
            for sample in (start..end).map(|number| self.inner.sample(number)) {
                sample.token_ids.append_to(&mut ids);
                mask.extend(sample.label_mask());
                records.push(sample.record());
            }
            let (files, lines): (Vec<u32>, Vec<u32>) = records.into_iter().unzip();
            (ids, mask, files, lines)
        });
        Ok((
            PyArray1::from_vec(py, ids),
            PyArray1::from_vec(py, mask),
            PyArray1::from_vec(py, files),
            PyArray1::from_vec(py, lines),
        ))
    }

    /// Tokens of each sample, uint32 [num_samples].
    fn lengths<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u32>> {
        self.inner.lengths().to_pyarray(py)
    }

    /// See `sft_fast_core::survey::Survey`: six arrays [num_samples], by the names of its fields.
    fn survey<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let survey = py.detach(|| survey(&self.inner));
        let arrays = PyDict::new(py);
        arrays.set_item("num_label_tokens", PyArray1::from_vec(py, survey.num_label_tokens))?;
        arrays.set_item("num_label_runs", PyArray1::from_vec(py, survey.num_label_runs))?;
        arrays.set_item("ids_hashes", PyArray1::from_vec(py, survey.ids_hashes))?;
        arrays.set_item("mask_hashes", PyArray1::from_vec(py, survey.mask_hashes))?;
        arrays.set_item("files", PyArray1::from_vec(py, survey.files))?;
        arrays.set_item("lines", PyArray1::from_vec(py, survey.lines))?;
        Ok(arrays)
    }

    /// The manifest as JSON.
    fn manifest(&self) -> String {
        serde_json::to_string(self.inner.manifest()).expect("plain data")
    }

    /// Proves the dataset whole; `progress` is called with the bytes of each shard that is.
    fn verify(&self, py: Python<'_>, progress: Option<Py<PyAny>>) -> PyResult<()> {
        detached(py, |call| {
            self.inner.verify(|num_bytes| {
                call(&|py| match &progress {
                    Some(progress) => progress.call1(py, (num_bytes,)).map(drop),
                    None => Ok(()),
                })
            })
        })
    }

    /// Number of the file in the manifest that each sample comes from, uint32 [num_samples].
    fn files<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u32>> {
        PyArray1::from_vec(py, py.detach(|| self.inner.file_numbers().collect()))
    }

    /// Rows of samples: packs if `packed`, else one sample a row. `shares` has for each source, which are successive files,
    /// (number of files, weight in millionths, most samples); without them each sample comes once.
    #[pyo3(signature = (sequence_length, seed, epoch, packed, shares=None))]
    fn pack(
        &self,
        py: Python<'_>,
        sequence_length: u32,
        seed: u64,
        epoch: u64,
        packed: bool,
        shares: Option<Vec<(usize, u64, Option<u64>)>>,
    ) -> PyResult<Packing> {
        let num_files = shares.iter().flatten().map(|share| share.0).sum();
        if shares.is_some()
            && let Some(stray) = py.detach(|| self.inner.file_numbers().position(|file| file as usize >= num_files))
        {
            self.inner.source(stray).map_err(|error| to_python(py, &error))?;
            return Err(PyIndexError::new_err(format!("sample {stray} is of none of {num_files} files")));
        }
        let packing = py.detach(|| match &shares {
            None => make(packed, self.inner.lengths(), sequence_length, seed, epoch),
            Some(shares) => self.pack_mix(shares, sequence_length, seed, epoch, packed),
        });
        let packing = packing.map_err(|error| pack_error(py, &error))?;
        Ok(Packing::new(self.inner.clone(), Arc::new(packing), sequence_length, seed, epoch, packed))
    }
}

impl Dataset {
    fn pack_mix(
        &self,
        shares: &[(usize, u64, Option<u64>)],
        sequence_length: u32,
        seed: u64,
        epoch: u64,
        packed: bool,
    ) -> Result<CorePacking, PackError> {
        let source_of_file: Vec<u32> =
            (0..).zip(shares).flat_map(|(number, &(num_files, ..))| repeat_n(number, num_files)).collect();
        let shares: Vec<Share> = shares
            .iter()
            .map(|&(_, weight_millionths, max_samples)| Share { weight_millionths, max_samples })
            .collect();
        let sources = self.inner.file_numbers().map(|file| source_of_file[file as usize]);
        let samples = epoch_samples(sources, &shares, seed, epoch)?;
        let all_lengths = self.inner.lengths();
        let lengths: Vec<u32> = samples.iter().map(|&sample| all_lengths[sample as usize]).collect();
        make(packed, &lengths, sequence_length, seed, epoch)
            .map(|packing| packing.renumbered(&samples))
            .map_err(|error| error.renumbered(&samples))
    }
}

fn make(packed: bool, lengths: &[u32], capacity: u32, seed: u64, epoch: u64) -> Result<CorePacking, PackError> {
    if packed { pack::pack(lengths, capacity, seed, epoch) } else { pack::rows(lengths, capacity, seed, epoch) }
}

/// (samples that are used at all, samples of an epoch, whether all epochs take the same) of a source.
#[pyfunction]
#[pyo3(signature = (num_samples, weight_millionths, max_samples=None))]
pub fn samples_taken(num_samples: u64, weight_millionths: u64, max_samples: Option<u64>) -> (u64, u64, bool) {
    let taken = Share { weight_millionths, max_samples }.of(num_samples);
    (taken.num_kept, taken.num_samples, taken.is_steady())
}
