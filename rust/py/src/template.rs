//! `ChatTemplate`: renders and encodes conversations, one at a time or many on all cores, without a file.

use std::num::NonZero;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyDict;
use sft_fast_core::conversation::{Conversation, FieldMapping};
use sft_fast_core::model::Model;
use sft_fast_core::sampler::{Policies, Sampler};
use sft_fast_core::{Error, ErrorKind, json};

use crate::error::{detached, to_python};
use crate::policies;

/// See `sft_fast.ChatTemplate`.
#[pyclass(frozen, module = "sft_fast._core")]
pub struct ChatTemplate {
    model: Model,
}

type Text = (String, Vec<(usize, usize)>);
type Tokens = (Vec<u32>, Vec<bool>);
type Arrays<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<bool>>);

/// How often the caller is asked whether to go on.
const INTERVAL: Duration = Duration::from_millis(100);

/// What is to be made of a record.
#[derive(Clone, Copy)]
enum What {
    Text,
    Sample,
}

impl ChatTemplate {
    /// Makes the text of the record `{"messages": …, "tools": …}` that `record` is as JSON, or its sample, in the buffers of
    /// `sampler`.
    fn make(
        &self,
        record: &str,
        what: What,
        policies: Policies,
        sampler: &mut Sampler<'_>,
    ) -> sft_fast_core::Result<()> {
        let value = json::parse(record)
            .map_err(|error| Error::new(ErrorKind::InvalidJson, error.message).at_offset(error.offset))?;
        let mut conversation = Conversation::from_record(value, &FieldMapping::default())?;
        conversation.train_on(policies.answers, policies.trains_on_tool_calls);
        match what {
            What::Text => sampler.render(&self.model, &conversation),
            What::Sample => sampler.sample(&self.model, &conversation),
        }
    }

    /// What `take` makes of `record`.
    fn one<T: Send>(
        &self,
        py: Python<'_>,
        record: &str,
        what: What,
        policies: &Bound<'_, PyDict>,
        take: impl FnOnce(&Sampler<'_>) -> T + Send,
    ) -> PyResult<T> {
        let policies = policies::read(policies)?;
        py.detach(|| {
            let mut sampler = Sampler::new(&self.model, policies);
            self.make(record, what, policies, &mut sampler)?;
            Ok(take(&sampler))
        })
        .map_err(|error| to_python(py, &error))
    }

    /// What `take` makes of each record, in order, on `num_threads` threads. The first record that is wrong is
    /// the error, whatever the number of threads.
    fn many<T: Send>(
        &self,
        py: Python<'_>,
        records: &[PyBackedStr],
        what: What,
        policies: &Bound<'_, PyDict>,
        num_threads: Option<NonZero<usize>>,
        take: impl Fn(&Sampler<'_>) -> T + Send + Sync,
    ) -> PyResult<Vec<T>> {
        let policies = policies::read(policies)?;
        let num_cores = || std::thread::available_parallelism().map_or(1, NonZero::get);
        let num_threads = num_threads.map_or_else(num_cores, NonZero::get).min(records.len());
        let next = AtomicUsize::new(0);
        // Whatever a thread has taken it finishes, so all records before the first wrong one are done.
        let stop = || next.store(records.len(), Ordering::Relaxed);
        let work = || {
            let mut sampler = Sampler::new(&self.model, policies);
            let mut made = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(record) = records.get(index) else { return made };
                let result = self.make(record, what, policies, &mut sampler).map(|()| take(&sampler));
                if result.is_err() {
                    stop();
                }
                made.push((index, result));
            }
        };
        detached(py, |call| {
            let mut made = std::thread::scope(|scope| {
                let (sender, receiver) = channel();
                for _ in 0..num_threads {
                    let (sender, work) = (sender.clone(), &work);
                    scope.spawn(move || sender.send(work()));
                }
                drop(sender);
                let mut made = Vec::with_capacity(records.len());
                loop {
                    match receiver.recv_timeout(INTERVAL) {
                        Ok(part) => made.extend(part),
                        Err(RecvTimeoutError::Timeout) => call(&|_| Ok(())).inspect_err(|_| stop())?,
                        Err(RecvTimeoutError::Disconnected) => return Ok(made),
                    }
                }
            })?;
            made.sort_unstable_by_key(|(index, _)| *index);
            let place = |index: usize| move |error: Error| error.inside(&format!("conversations[{index}]"));
            made.into_iter().map(|(index, result)| result.map_err(place(index))).collect()
        })
    }
}

fn text(sampler: &Sampler<'_>) -> Text {
    let spans = sampler.rendered.spans.iter().map(|span| (span.start, span.end)).collect();
    (sampler.rendered.text.clone(), spans)
}

fn tokens(sampler: &Sampler<'_>) -> Tokens {
    let mut mask = vec![false; sampler.tokens.ids.len()];
    for run in &sampler.tokens.runs {
        mask[run.start as usize..run.end as usize].fill(true);
    }
    (sampler.tokens.ids.clone(), mask)
}

fn arrays(py: Python<'_>, (ids, mask): Tokens) -> Arrays<'_> {
    (PyArray1::from_vec(py, ids), PyArray1::from_vec(py, mask))
}

#[pymethods]
impl ChatTemplate {
    #[new]
    #[pyo3(signature = (tokenizer, template, date=None))]
    fn new(py: Python<'_>, tokenizer: PathBuf, template: String, date: Option<String>) -> PyResult<Self> {
        let model =
            py.detach(|| Model::load(&tokenizer, &template, date.as_deref())).map_err(|error| to_python(py, &error))?;
        Ok(Self { model })
    }

    /// The Jinja text.
    #[getter]
    fn source(&self) -> &str {
        self.model.template.source()
    }

    /// Why the reference tokenizer was taken, where it was.
    #[getter]
    fn why_not_fast(&self) -> Option<&str> {
        self.model.tokenizer.why_not_fast()
    }

    /// What is known of the template, as JSON.
    fn verdict(&self) -> String {
        serde_json::to_string(&self.model.template.verdict()).expect("plain data")
    }

    /// (text, byte ranges of it that are trained on).
    fn render(&self, py: Python<'_>, record: &str, policies: &Bound<'_, PyDict>) -> PyResult<Text> {
        self.one(py, record, What::Text, policies, text)
    }

    /// (token ids uint32 [n], label mask bool [n]).
    fn encode<'py>(&self, py: Python<'py>, record: &str, policies: &Bound<'_, PyDict>) -> PyResult<Arrays<'py>> {
        Ok(arrays(py, self.one(py, record, What::Sample, policies, tokens)?))
    }

    /// `render` of each record.
    fn render_batch(
        &self,
        py: Python<'_>,
        records: Vec<PyBackedStr>,
        policies: &Bound<'_, PyDict>,
        num_threads: Option<NonZero<usize>>,
    ) -> PyResult<Vec<Text>> {
        self.many(py, &records, What::Text, policies, num_threads, text)
    }

    /// `encode` of each record.
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        records: Vec<PyBackedStr>,
        policies: &Bound<'_, PyDict>,
        num_threads: Option<NonZero<usize>>,
    ) -> PyResult<Vec<Arrays<'py>>> {
        let made = self.many(py, &records, What::Sample, policies, num_threads, tokens)?;
        Ok(made.into_iter().map(|tokens| arrays(py, tokens)).collect())
    }
}
