//! `ChatTemplate`: renders and encodes conversations one at a time, for looking and for inference.

use std::path::PathBuf;

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use sft_fast_core::conversation::{Conversation, FieldMapping};
use sft_fast_core::model::Model;
use sft_fast_core::sampler::Sampler;
use sft_fast_core::{Error, ErrorKind, json};

use crate::error::to_python;
use crate::policies;

/// See `sft_fast.ChatTemplate`.
#[pyclass(frozen, module = "sft_fast._core")]
pub struct ChatTemplate {
    model: Model,
}

impl ChatTemplate {
    /// Renders the record `{"messages": …, "tools": …}` that `record` is as JSON, and hands the result to `take`.
    fn sample<T: Send>(
        &self,
        py: Python<'_>,
        record: &str,
        policies: &Bound<'_, PyDict>,
        take: impl FnOnce(Sampler<'_>) -> T + Send,
    ) -> PyResult<T> {
        let policies = policies::read(policies)?;
        py.detach(|| {
            let value = json::parse(record)
                .map_err(|error| Error::new(ErrorKind::InvalidJson, error.message).at_offset(error.offset))?;
            let mut conversation = Conversation::from_record(value, &FieldMapping::default())?;
            let mut sampler = Sampler::new(&self.model, policies);
            conversation.train_on(policies.answers, policies.trains_on_tool_calls);
            sampler.sample(&self.model, &conversation)?;
            Ok(take(sampler))
        })
        .map_err(|error| to_python(py, &error))
    }
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
    fn render(
        &self,
        py: Python<'_>,
        record: &str,
        policies: &Bound<'_, PyDict>,
    ) -> PyResult<(String, Vec<(usize, usize)>)> {
        self.sample(py, record, policies, |sampler| {
            let spans = sampler.rendered.spans.iter().map(|span| (span.start, span.end)).collect();
            (sampler.rendered.text, spans)
        })
    }

    /// (token ids uint32 [n], label mask bool [n]).
    #[expect(clippy::type_complexity, reason = "a tuple for Python")]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        record: &str,
        policies: &Bound<'_, PyDict>,
    ) -> PyResult<(Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<bool>>)> {
        let (ids, mask) = self.sample(py, record, policies, |sampler| {
            let mut mask = vec![false; sampler.tokens.ids.len()];
            for run in &sampler.tokens.runs {
                mask[run.start as usize..run.end as usize].fill(true);
            }
            (sampler.tokens.ids, mask)
        })?;
        Ok((PyArray1::from_vec(py, ids), PyArray1::from_vec(py, mask)))
    }
}
