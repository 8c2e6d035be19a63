//! `preprocess`: one call that makes a dataset; `TaskRunner`: what other processes do for it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use sft_fast_core::conversation::{FieldMapping, Shape};
use sft_fast_core::manifest::{MANIFEST_NAME, Manifest, Source};
use sft_fast_core::model::Model;
use sft_fast_core::preprocess::{self as core, Duplicates, Executor, OnError, Options, Place, Polled, Setup};
use sft_fast_core::sample::TooLong;

use crate::error::{detached, to_python};
use crate::policies::{self, unknown};

/// How far preprocessing is: see `sft_fast.Progress`.
#[pyclass(frozen, get_all, module = "sft_fast._core")]
pub struct Progress {
    is_hashing: bool,
    num_bytes: u64,
    num_total_bytes: u64,
    num_records: u64,
    num_rejected: u64,
    num_tokens: u64,
    /// Records read, by the name of their shape.
    records_by_shape: BTreeMap<String, u64>,
}

/// `elsewhere` is called with the fingerprint, and returns the manifest of that dataset as JSON if there is no need to make it.
///
/// Makes a dataset and returns (path, manifest as JSON, whether it was there already, samples taken from an older one,
/// seconds, why the reference
/// tokenizer was taken).
#[pyfunction]
#[pyo3(signature = (files, output_dir, *, in_cache, tokenizer, template, sequence_length, system_key, prompt_key,
    query_key, response_key, history_key, text_key, record_shape, template_date, num_threads, on_error,
    too_long, duplicates, policies, overwrite, progress, file_names=None, sources=None, elsewhere=None, chunk_bytes=None,
    max_shard_tokens=None, executor=None, part_bytes=None))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
pub fn preprocess(
    py: Python<'_>,
    files: Vec<PathBuf>,
    output_dir: PathBuf,
    in_cache: bool,
    tokenizer: PathBuf,
    template: String,
    sequence_length: u32,
    system_key: Option<String>,
    prompt_key: String,
    query_key: Option<String>,
    response_key: String,
    history_key: Option<String>,
    text_key: String,
    record_shape: &str,
    template_date: Option<String>,
    num_threads: Option<NonZero<usize>>,
    on_error: &str,
    too_long: &str,
    duplicates: &str,
    policies: &Bound<'_, PyDict>,
    overwrite: bool,
    progress: Option<Py<PyAny>>,
    file_names: Option<Vec<PathBuf>>,
    sources: Option<Vec<(String, u64)>>,
    elsewhere: Option<Py<PyAny>>,
    chunk_bytes: Option<usize>,
    max_shard_tokens: Option<u32>,
    executor: Option<Py<PyAny>>,
    part_bytes: Option<u64>,
) -> PyResult<(PathBuf, String, bool, u64, f64, Option<String>)> {
    let options = Options {
        files,
        file_names,
        sources: sources
            .map(|sources| sources.into_iter().map(|(name, num_files)| Source { name, num_files }).collect()),
        place: match in_cache {
            true => Place::Cache(output_dir),
            false => Place::Directory { path: output_dir, overwrite },
        },
        mapping: FieldMapping { system_key, prompt_key, query_key, response_key, history_key, text_key },
        record_shape: match (record_shape, Shape::named(record_shape)) {
            ("auto", _) => None,
            (_, Some(shape)) => Some(shape),
            (found, None) => {
                let known = "'auto', 'fields', 'messages', 'conversations', 'prompt_completion' or 'text'";
                return Err(unknown(py, "record_shape", known, found));
            }
        },
        sequence_length,
        policies: policies::read(policies)?,
        too_long: TooLong::named(too_long)
            .ok_or_else(|| unknown(py, "too_long", "'reject', 'truncate_turns' or 'truncate'", too_long))?,
        duplicates: Duplicates::named(duplicates)
            .ok_or_else(|| unknown(py, "duplicates", "'keep' or 'drop'", duplicates))?,
        on_error: match on_error {
            "raise" => OnError::Raise,
            "skip" => OnError::Skip,
            found => return Err(unknown(py, "on_error", "'raise' or 'skip'", found)),
        },
        num_threads,
        chunk_bytes,
        part_bytes,
        max_shard_tokens,
    };
    let report = detached(py, |call| {
        let load = || Model::load(&tokenizer, &template, template_date.as_deref());
        let call = &RefCell::new(call);
        let mut executor = executor.map(|object| PythonExecutor { object, call });
        let executor = executor.as_mut().map(|executor| executor as &mut dyn Executor);
        let mut on_progress = |state: &core::Progress| {
            call.borrow_mut()(&|py| {
                let Some(progress) = &progress else { return Ok(()) };
                let state = Progress {
                    is_hashing: state.is_hashing,
                    num_bytes: state.num_bytes,
                    num_total_bytes: state.num_total_bytes,
                    num_records: state.num_records,
                    num_rejected: state.num_rejected,
                    num_tokens: state.num_tokens,
                    records_by_shape: state.shapes.to_map(),
                };
                progress.call1(py, (state,)).map(drop)
            })
        };
        let mut find = |fingerprint: &str| {
            let Some(elsewhere) = &elsewhere else { return Ok(None) };
            let found = Mutex::new(None);
            call.borrow_mut()(&|py| {
                *found.lock().expect("no panic") = elsewhere.call1(py, (fingerprint,))?.extract(py)?;
                Ok(())
            })?;
            let json: Option<String> = found.into_inner().expect("no panic");
            let Some(json) = json else { return Ok(None) };
            let value = serde_json::from_str(&json).unwrap_or_default(); // null is no manifest
            Manifest::of_json(value, Path::new(MANIFEST_NAME)).map(Some)
        };
        core::preprocess_unless(&options, load, executor, &mut on_progress, &mut find)
    })?;
    let manifest = serde_json::to_string(&report.manifest).expect("plain data");
    let seconds = report.elapsed.as_secs_f64();
    Ok((report.path, manifest, report.is_reused, report.num_reused_samples, seconds, report.why_not_fast))
}

/// Runs a Python callback from within [`detached`].
type Call<'a> = &'a mut dyn FnMut(&dyn Fn(Python<'_>) -> PyResult<()>) -> sft_fast_core::Result<()>;

/// An object with the methods of `sft_fast.distributed.RayExecutor`.
struct PythonExecutor<'a, 'b> {
    object: Py<PyAny>,
    call: &'a RefCell<Call<'b>>,
}

impl Executor for PythonExecutor<'_, '_> {
    fn begin(&mut self, setup: &Setup) -> sft_fast_core::Result<()> {
        let Setup { directory, tokenizer, template, template_date } = setup;
        let arguments = (directory, tokenizer, template, template_date);
        self.call.borrow_mut()(&|py| self.object.call_method1(py, "begin", arguments).map(drop))
    }

    fn submit(&mut self, number: u64, name: &str, task: String) -> sft_fast_core::Result<()> {
        self.call.borrow_mut()(&|py| self.object.call_method1(py, "submit", (number, name, &task)).map(drop))
    }

    fn poll(&mut self) -> sft_fast_core::Result<Polled> {
        let polled = RefCell::default();
        self.call.borrow_mut()(&|py| {
            let (finished, num_free) = self.object.call_method0(py, "poll")?.extract(py)?;
            *polled.borrow_mut() = Polled { finished, num_free };
            Ok(())
        })?;
        Ok(polled.into_inner())
    }

    fn stop(&mut self) -> sft_fast_core::Result<()> {
        self.call.borrow_mut()(&|py| self.object.call_method0(py, "stop").map(drop))
    }
}

/// Does parts of the work of another process: see `sft_fast.distributed`.
#[pyclass(frozen, module = "sft_fast._core")]
pub struct TaskRunner {
    model: Model,
}

#[pymethods]
impl TaskRunner {
    #[new]
    fn new(py: Python<'_>, tokenizer: PathBuf, template: String, template_date: &str) -> PyResult<Self> {
        let model = py.detach(|| Model::load(&tokenizer, &template, Some(template_date)));
        model.map(|model| Self { model }).map_err(|error| to_python(py, &error))
    }

    /// Writes what comes of a task into `directory`, and returns what is to be known of it.
    fn run(
        &self,
        py: Python<'_>,
        task: &str,
        directory: PathBuf,
        num_threads: Option<NonZero<usize>>,
        unique: &str,
    ) -> PyResult<String> {
        py.detach(|| core::run_task(task, &self.model, &directory, num_threads, unique))
            .map_err(|error| to_python(py, &error))
    }
}
