//! What preprocessing takes from a model directory: its tokenizer and its chat template, and their identity.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::hash::sha256;
use crate::template::{self, ChatTemplate, DateTime};
use crate::tokenize::frame::TextFrame;
use crate::tokenize::{self, Tokenizer};

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
    /// The tokens around plain text.
    pub text_frame: TextFrame,
}

impl Model {
    /// Loads the tokenizer of `directory` and the chat template that `template` names (`native`: the model's own). A template
    /// that asks for the date is told `date` (`2026-01-31`), or that of today.
    pub fn load(directory: &Path, template: &str, date: Option<&str>) -> Result<Self> {
        let clock: DateTime = match date {
            Some(date) => date.parse()?,
            None => DateTime::now().to_string()[.."2026-01-31".len()].parse()?,
        };
        let (path, json) = tokenize::read(directory)?;
        let tokenizer = tokenize::load(&json, &path)?;
        let (name, source, special_tokens) = template::load(directory, template)?;
        let special = |name: &str| special_tokens.iter().find(|(key, _)| key == name).map(|(_, token)| &**token);
        let pad_token_id = [special("pad_token"), special("eos_token")]
            .into_iter()
            .flatten()
            .find_map(|token| tokenizer.token_to_id(token))
            .unwrap_or(0);
        let text_frame = tokenizer
            .post_processor()
            .and_then(|post_processor| TextFrame::new(post_processor, special("eos_token")))
            .map_err(|message| Error::new(ErrorKind::Tokenizer, message).with_path(&path))?;
        let canonical = serde_json::to_vec(&(&source, &special_tokens)).expect("plain data");
        let template_sha256 = sha256(&canonical);
        Ok(Self {
            directory: directory.into(),
            tokenizer,
            tokenizer_sha256: sha256(&json),
            template_name: template.into(),
            template: ChatTemplate::compile(&name, &source, &special_tokens)?.with_clock(clock),
            template_sha256,
            template_date: clock.to_string(),
            pad_token_id,
            text_frame,
        })
    }
}
