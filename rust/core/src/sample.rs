//! Tokens and their labels → a sample: cut to the sequence length by a named policy, and with something to learn.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};

/// What to do with a sample that has more tokens than `sequence_length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooLong {
    /// Leave it out, and count it.
    Reject,
    /// Leave out its last turns, so that it ends with a whole answer, and count it; leave it out if not even its first
    /// answer fits.
    TruncateTurns,
    /// Keep its first `sequence_length` tokens, and count it. The last answer may lose its end, which is counted too.
    Truncate,
}

impl TooLong {
    /// The policy of this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Reject, Self::TruncateTurns, Self::Truncate].into_iter().find(|policy| policy.as_str() == name)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reject => "reject",
            Self::TruncateTurns => "truncate_turns",
            Self::Truncate => "truncate",
        }
    }
}

/// What of a sample is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// How many of its first tokens.
    pub num_tokens: usize,
    /// Whether there were more.
    pub is_cut: bool,
    /// Whether the cut goes through an answer.
    pub is_answer_cut: bool,
}

/// Applies `policy` to a sample of `num_tokens` tokens. `runs` is cut with it.
///
/// # Errors
/// [`ErrorKind::TooLong`] by all policies but [`TooLong::Truncate`]; [`ErrorKind::NoLabelTokens`] where nothing would be
/// learned. The first token has nothing before it to be predicted from, so it does not count as learned.
pub fn fit(num_tokens: usize, runs: &mut Vec<Range<u32>>, sequence_length: u32, policy: TooLong) -> Result<Fit> {
    let mut fit = Fit { num_tokens, is_cut: num_tokens > sequence_length as usize, is_answer_cut: false };
    if fit.is_cut {
        if policy != TooLong::Truncate {
            let message = format!("expected at most {sequence_length} tokens, found {num_tokens}");
            return Err(Error::new(ErrorKind::TooLong, message));
        }
        fit.num_tokens = sequence_length as usize;
        runs.retain(|run| run.start < sequence_length);
        if let Some(last) = runs.last_mut() {
            fit.is_answer_cut = last.end > sequence_length;
            last.end = last.end.min(sequence_length);
        }
    }
    if runs.last().is_none_or(|run| run.end <= 1) {
        let message = match fit.is_cut {
            false => "expected at least one token to learn, found none",
            true => "expected at least one token to learn within the sequence length, found none",
        };
        return Err(Error::new(ErrorKind::NoLabelTokens, message));
    }
    Ok(fit)
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
                Ok(fit) => {
                    prop_assert_eq!(num_tokens.min(sequence_length as usize), fit.num_tokens);
                    let is_long = num_tokens > sequence_length as usize;
                    prop_assert_eq!((is_long, is_long && sequence_length < run.end), (fit.is_cut, fit.is_answer_cut));
                    prop_assert_eq!(if is_long { sequence_length.min(run.end) } else { run.end }, cut[0].end);
                }
                Err(error) => prop_assert_eq!(ErrorKind::NoLabelTokens, error.kind()),
            }
            let rejected = fit(num_tokens, &mut vec![run], sequence_length, TooLong::Reject);
            prop_assert_eq!(num_tokens > sequence_length as usize, matches!(rejected, Err(error) if error.kind() == ErrorKind::TooLong));
        }
    }
}
