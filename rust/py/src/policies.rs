//! Policies by their names in Python.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use sft_fast_core::conversation::Answers;
use sft_fast_core::sampler::Policies;
use sft_fast_core::template::DroppedThinking;
use sft_fast_core::tokenize::control::ControlPolicy;
use sft_fast_core::{Error, ErrorKind};

use crate::error::to_python;

/// The error of an option with a value that it does not know.
pub fn unknown(py: Python<'_>, name: &str, expected: &str, found: &str) -> PyErr {
    to_python(py, &Error::new(ErrorKind::Argument, format!("expected {name} to be {expected}, found '{found}'")))
}

/// Reads `control_tokens`, `train_on`, `train_on_tool_calls`, `train_on_thinking` and `dropped_thinking`; what is missing is
/// as it is by default.
pub fn read(policies: &Bound<'_, PyDict>) -> PyResult<Policies> {
    let py = policies.py();
    let mut read = Policies::default();
    for (name, value) in policies {
        let name: String = name.extract()?;
        let text = || value.extract::<String>().unwrap_or_else(|_| value.to_string());
        let flag = || value.extract::<bool>().map_err(|_| unknown(py, &name, "true or false", &text()));
        match name.as_str() {
            "control_tokens" => {
                read.control_tokens = ControlPolicy::named(&text())
                    .ok_or_else(|| unknown(py, &name, "'plain', 'reject' or 'allow'", &text()))?;
            }
            "train_on" => {
                read.answers = Answers::named(&text())
                    .ok_or_else(|| unknown(py, &name, "'all_answers' or 'last_answer'", &text()))?;
            }
            "dropped_thinking" => {
                read.dropped_thinking = DroppedThinking::named(&text())
                    .ok_or_else(|| unknown(py, &name, "'skip', 'split', 'reject' or 'keep'", &text()))?;
            }
            "train_on_tool_calls" => read.trains_on_tool_calls = flag()?,
            "train_on_thinking" => read.trains_on_thinking = flag()?,
            _ => {
                let known =
                    "'control_tokens', 'train_on', 'train_on_tool_calls', 'train_on_thinking' or 'dropped_thinking'";
                return Err(unknown(py, "a policy", known, &name));
            }
        }
    }
    Ok(read)
}
