//! The `tokenizers` crate as it is: slow, right for every tokenizer, and what everything else is measured against.

use std::ops::Range;
use std::path::Path;

use super::{Encode, Tokenizer, Tokens};
use crate::error::{Error, ErrorKind, Result};

/// Any tokenizer that Hugging Face's `tokenizers` can load.
pub struct ReferenceTokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: u32,
    why_not_fast: String,
}

impl ReferenceTokenizer {
    /// Reads the content of a `tokenizer.json`. Truncation and padding that it may ask for are switched off. `path` is for
    /// messages; `why_not_fast` says why the fast engine does not do it.
    pub fn from_json(json: &[u8], path: &Path, why_not_fast: String) -> Result<Self> {
        let refuse = |error: &dyn std::fmt::Display| {
            Error::new(ErrorKind::Tokenizer, format!("expected a tokenizer of the 'tokenizers' library: {error}"))
                .with_path(path)
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|error| refuse(&error))?;
        inner.with_truncation(None).map_err(|error| refuse(&error))?;
        inner.with_padding(None);
        let largest = inner.get_vocab(true).into_values().max();
        let vocab_size = largest.and_then(|id| id.checked_add(1)).ok_or_else(|| refuse(&"its vocabulary is empty"))?;
        Ok(Self { inner, vocab_size, why_not_fast })
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

    fn why_not_fast(&self) -> Option<&str> {
        Some(&self.why_not_fast)
    }
}

struct ReferenceEncoder<'a>(&'a tokenizers::Tokenizer);

impl Encode for ReferenceEncoder<'_> {
    fn encode(&mut self, text: &str, spans: &[Range<usize>], tokens: &mut Tokens) -> Result<()> {
        let encoding = self.0.encode(text, false).map_err(|error| {
            Error::new(ErrorKind::EncodeFailed, format!("the tokenizer can't encode the text: {error}"))
        })?;
        tokens.ids.clear();
        tokens.ids.extend_from_slice(encoding.get_ids());
        label_runs(encoding.get_offsets(), spans, &mut tokens.runs);
        Ok(())
    }
}

/// The runs of tokens that touch `spans`; `offsets` are the bytes that each token covers.
pub(super) fn label_runs(offsets: &[(usize, usize)], spans: &[Range<usize>], runs: &mut Vec<Range<u32>>) {
    runs.clear();
    let mut spans = spans.iter().filter(|span| !span.is_empty()).peekable();
    for (&(start, end), token) in offsets.iter().zip(0..) {
        while spans.next_if(|span| span.end <= start).is_some() {}
        let Some(span) = spans.peek() else { break };
        if start < end && end > span.start {
            match runs.last_mut() {
                Some(run) if run.end == token => run.end += 1,
                _ => runs.push(token..token + 1),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        // A token is in a run exactly if it shares a byte with a span.
        #[test]
        fn runs_are_the_tokens_that_touch_spans(
            lengths in prop::collection::vec(0usize..5, 0..30), cuts in prop::collection::btree_set(0usize..80, 0..8),
        ) {
            let ends: Vec<usize> = lengths.iter().scan(0, |at, length| { *at += length; Some(*at) }).collect();
            let offsets: Vec<_> = ends.iter().zip(&lengths).map(|(end, length)| (end - length, *end)).collect();
            let cuts: Vec<_> = cuts.into_iter().collect();
            let spans: Vec<_> = cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
            let mut runs = Vec::new();
            label_runs(&offsets, &spans, &mut runs);

            for (&(start, end), token) in offsets.iter().zip(0u32..) {
                let expected = (start..end).any(|byte| spans.iter().any(|span| span.contains(&byte)));
                prop_assert_eq!(expected, runs.iter().any(|run| run.contains(&token)));
            }
        }
    }
}
