//! What preprocessing takes from a model directory: its tokenizer and its chat template, and their identity.

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::conversation::Conversation;
use crate::error::{Error, ErrorKind, Result};
use crate::hash::{sha256, sha256_of_file};
use crate::template::{self, ChatTemplate, DateTime, Rendered};
use crate::tokenize::control::{ControlPolicy, ControlTokens};
use crate::tokenize::{self, Encode, Input, Tokenizer, Tokens};

/// A tokenizer and the chat template that goes with it.
pub struct Model {
    /// The directory, as it was given.
    pub directory: PathBuf,
    /// The tokenizer.
    pub tokenizer: Box<dyn Tokenizer>,
    /// SHA-256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
    /// The template as it was asked for: `native`, a name or a file.
    pub template_name: String,
    /// The compiled template.
    pub template: ChatTemplate,
    /// SHA-256 of the template's text and of the special tokens that it can print.
    pub template_sha256: String,
    /// The date that the template takes for today.
    pub template_date: String,
    /// Token that fills rows: the tokenizer's padding token, or its end token, or 0.
    pub pad_token_id: u32,
}

impl Model {
    /// Loads the tokenizer of `directory` and the chat template that `template` names (`native`: the model's own). A template
    /// that asks for the date is told `date` (`2026-01-31`), or that of today.
    pub fn load(directory: &Path, template: &str, date: Option<&str>) -> Result<Self> {
        let clock: DateTime = match date {
            Some(date) => date.parse()?,
            None => DateTime::now().to_string()[.."2026-01-31".len()].parse()?,
        };
        let tokenizer = tokenize::load(directory)?;
        let tokenizer_sha256 = sha256_of_file(&directory.join("tokenizer.json"))?;
        let (name, source, special_tokens) = template::load(directory, template)?;
        let special = |name: &str| special_tokens.iter().find(|(key, _)| key == name).map(|(_, token)| &**token);
        let pad_token_id = [special("pad_token"), special("eos_token")]
            .into_iter()
            .flatten()
            .find_map(|token| tokenizer.token_to_id(token))
            .unwrap_or(0);
        let canonical = serde_json::to_vec(&(&source, &special_tokens)).expect("plain data");
        let template_sha256 = sha256(&canonical);
        Ok(Self {
            directory: directory.into(),
            tokenizer,
            tokenizer_sha256,
            template_name: template.into(),
            template: ChatTemplate::compile(&name, &source, &special_tokens)?.with_clock(clock),
            template_sha256,
            template_date: clock.to_string(),
            pad_token_id,
        })
    }
}

/// One thread's buffers on the way from a conversation to tokens.
pub struct Sampler<'a> {
    encoder: Box<dyn Encode + 'a>,
    control_tokens: ControlPolicy,
    /// The last text and its label spans.
    pub rendered: Rendered,
    /// Where the record spells control tokens in the last text; empty if they are allowed.
    pub control_text: Vec<Range<usize>>,
    /// The tokens of the last text.
    pub tokens: Tokens,
}

impl<'a> Sampler<'a> {
    /// Buffers for `model`.
    pub fn new(model: &'a Model, control_tokens: ControlPolicy) -> Self {
        Self {
            encoder: model.tokenizer.encoder(),
            control_tokens,
            rendered: Rendered::default(),
            control_text: Vec::new(),
            tokens: Tokens::default(),
        }
    }

    /// Renders and encodes `conversation` into the buffers.
    pub fn sample(&mut self, model: &Model, conversation: &Conversation<'_>) -> Result<()> {
        model.template.render(conversation, &mut self.rendered)?;
        let Rendered { text, spans, stretches, .. } = &self.rendered;
        if self.control_tokens == ControlPolicy::Allow {
            let source = Input { text, spans, ..Input::default() };
            return self.encoder.encode(source, &mut self.tokens);
        }
        let control = model.tokenizer.control_tokens();
        control
            .find(text, stretches, &mut self.control_text)
            .map_err(|error| in_message(error, conversation, control))?;
        if let (ControlPolicy::Reject, Some(found)) = (self.control_tokens, self.control_text.first()) {
            let message =
                format!("expected no control token in the text of a record, found '{}'", &text[found.clone()]);
            let error = Error::new(ErrorKind::ControlText, message);
            return Err(in_message(error, conversation, control));
        }
        let source = Input { text, spans, plain: &self.control_text, stretches };
        self.encoder.encode(source, &mut self.tokens).map_err(|error| match error.kind() {
            ErrorKind::ControlText => in_message(error, conversation, control),
            _ => error,
        })
    }
}

/// Places an error at the first text of a message that spells a control token.
fn in_message(error: Error, conversation: &Conversation<'_>, control: &ControlTokens) -> Error {
    for (index, message) in conversation.messages.iter().enumerate() {
        for member in &message.fields {
            if member.value.as_str().is_some_and(|text| control.is_in(text)) {
                return error.at_offset(member.value.offset).at_location(format!("messages[{index}].{}", member.key));
            }
        }
    }
    error
}
