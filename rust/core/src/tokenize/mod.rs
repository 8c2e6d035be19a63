//! Text → token ids, and which bytes of the text each token covers.
//!
//! [`Tokenizer`] is what a model directory gives; an [`Encode`] is one thread's use of it, with the thread's own cache.

mod reference;

use std::path::Path;

pub use reference::ReferenceTokenizer;

use crate::error::{Error, ErrorKind, Result};

/// The tokens of one text. Buffers are reused from text to text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// First byte of the original text that each token covers.
    pub starts: Vec<u32>,
    /// End of the bytes of the original text that each token covers.
    pub ends: Vec<u32>,
}

impl Encoding {
    /// Forgets the tokens, keeps the memory.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.starts.clear();
        self.ends.clear();
    }
}

/// A loaded tokenizer, shared by all threads.
pub trait Tokenizer: Send + Sync {
    /// A thread's own encoder.
    fn encoder(&self) -> Box<dyn Encode + '_>;

    /// One more than the largest token id.
    fn vocab_size(&self) -> u32;

    /// The id of a token by its text, added tokens included.
    fn token_to_id(&self, token: &str) -> Option<u32>;
}

/// Encodes texts, one after the other.
pub trait Encode {
    /// Replaces `encoding` with the tokens of `text`, without special tokens around it; added tokens inside the text are
    /// recognised. The ids are those of `tokenizers` 0.23, `encode(text, add_special_tokens=False)`.
    ///
    /// # Errors
    /// [`ErrorKind::EncodeFailed`] where the tokenizer can't represent the text.
    fn encode(&mut self, text: &str, encoding: &mut Encoding) -> Result<()>;
}

/// Loads `tokenizer.json` of a model directory.
///
/// # Errors
/// [`ErrorKind::Tokenizer`] where the directory or the file is missing or is no tokenizer.
pub fn load(directory: &Path) -> Result<Box<dyn Tokenizer>> {
    let path = directory.join("tokenizer.json");
    if !path.is_file() {
        let found = if directory.is_dir() { "a directory without one" } else { "no such directory" };
        return Err(Error::new(ErrorKind::Tokenizer, format!("expected a tokenizer.json, found {found}"))
            .with_path(directory)
            .with_hint(
                "give the directory of a model, with the tokenizer that save_pretrained writes (a fast tokenizer)",
            ));
    }
    Ok(Box::new(ReferenceTokenizer::from_file(&path)?))
}
