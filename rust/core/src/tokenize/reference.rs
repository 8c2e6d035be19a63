//! The `tokenizers` crate as it is: slow, right for every tokenizer, and what everything else is measured against.

use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use tokenizers::{AddedToken, PostProcessorWrapper};

use super::control::{ControlTokens, is_control};
use super::{Encode, Input, Tokenizer, Tokens};
use crate::error::{Error, ErrorKind, Result};

/// Any tokenizer that Hugging Face's `tokenizers` can load.
pub struct ReferenceTokenizer {
    inner: tokenizers::Tokenizer,
    /// The same, but for control tokens in the text, which it does not recognise.
    plain: OnceLock<tokenizers::Tokenizer>,
    control: ControlTokens,
    control_tokens: Vec<AddedToken>,
    control_ids: Vec<u32>,
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
        let added = inner.get_added_tokens_decoder().into_iter();
        let (control_ids, control_tokens): (Vec<_>, Vec<_>) =
            added.filter(|(_, token)| is_control(&token.content, token.special)).unzip();
        let control = ControlTokens::new(control_tokens.iter().map(|token| &*token.content));
        Ok(Self { inner, plain: OnceLock::new(), control, control_tokens, control_ids, vocab_size, why_not_fast })
    }

    /// The tokenizer that recognises no control token.
    fn plain(&self) -> &tokenizers::Tokenizer {
        self.plain.get_or_init(|| {
            let mut plain = self.inner.clone();
            let special: Vec<_> = self.control_tokens.iter().map(|token| token.clone().special(true)).collect();
            plain.add_special_tokens(special).expect("every token is there already");
            plain.set_encode_special_tokens(true);
            plain
        })
    }

    /// Does it treat the first word of a text in another way than words behind added tokens?
    fn marks_the_first_word(&self) -> bool {
        let rules = serde_json::to_string(&self.inner.get_pre_tokenizer()).unwrap_or_default();
        rules.contains("\"prepend_scheme\":\"first\"")
    }
}

impl Tokenizer for ReferenceTokenizer {
    fn encoder(&self) -> Box<dyn Encode + '_> {
        Box::new(ReferenceEncoder { tokenizer: self, offsets: Vec::new() })
    }

    fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    fn post_processor(&self) -> std::result::Result<Option<PostProcessorWrapper>, String> {
        Ok(self.inner.get_post_processor().cloned())
    }

    fn control_tokens(&self) -> &ControlTokens {
        &self.control
    }

    fn why_not_fast(&self) -> Option<&str> {
        Some(&self.why_not_fast)
    }
}

struct ReferenceEncoder<'a> {
    tokenizer: &'a ReferenceTokenizer,
    offsets: Vec<(usize, usize)>,
}

impl Encode for ReferenceEncoder<'_> {
    fn encode(&mut self, input: Input<'_>, tokens: &mut Tokens) -> Result<()> {
        let Self { tokenizer, offsets } = self;
        let control_ids = &tokenizer.control_ids;
        tokens.ids.clear();
        offsets.clear();
        append(&tokenizer.inner, input.text, 0, &mut tokens.ids, offsets)?;
        let touches = |(start, end): (usize, usize), range: &Range<usize>| start < range.end && range.start < end;
        if !input.plain.is_empty() {
            if tokenizer.marks_the_first_word() {
                let message = "this tokenizer can't encode a control token in a text as ordinary text";
                return Err(
                    Error::new(ErrorKind::ControlText, message).with_hint("choose control_tokens=allow or reject")
                );
            }
            // The template's own control tokens stay; what lies between them is encoded on its own, as `tokenizers` does.
            let found = tokens.ids.iter().copied().zip(offsets.iter().copied());
            let is_templates = |(id, place): &(u32, (usize, usize))| {
                control_ids.contains(id) && !input.plain.iter().any(|range| touches(*place, range))
            };
            let kept: Vec<_> = found.filter(is_templates).collect();
            tokens.ids.clear();
            offsets.clear();
            let mut done = 0;
            for (id, (start, end)) in kept {
                append(tokenizer.plain(), &input.text[done..start], done, &mut tokens.ids, offsets)?;
                tokens.ids.push(id);
                offsets.push((start, end));
                done = end;
            }
            append(tokenizer.plain(), &input.text[done..], done, &mut tokens.ids, offsets)?;
        }
        // The model's vocabulary may hold a control token, and a normaliser may make one of a text that does not spell it.
        let is_spelt = |id: u32, (start, end): (usize, usize)| {
            tokenizer.inner.id_to_token(id).as_deref() == Some(input.text[start..end].trim())
        };
        let is_plain = |place: (usize, usize)| input.plain.iter().any(|range| touches(place, range));
        let mut stretches = input.stretches.iter().peekable();
        for (id, place) in tokens.ids.iter().zip(offsets.iter()) {
            while stretches.next_if(|stretch| stretch.range.end <= place.0).is_some() {}
            let Some(stretch) = stretches.peek() else { break };
            let is_control = touches(*place, &stretch.range) && control_ids.contains(id);
            if is_control && (is_plain(*place) || !is_spelt(*id, *place)) {
                let text = &input.text[place.0..place.1];
                let message =
                    format!("expected ordinary text, found {text:?}, of which the tokenizer makes a control token");
                return Err(Error::new(ErrorKind::ControlText, message).with_hint("choose control_tokens=allow"));
            }
        }
        label_runs(offsets, input.spans, &mut tokens.runs);
        Ok(())
    }
}

/// Appends the tokens of `text`, which stands at byte `base` of the whole.
fn append(
    tokenizer: &tokenizers::Tokenizer,
    text: &str,
    base: usize,
    ids: &mut Vec<u32>,
    offsets: &mut Vec<(usize, usize)>,
) -> Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    let encoding = tokenizer.encode(text, false).map_err(|error| {
        Error::new(ErrorKind::EncodeFailed, format!("the tokenizer can't encode the text: {error}"))
    })?;
    ids.extend_from_slice(encoding.get_ids());
    offsets.extend(encoding.get_offsets().iter().map(|(start, end)| (base + start, base + end)));
    Ok(())
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
