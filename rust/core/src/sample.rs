//! Text, spans and tokens → a sample: token ids and the label mask, cut to the sequence length by a named policy.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::tokenize::Encoding;

/// What to do with a sample that has more tokens than `sequence_length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooLong {
    /// Leave it out, and count it.
    Reject,
    /// Keep its first `sequence_length` tokens, and count it. The last answer may lose its end.
    Truncate,
}

/// The tokens of `encoding` that are trained on: runs of token numbers, ascending and disjoint.
///
/// A token is trained on if it covers at least one byte of a span, the rule of `return_assistant_tokens_mask` in
/// `transformers`: a token that reaches over the border of an answer has to be produced to begin or end that answer.
/// `spans` are ascending and disjoint byte ranges of the text.
pub fn label_runs(encoding: &Encoding, spans: &[Range<usize>], runs: &mut Vec<Range<u32>>) {
    runs.clear();
    let mut spans = spans.iter().filter(|span| !span.is_empty()).peekable();
    for (token, (&start, &end)) in encoding.starts.iter().zip(&encoding.ends).enumerate() {
        let (token, start, end) = (token as u32, start as usize, end as usize);
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

/// Applies `policy` to a sample of `num_tokens` tokens: how many of its first tokens are kept. `runs` is cut with it.
///
/// # Errors
/// [`ErrorKind::TooLong`] by [`TooLong::Reject`]; [`ErrorKind::NoLabelTokens`] where nothing would be learned. The first
/// token has nothing before it to be predicted from, so it does not count as learned.
pub fn fit(num_tokens: usize, runs: &mut Vec<Range<u32>>, sequence_length: u32, policy: TooLong) -> Result<usize> {
    let mut kept = num_tokens;
    if num_tokens > sequence_length as usize {
        if policy == TooLong::Reject {
            let message = format!("expected at most {sequence_length} tokens, found {num_tokens}");
            return Err(Error::new(ErrorKind::TooLong, message));
        }
        kept = sequence_length as usize;
        runs.retain(|run| run.start < sequence_length);
        if let Some(last) = runs.last_mut() {
            last.end = last.end.min(sequence_length);
        }
    }
    if runs.last().is_none_or(|run| run.end <= 1) {
        let message = match kept == num_tokens {
            true => "expected at least one token to learn, found none",
            false => "expected at least one token to learn within the sequence length, found none",
        };
        return Err(Error::new(ErrorKind::NoLabelTokens, message));
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tiles(lengths: &[u32]) -> Encoding {
        let mut encoding = Encoding::default();
        let mut at = 0;
        for &length in lengths {
            encoding.ids.push(0);
            encoding.starts.push(at);
            at += length;
            encoding.ends.push(at);
        }
        encoding
    }

    proptest! {
        // A token is in a run exactly if it shares a byte with a span.
        #[test]
        fn runs_are_the_tokens_that_touch_spans(
            lengths in prop::collection::vec(0u32..5, 0..30), cuts in prop::collection::btree_set(0usize..80, 0..8),
        ) {
            let encoding = tiles(&lengths);
            let cuts: Vec<_> = cuts.into_iter().collect();
            let spans: Vec<_> = cuts.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
            let mut runs = Vec::new();
            label_runs(&encoding, &spans, &mut runs);

            for token in 0..lengths.len() {
                let covered = encoding.starts[token] as usize..encoding.ends[token] as usize;
                let expected = covered.clone().any(|byte| spans.iter().any(|span| span.contains(&byte)));
                prop_assert_eq!(expected, runs.iter().any(|run| run.contains(&(token as u32))));
            }
        }

        // Truncating keeps the first tokens and exactly their labels; rejecting changes nothing.
        #[test]
        fn fitting_keeps_a_prefix(num_tokens in 1usize..40, sequence_length in 1u32..40, start in 0u32..20, length in 1u32..20) {
            let run = start..start + length;
            let mut cut = vec![run.clone()];
            match fit(num_tokens, &mut cut, sequence_length, TooLong::Truncate) {
                Ok(kept) => {
                    prop_assert_eq!(num_tokens.min(sequence_length as usize), kept);
                    let is_long = num_tokens > sequence_length as usize;
                    prop_assert_eq!(if is_long { sequence_length.min(run.end) } else { run.end }, cut[0].end);
                }
                Err(error) => prop_assert_eq!(ErrorKind::NoLabelTokens, error.kind()),
            }
            let rejected = fit(num_tokens, &mut vec![run], sequence_length, TooLong::Reject);
            prop_assert_eq!(num_tokens > sequence_length as usize, matches!(rejected, Err(error) if error.kind() == ErrorKind::TooLong));
        }
    }
}
