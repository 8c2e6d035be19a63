//! The `tokenizers` crate as it is: slow, right for every tokenizer, and what everything else is measured against.

use std::path::Path;

use super::{Encode, Encoding, Tokenizer};
use crate::error::{Error, ErrorKind, Result};

/// Any tokenizer that Hugging Face's `tokenizers` can load.
pub struct ReferenceTokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: u32,
}

impl ReferenceTokenizer {
    /// Loads a `tokenizer.json`. Truncation and padding that it may ask for are switched off.
    pub fn from_file(path: &Path) -> Result<Self> {
        let refuse = |error: &dyn std::fmt::Display| {
            Error::new(ErrorKind::Tokenizer, format!("expected a tokenizer of the 'tokenizers' library: {error}"))
                .with_path(path)
        };
        let mut inner = tokenizers::Tokenizer::from_file(path).map_err(|error| refuse(&error))?;
        inner.with_truncation(None).map_err(|error| refuse(&error))?;
        inner.with_padding(None);
        let largest = inner.get_vocab(true).into_values().max();
        let vocab_size = largest.and_then(|id| id.checked_add(1)).ok_or_else(|| refuse(&"its vocabulary is empty"))?;
        Ok(Self { inner, vocab_size })
    }
}

impl Tokenizer for ReferenceTokenizer {
    fn encoder(&self) -> Box<dyn Encode + '_> {
        Box::new(ReferenceEncoder(&self.inner))
    }

    fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }
}

struct ReferenceEncoder<'a>(&'a tokenizers::Tokenizer);

impl Encode for ReferenceEncoder<'_> {
    fn encode(&mut self, text: &str, encoding: &mut Encoding) -> Result<()> {
        encoding.clear();
        if u32::try_from(text.len()).is_err() {
            return Err(Error::new(ErrorKind::EncodeFailed, "expected a text of less than 4 GiB, found a longer one"));
        }
        let tokens = self.0.encode(text, false).map_err(|error| {
            Error::new(ErrorKind::EncodeFailed, format!("the tokenizer can't encode the text: {error}"))
        })?;
        encoding.ids.extend_from_slice(tokens.get_ids());
        encoding.starts.extend(tokens.get_offsets().iter().map(|&(start, _)| start as u32));
        encoding.ends.extend(tokens.get_offsets().iter().map(|&(_, end)| end as u32));
        Ok(())
    }
}
