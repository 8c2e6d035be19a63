//! Text → token ids, and which of them lie in the spans that are trained on.
//!
//! [`Tokenizer`] is what a model directory gives; an [`Encode`] is one thread's use of it, with the thread's own cache. There
//! are two engines: [`fast`], for byte-level BPE that it understands in every part, and [`reference`], the `tokenizers`
//! crate, for everything else. They give the same tokens.

pub mod control;
pub mod fast;
pub mod frame;
pub mod reference;

use std::ops::Range;
use std::path::{Path, PathBuf};

use control::{ControlTokens, Stretch};
use fast::{FastTokenizer, Mark, Scratch};
use reference::ReferenceTokenizer;
use tokenizers::PostProcessorWrapper;

use crate::error::{Error, ErrorKind, Result};

/// A loaded tokenizer, shared by all threads.
pub trait Tokenizer: Send + Sync {
    /// A thread's own encoder.
    fn encoder(&self) -> Box<dyn Encode + '_>;

    /// How much text the encoders that are made from now on will see, about: caches are made no larger than that is worth.
    fn expect_bytes(&self, num_bytes: u64) {
        let _ = num_bytes;
    }

    /// One more than the largest token id.
    fn vocab_size(&self) -> u32;

    /// The id of a token by its text, added tokens included.
    fn token_to_id(&self, token: &str) -> Option<u32>;

    /// What puts tokens around a text by itself.
    ///
    /// # Errors
    /// A message, where it can't be read.
    fn post_processor(&self) -> std::result::Result<Option<PostProcessorWrapper>, String>;

    /// The tokens that text of a record must not become.
    fn control_tokens(&self) -> &ControlTokens;

    /// Why this is not the fast engine, where it is not.
    fn why_not_fast(&self) -> Option<&str>;
}

/// The tokens of one text; keep it to reuse its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Runs of token numbers that are trained on, ascending and disjoint.
    pub runs: Vec<Range<u32>>,
}

/// A text to be encoded. All ranges are bytes of the text, ascending and disjoint.
#[derive(Clone, Copy, Debug, Default)]
pub struct Input<'a> {
    /// The text.
    pub text: &'a str,
    /// What of it is trained on.
    pub spans: &'a [Range<usize>],
    /// What of it is ordinary text though it spells added tokens.
    pub plain: &'a [Range<usize>],
    /// What of it must not become a control token in any way; empty where nobody minds.
    pub stretches: &'a [Stretch],
}

/// Encodes texts, one after the other.
pub trait Encode {
    /// Replaces `tokens` with those of a text, without special tokens around it; added tokens inside the text are
    /// recognised but where it is plain. With nothing plain the ids are those of `tokenizers` 0.23,
    /// `encode(text, add_special_tokens=False)`.
    ///
    /// The runs are the tokens that lie in the spans: those that cover at least one byte of a span, the rule of
    /// `return_assistant_tokens_mask` in `transformers`. A token that reaches over the border of an answer has to be
    /// produced to begin or end that answer.
    ///
    /// # Errors
    /// [`ErrorKind::EncodeFailed`] where the tokenizer can't represent the text, [`ErrorKind::ControlText`] where it would
    /// make a control token of a stretch after all.
    fn encode(&mut self, input: Input<'_>, tokens: &mut Tokens) -> Result<()>;
}

/// Reads `tokenizer.json` of a model directory: where it is, and its bytes.
///
/// # Errors
/// [`ErrorKind::Tokenizer`] where the directory or the file is missing.
pub fn read(directory: &Path) -> Result<(PathBuf, Vec<u8>)> {
    let path = directory.join("tokenizer.json");
    if !path.is_file() {
        let found = if directory.is_dir() { "a directory without one" } else { "no such directory" };
        return Err(Error::new(ErrorKind::Tokenizer, format!("expected a tokenizer.json, found {found}"))
            .with_path(directory)
            .with_hint(
                "give the directory of a model, with the tokenizer that save_pretrained writes (a fast tokenizer)",
            ));
    }
    let json = std::fs::read(&path).map_err(|error| Error::io("read", &path, &error))?;
    Ok((path, json))
}

/// The tokenizer of a `tokenizer.json`; `path` is for messages.
///
/// # Errors
/// [`ErrorKind::Tokenizer`] where it is no tokenizer.
pub fn load(json: &[u8], path: &Path) -> Result<Box<dyn Tokenizer>> {
    match FastTokenizer::from_json(json) {
        Ok(tokenizer) => Ok(Box::new(tokenizer)),
        Err(reason) => Ok(Box::new(ReferenceTokenizer::from_json(json, path, reason.to_string())?)),
    }
}

impl Tokenizer for FastTokenizer {
    fn encoder(&self) -> Box<dyn Encode + '_> {
        let (places, marks) = (Vec::new(), Vec::new());
        Box::new(FastEncoder { tokenizer: self, scratch: self.scratch(), places, marks })
    }

    fn expect_bytes(&self, num_bytes: u64) {
        self.expect_bytes(num_bytes);
    }

    fn vocab_size(&self) -> u32 {
        self.vocab_size()
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.token_to_id(token)
    }

    fn post_processor(&self) -> std::result::Result<Option<PostProcessorWrapper>, String> {
        serde_json::from_value(self.post_processor().clone()).map_err(|error| error.to_string())
    }

    fn control_tokens(&self) -> &ControlTokens {
        self.control_tokens()
    }

    fn why_not_fast(&self) -> Option<&str> {
        None
    }
}

struct FastEncoder<'a> {
    tokenizer: &'a FastTokenizer,
    scratch: Scratch,
    places: Vec<usize>,
    marks: Vec<Mark>,
}

impl Encode for FastEncoder<'_> {
    fn encode(&mut self, input: Input<'_>, tokens: &mut Tokens) -> Result<()> {
        let Tokens { ids, runs } = tokens;
        ids.clear();
        runs.clear();
        self.places.clear();
        self.marks.clear();
        let spans = input.spans.iter().filter(|span| !span.is_empty());
        self.places.extend(spans.flat_map(|span| [span.start, span.end]));
        self.tokenizer.encode_marks(input.text, &self.places, input.plain, &mut self.scratch, ids, &mut self.marks);
        for marks in self.marks.chunks_exact(2) {
            let run = marks[0].token as u32..marks[1].as_end() as u32;
            match runs.last_mut() {
                Some(last) if last.end >= run.start => last.end = run.end,
                _ if run.is_empty() => {}
                _ => runs.push(run),
            }
        }
        Ok(())
    }
}
