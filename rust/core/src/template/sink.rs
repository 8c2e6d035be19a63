//! Where the output of a template goes: kept, compared with a text, or recorded piece by piece.

use std::ops::Range;

use super::origin::Made;
use super::value::Text;
use crate::tokenize::control::Stretch;

/// Where the text goes.
#[derive(Debug)]
pub(super) enum Sink<'a> {
    /// Kept, with where it comes from.
    Collect(Made),
    /// Compared with another text.
    Compare(Difference<'a>),
    /// Recorded, one text for each that was written; positions in it are numbers of texts.
    Record(Vec<Text<'a>>),
}

/// How far an output agrees with `text`, and what it is from there on.
#[derive(Debug)]
pub(super) struct Difference<'a> {
    pub text: &'a str,
    /// Bytes that agree; a character may be cut.
    pub common: usize,
    pub rest: Vec<u8>,
}

impl<'a> Sink<'a> {
    /// A sink that keeps the text, in memory that is used again.
    pub fn collect(mut text: String, mut stretches: Vec<Stretch>) -> Self {
        text.clear();
        stretches.clear();
        Self::Collect(Made { text, stretches })
    }

    /// The text that was kept.
    pub fn into_made(self) -> Made {
        match self {
            Self::Collect(made) => made,
            _ => unreachable!("the run was not asked to keep its text"),
        }
    }

    /// The outcome of a comparison.
    pub fn into_difference(self) -> Difference<'a> {
        match self {
            Self::Compare(difference) => difference,
            _ => unreachable!("the run was not asked to compare"),
        }
    }

    /// The texts that were recorded.
    pub fn into_parts(self) -> Vec<Text<'a>> {
        match self {
            Self::Record(parts) => parts,
            _ => unreachable!("the run was not asked to record"),
        }
    }

    /// A sink that goes on from here by itself, where that takes no copy of what was written.
    pub fn fork(&self) -> Option<Self> {
        match self {
            Self::Compare(Difference { text, common, rest }) if rest.is_empty() => {
                Some(Self::Compare(Difference { text, common: *common, rest: Vec::new() }))
            }
            Self::Record(_) => Some(Self::Record(Vec::new())),
            _ => None,
        }
    }

    /// A sink for what is not written but kept in a variable.
    pub fn capture(&self) -> Self {
        match self {
            Self::Record(_) => Self::Record(Vec::new()),
            _ => Self::Collect(Made::default()),
        }
    }

    /// What a capture holds.
    pub fn into_captured(self) -> Text<'a> {
        match self {
            Self::Record(parts) => Text::join(parts),
            captured => captured.into_made().into_text(),
        }
    }

    pub fn write(&mut self, text: &Text<'a>) {
        match self {
            Self::Collect(made) => made.push(text),
            Self::Compare(difference) => difference.write(text.as_str().as_bytes()),
            Self::Record(parts) => match text {
                Text::Joined(joined) => joined.parts.iter().for_each(|part| self.write(part)),
                text if text.plain() == Some("") => {}
                text => parts.push(text.clone()),
            },
        }
    }

    /// How much was written: bytes, or texts where they are recorded.
    pub fn length(&self) -> usize {
        match self {
            Self::Collect(made) => made.text.len(),
            Self::Compare(difference) => difference.common + difference.rest.len(),
            Self::Record(parts) => parts.len(),
        }
    }
}

impl Difference<'_> {
    fn write(&mut self, mut bytes: &[u8]) {
        if self.rest.is_empty() {
            let expected = &self.text.as_bytes()[self.common..];
            let agreeing = if expected.starts_with(bytes) {
                bytes.len()
            } else {
                bytes.iter().zip(expected).take_while(|(byte, expected)| byte == expected).count()
            };
            self.common += agreeing;
            bytes = &bytes[agreeing..];
        }
        self.rest.extend_from_slice(bytes);
    }
}

/// What one run leaves.
pub(super) struct Output<'a> {
    pub sink: Sink<'a>,
    /// What `{% generation %}` wrote.
    pub generated: Vec<Range<usize>>,
    /// What was written while a loop over the messages stood at each of them.
    pub visits: Vec<Visit>,
}

/// The part of the output in `start..end`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Wrote {
    pub start: usize,
    pub end: usize,
    /// How many messages had been looked at by then: the output up to `end` depends on no other.
    pub horizon: usize,
}

/// The output of a loop over the messages while it stood at one message.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Visit {
    /// No loop wrote anything there.
    Silent,
    Wrote(Wrote),
    /// Several loops wrote something.
    Ambiguous,
}
