//! Tokens and their labels → a sample: cut to the sequence length by a named policy, and with something to learn.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};

/// What to do with a sample that has more tokens than `sequence_length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooLong {
    /// Leave it out, and count it.
    Reject,
    /// Keep its first `sequence_length` tokens, and count it. The last answer may lose its end.
    Truncate,
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

    proptest! {
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
