//! `Conversations`: what files hold, as chat templates see it, for who wants to make the same samples in another way.

use std::collections::HashSet;
use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use sft_fast_core::conversation::{Content, Conversation, FieldMapping, PlainText, Record, Shape};
use sft_fast_core::json;
use sft_fast_core::source::{Chunk, Source};

use crate::error::{detached, to_python};
use crate::policies;

/// How many bytes of a file are read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Where a record is, and what it holds as JSON: `messages`, `tools`, and which messages are trained on; or, of plain text,
/// its `prompt` and `text`.
type Found = (String, u64, String);

/// The conversations of files, in order; records that are none are left out.
#[pyclass(module = "sft_fast._core")]
pub struct Conversations {
    source: Source,
    mapping: FieldMapping,
    record_shape: Option<Shape>,
    policies: sft_fast_core::sampler::Policies,
    wanted: Option<HashSet<(String, u64)>>,
    chunk: Chunk,
    /// File of the last chunk, and the lines of that file before the next.
    file: u32,
    num_lines: u64,
}

#[pymethods]
impl Conversations {
    /// `wanted`: the places of the records that are to be given, all by default.
    #[new]
    #[pyo3(signature = (files, *, system_key, prompt_key, query_key, response_key, history_key, text_key, record_shape,
        policies, file_names=None, wanted=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python function")]
    fn new(
        py: Python<'_>,
        files: Vec<PathBuf>,
        system_key: Option<String>,
        prompt_key: String,
        query_key: Option<String>,
        response_key: String,
        history_key: Option<String>,
        text_key: String,
        record_shape: &str,
        policies: &Bound<'_, PyDict>,
        file_names: Option<Vec<PathBuf>>,
        wanted: Option<HashSet<(String, u64)>>,
    ) -> PyResult<Self> {
        let policies = policies::read(policies)?;
        let source = detached(py, |_| {
            Ok(Source::open(&files, CHUNK_BYTES, 1, || (), |_, _| Ok(()))?.with_names(file_names.as_deref()))
        })?;
        let mapping = FieldMapping { system_key, prompt_key, query_key, response_key, history_key, text_key };
        let record_shape = Shape::named(record_shape);
        Ok(Self { source, mapping, record_shape, policies, wanted, chunk: Chunk::default(), file: 0, num_lines: 0 })
    }

    fn __iter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    /// The conversations of the next part of the files; `None` at the end.
    fn __next__(&mut self, py: Python<'_>) -> PyResult<Option<Vec<Found>>> {
        py.detach(|| self.read()).map_err(|error| to_python(py, &error))
    }
}

impl Conversations {
    fn read(&mut self) -> sft_fast_core::Result<Option<Vec<Found>>> {
        if !self.source.next(&mut self.chunk)? {
            return Ok(None);
        }
        if self.chunk.file != self.file {
            (self.file, self.num_lines) = (self.chunk.file, 0);
        }
        let path = self.source.file(self.file).0.to_string_lossy().into_owned();
        let mut found = Vec::new();
        for record in &self.chunk.records {
            let place = (path.clone(), self.num_lines + record.position.line);
            if self.wanted.as_ref().is_some_and(|wanted| !wanted.contains(&place)) {
                continue;
            }
            if let Some(content) = self.content(&self.chunk.bytes[record.range.clone()]) {
                found.push((place.0, place.1, content));
            }
        }
        self.num_lines += self.chunk.num_newlines;
        Ok(Some(found))
    }

    /// What a record holds, if it is one.
    fn content(&self, record: &[u8]) -> Option<String> {
        let value = json::parse(std::str::from_utf8(record).ok()?).ok()?;
        let mut conversation = match Record::read(value, &self.mapping, self.record_shape).ok()?.content {
            Content::Chat(conversation) => conversation,
            Content::Text(PlainText { prompt, text }) => {
                let member = |key: &'static str, value| json::Member { key: key.into(), offset: 0, value };
                let members =
                    vec![member("prompt", json::Value::string(prompt)), member("text", json::Value::string(text))];
                let mut out = String::new();
                json::Value { offset: 0, data: json::Data::Object(members) }.write(&mut out);
                return Some(out);
            }
        };
        conversation.train_on(self.policies.answers, self.policies.trains_on_tool_calls);
        let Conversation { messages, tools } = conversation;
        let flags: Vec<_> = messages.iter().map(|message| message.is_trained.to_string()).collect();
        let mut text = String::from(r#"{"messages":["#);
        for (index, message) in messages.into_iter().enumerate() {
            if index > 0 {
                text.push(',');
            }
            json::Value { offset: 0, data: json::Data::Object(message.fields) }.write(&mut text);
        }
        text.push_str(r#"],"tools":"#);
        tools.unwrap_or(json::Value { offset: 0, data: json::Data::Null }).write(&mut text);
        text.push_str(r#","is_trained":["#);
        text.push_str(&flags.join(","));
        text.push_str("]}");
        Some(text)
    }
}
